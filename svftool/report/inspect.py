"""Results of ``svftool inspect`` as a document, a table in the terminal, and CSV."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from svftool.auditing import VERDICTS, LayerDrift
from svftool.auditing.drift import Sides
from svftool.auditing.gates import check_metric
from svftool.report import json
from svftool.report.tables import by_reason, plain_table
from svftool.report.text import display_names, safe, shape
from svftool.stages.audit import AuditResult, Comparison, Unread

MOST_ROWS = 20
BAR_WIDTH = 12
NAME_WIDTH = 26
COLOURS = {
    "untouched": "dim",
    "rounding noise": "dim",
    "spectrum only": "green",
    "general change": "yellow",
    "unrelated": "magenta",
    "broken": "bold red",
}
_NOT_IN_DOCUMENT = ("spectrum_base", "spectrum_tuned")


def document(result: AuditResult) -> dict[str, Any]:
    """Return the result for scripts."""
    comparisons = [
        {
            "base": str(one.base),
            "tuned": None if one.tuned is None else str(one.tuned),
            "verdict": one.verdict,
            "summary": summary(one),
            "layers": [_fields(row) for row in one.layers],
            "unmatched": {
                "base": [_unread(item) for item in one.unmatched_base],
                "tuned": [_unread(item) for item in one.unmatched_tuned],
            },
            "notes": one.notes,
        }
        for one in result.comparisons
    ]
    return json.document("inspect", comparisons=comparisons)


def _fields(row: LayerDrift) -> dict[str, Any]:
    values = {field.name: getattr(row, field.name) for field in fields(row)}
    return {
        name: {"base": value.base, "tuned": value.tuned} if isinstance(value, Sides) else value
        for name, value in values.items()
        if name not in _NOT_IN_DOCUMENT
    }


def _unread(item: Unread) -> dict[str, str]:
    return {"name": item.name, "reason": item.reason}


def summary(comparison: Comparison) -> dict[str, Any]:
    """Count verdicts and give the median drift of the matrices."""
    drifts = sorted(
        row.weight_drift
        for row in comparison.layers
        if row.weight_drift is not None and row.relative_drift is not None
    )
    return {
        "layers": len(comparison.layers),
        "verdicts": dict(Counter(row.verdict for row in comparison.layers if row.verdict)),
        "median_weight_drift": drifts[len(drifts) // 2] if drifts else None,
        "largest_weight_drift": drifts[-1] if drifts else None,
    }


def view(
    result: AuditResult, *, sort: str = "weight_drift", top: int | None = None
) -> RenderableType:
    """Return the result for people.

    Parameters
    ----------
    result : AuditResult
        What was found.
    sort : str
        Metric by which rows fall.
    top : int, optional
        Rows to show; 20 by default.
    """
    check_metric(sort)
    parts: list[RenderableType] = []
    for one in result.comparisons:
        parts += ["", *_comparison(one, sort, top or MOST_ROWS)]
    return Group(*parts[1:])


def _comparison(one: Comparison, sort: str, top: int) -> list[RenderableType]:
    if one.tuned is None:
        return _alone(one, top)
    title = Text(safe(one.base.name), "bold").append(" → ").append(safe(one.tuned.name), "bold")
    matrices = [row for row in one.layers if row.relative_drift is not None]
    matrices.sort(key=lambda row: -_number(row, sort))
    shown = matrices[:top]
    largest = max((_number(row, sort) for row in shown), default=0.0)
    table = plain_table()
    table.add_column("layer", no_wrap=True)
    for name in (sort.replace("_", " "), "", "spectrum", "svf share"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    names = display_names((row.name for row in shown), NAME_WIDTH)
    for row in shown:
        table.add_row(Text(names[row.name]), *_cells(row, sort, largest))
    parts: list[RenderableType] = [title, table]
    if len(matrices) > top:
        parts.append(
            Text(f"and {len(matrices) - top} more (--top {len(matrices)} shows all)", "dim")
        )
    return [*parts, *_rest(one), _verdict(one)]


def _cells(row: LayerDrift, sort: str, largest: float) -> tuple[RenderableType, ...]:
    value, colour = _number(row, sort), COLOURS.get(row.verdict, "")
    share = "–" if row.svf_share is None else f"{row.svf_share:.2f}"
    return (
        f"{value:.4g}",
        Text(bar(value / largest if largest > 0 else 0.0), colour),
        f"{row.relative_drift:.2e}",
        share,
        Text(row.verdict, colour),
    )


def bar(part: float, width: int = BAR_WIDTH) -> str:
    """Draw a horizontal bar in eighths of a character.

    Examples
    --------
    >>> bar(0.5, 4), bar(1.0, 4), bar(0.0, 4)
    ('██', '████', '')
    """
    eighths = round(max(0.0, min(1.0, part)) * width * 8)
    rest = ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]
    return "█" * (eighths // 8) + rest


def _number(row: LayerDrift, metric: str) -> float:
    value = getattr(row, metric)
    return float("-inf") if value is None else float(value)


def _alone(one: Comparison, top: int) -> list[RenderableType]:
    rows = sorted(one.layers, key=lambda row: -(row.spectral_norm.base or 0.0))
    table = plain_table()
    table.add_column("layer", no_wrap=True)
    for title in ("matrix", "spectral norm", "stable rank", "effective rank"):
        table.add_column(title, justify="right", no_wrap=True)
    shown = rows[:top]
    names = display_names((row.name for row in shown), NAME_WIDTH)
    for row in shown:
        numbers = (row.spectral_norm, row.stable_rank, row.effective_rank)
        cells = ("broken" if one.base is None else f"{one.base:.4g}" for one in numbers)
        table.add_row(Text(names[row.name]), shape(row.matrix or ()), *cells)
    parts: list[RenderableType] = [Text(safe(one.base.name), "bold"), table]
    if len(rows) > top:
        parts.append(Text(f"and {len(rows) - top} more (--top {len(rows)} shows all)", "dim"))
    return [*parts, *_rest(one)]


def _rest(one: Comparison) -> list[RenderableType]:
    """Say what is in no row of the table: other tensors, and those without a counterpart."""
    parts: list[RenderableType] = []
    others = [row for row in one.layers if row.matrix is None and row.view is None]
    changed = [row for row in others if row.weight_drift]
    if others:
        most = max((row.weight_drift or 0.0 for row in others), default=0.0)
        parts.append(
            Text(f"{len(changed)} of {len(others)} other tensors changed, at most by {most:.2%}")
        )
    for side, unread in (("base", one.unmatched_base), ("fine-tune", one.unmatched_tuned)):
        if unread and one.tuned is not None:
            parts.append(Text(f"in the {side} alone, or not compared:", "dim"))
            parts.append(by_reason({item.name: item.reason for item in unread}))
    return parts


def _verdict(one: Comparison) -> Text:
    counts = Counter(row.verdict for row in one.layers if row.relative_drift is not None)
    text = Text("verdict: ").append(one.verdict, f"bold {COLOURS.get(one.verdict, '')}")
    text.append(f" ({VERDICTS[one.verdict]})" if one.verdict in VERDICTS else "")
    listed = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
    return text.append(f"; layers: {listed}" if listed else "")


def csv_text(result: AuditResult) -> str:
    """Return one line a layer for spreadsheets; what would be taken for a formula is quoted."""
    columns = [
        field.name
        for field in fields(LayerDrift)
        if field.name not in (*_NOT_IN_DOCUMENT, "effective_rank", "stable_rank", "spectral_norm")
    ]
    sides = ("effective_rank", "stable_rank", "spectral_norm")
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    header = [
        "base",
        "tuned",
        *columns,
        *(f"{s}_{side}" for s in sides for side in ("base", "tuned")),
    ]
    writer.writerow(header)
    for one in result.comparisons:
        for row in one.layers:
            pairs = [
                getattr(getattr(row, name), side) for name in sides for side in ("base", "tuned")
            ]
            values = [one.base, one.tuned, *(getattr(row, name) for name in columns), *pairs]
            writer.writerow([_csv_cell(value) for value in values])
    return out.getvalue()


def _csv_cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    text = str(value)
    return f"'{text}" if not isinstance(value, float | int) and text[:1] in "=+-@\t\r" else text


def gate_lines(rows: Sequence[LayerDrift], metric: str) -> str:
    """List the worst layers that tripped a gate."""
    worst = sorted(rows, key=lambda row: -_number(row, metric))[:3]
    return ", ".join(f"{safe(row.name)} {_number(row, metric):.4g}" for row in worst)
