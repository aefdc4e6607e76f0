"""Results of ``svftool evaluate`` as a document and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from svftool.report import json
from svftool.report.text import plain_table, safe
from svftool.stages.evaluate_result import EvaluateResult, result_fields
from svftool.stages.settings import SourcedSetting


def document(result: EvaluateResult) -> dict[str, Any]:
    """Return the result for scripts."""
    return json.document("evaluate", **result_fields(result))


def view(result: EvaluateResult) -> RenderableType:
    """Return the result for people: one row a metric, one column a fold."""
    measured = Text("measured: ").append(safe(str(result.checkpoint)), "bold")
    if result.tuned is not None:
        measured.append(" with ").append(safe(str(result.tuned)), "bold")
    parts: list[RenderableType] = [_table(result), "", settings_table(result.settings), ""]
    if result.seen:
        parts.append(Text(f"{result.seen} of the examples were trained on", "bold yellow"))
    parts.append(measured)
    for title, path in (("predictions", result.predictions), ("pictures", result.pictures)):
        if path is not None:
            parts.append(Text(f"{title}: ").append(safe(str(path)), "bold"))
    return Group(*parts)


def settings_table(settings: Mapping[str, SourcedSetting]) -> Table:
    """Return what was measured with: name, value, and where it came from."""
    table = plain_table()
    table.add_column("measured with")
    table.add_column("value", overflow="fold")
    table.add_column("from")
    for name, one in settings.items():
        table.add_row(Text(name.replace("_", " ")), Text(safe(_shown(one.value))), one.source)
    return table


def _shown(value: Any) -> str:
    """Write a setting's value.

    Examples
    --------
    >>> _shown([0.485, 0.456]), _shown([224, 224])
    ('0.485, 0.456', '224, 224')
    """
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_shown, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(result: EvaluateResult) -> Table:
    table = plain_table()
    table.add_column("metric")
    for run in result.runs:
        title = ", ".join(f"{name} {value}" for name, value in run.facts.items())
        table.add_column(title or "value", justify="right")
    for name in result.runs[0].metrics:
        percent = _is_fraction(name)
        cells = [_value(run.metrics.get(name), percent=percent) for run in result.runs]
        style = "bold" if name == result.metric else ""
        table.add_row(Text(f"{name} %" if percent else name), *cells, style=style)
    return table


def _is_fraction(name: str) -> bool:
    """Whether people read a metric in percent.

    Examples
    --------
    >>> [_is_fraction(name) for name in ("class_accuracy", "base_miou_5shot", "macro_f1", "loss")]
    [True, True, True, False]
    """
    return any(part in name for part in ("accuracy", "iou", "f1"))


def _value(number: float | None, *, percent: bool) -> str:
    if number is None:
        return ""
    return f"{100 * number:.1f}" if percent else f"{number:.3f}"
