"""Results of ``svftool finetune`` as a document and as tables."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from svftool.report import json
from svftool.report.tables import plain_table
from svftool.report.text import safe
from svftool.report.text import seconds as duration
from svftool.stages.finetune import FinetuneResult, result_fields
from svftool.training import Run, Summary

FRACTIONS = frozenset({"accuracy", "miou", "fb_iou"})
"""Metrics that people read in percent."""


def document(result: FinetuneResult) -> dict[str, Any]:
    """Return the result for scripts."""
    return json.document("finetune", **result_fields(result))


def view(result: FinetuneResult) -> RenderableType:
    """Return the result for people: one row a regime, and what is to be said about it."""
    notes = [_verdict(summary, result.metric) for summary in result.summary if summary.worse]
    parts: list[RenderableType] = [_table(result)]
    if result.interrupted is not None:
        parts.append(Text("interrupted: what was trained until then is saved", "bold yellow"))
    parts += [Text(note, "bold red") for note in notes]
    parts += [Text("tuned: ").append(safe(str(result.output)), "bold")]
    return Group(*parts)


def _table(result: FinetuneResult) -> Table:
    table = plain_table()
    table.add_column("regime")
    table.add_column("seeds", justify="right")
    table.add_column(result.metric)
    table.add_column("gain", justify="right")
    if len(result.runs) > len(result.summary):
        table.add_column("95 % interval")
    table.add_column("trained", justify="right")
    table.add_column("a step", justify="right")
    table.add_column("a run", justify="right")
    for summary in result.summary:
        runs = [run for run in result.runs if run.regime == summary.regime]
        table.add_row(*_row(summary, runs, len(table.columns)))
    return table


def _row(summary: Summary, runs: list[Run], columns: int) -> list[Text]:
    metric, gain = summary.metric, summary.mean - summary.before
    style = "bold red" if summary.worse else "green" if gain else ""
    row = [
        Text(summary.regime, "bold"),
        Text(str(summary.seeds)),
        Text(f"{value(metric, summary.before)} → {value(metric, summary.mean)}"),
        Text(value(metric, gain, sign=True), style),
    ]
    if columns == 8:
        ends = summary.ci95
        row.append(Text("" if ends is None else " to ".join(value(metric, end) for end in ends)))
    step = summary.step_seconds
    return [
        *row,
        Text(f"{summary.trainable_parameters:,}"),
        Text("" if step is None else duration(step)),
        Text(duration(sum(run.seconds for run in runs) / len(runs))),
    ]


def value(metric: str, number: float, *, sign: bool = False) -> str:
    """Write a metric: fractions in percent, others with three digits.

    Examples
    --------
    >>> value("accuracy", 0.8658), value("loss", -0.25, sign=True)
    ('86.6 %', '-0.250')
    """
    plus = "+" if sign else ""
    if metric in FRACTIONS:
        return f"{100 * number:{plus}.1f} %"
    return f"{number:{plus}.3f}"


def _verdict(summary: Summary, metric: str) -> str:
    return (
        f"{summary.regime} ends WORSE than the base: {metric} {value(metric, summary.before)} → "
        f"{value(metric, summary.mean)}. Do not ship it; try a lower --lr, fewer --steps or more "
        "images."
    )
