"""Results of ``svftool finetune`` as a document and as tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from svftool.report import json
from svftool.report.text import plain_table, safe
from svftool.report.text import seconds as duration
from svftool.training import Run, Summary
from svftool.training.results import FinetuneResult, PairedDifference, result_fields

FRACTIONS = frozenset({"accuracy", "miou", "fb_iou"})
"""Metrics that people read in percent."""


def document(result: FinetuneResult) -> dict[str, Any]:
    """Return the result for scripts."""
    return json.document("finetune", **result_fields(result))


def view(result: FinetuneResult) -> RenderableType:
    """Return the result for people: one row a regime, and what is to be said about it."""
    parts: list[RenderableType] = [_tables(result), ""]
    if result.compared:
        parts += [_against(result), Text(against_note(result)), ""]
    if result.interrupted is not None:
        parts.append(
            Text(
                "interrupted: what was trained until then is saved; --resume goes on", "bold yellow"
            )
        )
    parts += [Text(_verdict(one), "bold red") for one in result.summary if one.worse]
    parts += [Text(line) for line in _by_seed(result.summary)]
    parts += [Text(line) for line in _rates(result.runs)]
    parts += [Text(line, "yellow") for line in _kept(result.runs)]
    return Group(*parts, Text("tuned: ").append(safe(str(result.output)), "bold"))


def _tables(result: FinetuneResult) -> RenderableType:
    if not result.has_folds:
        return _table(result)
    from svftool.report import few_shot

    return few_shot.tables(result)


def _table(result: FinetuneResult) -> Table:
    percent = " %" if result.metric in FRACTIONS else ""
    several = len(result.runs) > len(result.summary)
    table = plain_table()
    table.add_column("regime")
    table.add_column("seeds", justify="right")
    table.add_column(result.metric + percent, justify="right")
    table.add_column("gain", justify="right")
    if several:
        table.add_column("± 95 %", justify="right")
    table.add_column("trained", justify="right")
    table.add_column("a step", justify="right")
    table.add_column("a run", justify="right")
    for summary in result.summary:
        runs = [run for run in result.runs if run.regime == summary.regime]
        cells = _cells(summary, runs)
        table.add_row(*(cells if several else cells[:4] + cells[5:]))
    return table


def _cells(summary: Summary, runs: Sequence[Run]) -> list[Text]:
    metric, gain = summary.metric, summary.gain
    style = "bold red" if summary.worse else "green" if gain > 0 else ""
    before, mean = (value(metric, number) for number in (summary.before, summary.mean))
    half = None if summary.ci95 is None else (summary.ci95[1] - summary.ci95[0]) / 2
    step = summary.step_seconds
    return [
        Text(summary.regime, "bold"),
        Text(str(summary.seeds)),
        Text(f"{before} → {mean}" if summary.measured else "not measured"),
        Text(value(metric, gain, sign=True), style),
        Text("" if half is None else value(metric, half)),
        Text(f"{summary.trainable_parameters:,}"),
        Text("" if step is None else duration(step)),
        Text(duration(sum(run.seconds for run in runs) / len(runs))),
    ]


def _against(result: FinetuneResult) -> Table:
    """Hold every regime against the one that was named."""
    table = plain_table()
    several = len({one.shots for one in result.compared}) > 1
    table.add_column(f"against {result.against}")
    for name in (*(["shots"] if several else []), "gain", "± 95 %", "wins"):
        table.add_column(name, justify="right")
    for row in against_rows(result):
        style = "green" if row.clear and row.ahead else "bold red" if row.clear else ""
        cells = [Text(row.shots)] if several else []
        cells += [Text(row.gain, style), Text(row.half), Text(row.wins)]
        table.add_row(Text(row.regime, "bold"), *cells)
    return table


@dataclass(frozen=True)
class AgainstRow:
    """One regime against the reference, in words.

    Attributes
    ----------
    regime, shots, gain, half, wins : str
    clear : bool
        Whether the interval leaves out zero.
    ahead : bool
        Whether the regime is better in the mean.
    """

    regime: str
    shots: str
    gain: str
    half: str
    wins: str
    clear: bool
    ahead: bool


def against_rows(result: FinetuneResult) -> list[AgainstRow]:
    """Say how much better each regime is than the reference over the same seeds."""
    higher = all(one.higher_is_better for one in result.summary)
    sign, metric = (1.0 if higher else -1.0), result.metric

    def row(one: PairedDifference) -> AgainstRow:
        return AgainstRow(
            regime=one.regime,
            shots="all" if one.shots is None else str(one.shots),
            gain=value(metric, sign * one.mean, sign=True),
            half="–" if one.half is None else value(metric, one.half),
            wins=f"{one.wins(higher_is_better=higher)} of {len(one.values)}",
            clear=one.clear,
            ahead=sign * one.mean > 0.0,
        )

    return [row(one) for one in result.compared]


def against_note(result: FinetuneResult) -> str:
    """Say what the numbers of the comparison with one regime are."""
    if max(len(one.values) for one in result.compared) == 1:
        return "one seed: no interval, and chance is not told from a difference"
    return "gain: how much better over the same seeds, in the mean; Student's t interval"


def _by_seed(summaries: Sequence[Summary]) -> list[str]:
    """Say what every seed came to, where there are several and no folds."""
    return [
        f"{one.regime}: {', '.join(value(one.metric, number) for number in one.values)} "
        f"(seeds {', '.join(map(str, one.numbers))})"
        for one in summaries
        if len(one.values) > 1 and not one.facts
    ]


def _rates(runs: Sequence[Run]) -> list[str]:
    """Say by what each regime's learning rates were multiplied, seed after seed."""
    chosen: dict[str, list[str]] = {}
    for run in runs:
        if run.tuning is not None:
            kept = " (kept)" if run.tuning.kept is not None else ""
            chosen.setdefault(run.regime, []).append(f"{run.tuning.factor:.3g}{kept}")
    return [
        f"{regime}: learning rates x {', '.join(factors)}, chosen on the support set"
        for regime, factors in chosen.items()
    ]


def _kept(runs: Sequence[Run]) -> list[str]:
    """Say how much of each regime's training was kept, seed after seed, where it was judged."""
    shares: dict[str, list[str]] = {}
    reasons: dict[str, str] = {}
    for run in runs:
        if run.safeguard is not None:
            words = {"start": "the start", "end": "all"}
            shares.setdefault(run.regime, []).append(
                words.get(run.kept, f"{run.safeguard.share:.1%} of the way")
            )
            reasons[run.regime] = run.safeguard.why
    return [
        f"{regime}: kept {', '.join(found)}"
        + (f": {reasons[regime]}" if len(found) == 1 else ", as the examples left out in turn say")
        for regime, found in shares.items()
    ]


def value(metric: str, number: float, *, sign: bool = False) -> str:
    """Write a metric: fractions in percent, others with three digits; a dash for what is none.

    Examples
    --------
    >>> value("accuracy", 0.8658), value("loss", -0.25, sign=True)
    ('86.6', '-0.250')
    """
    if math.isnan(number):
        return "–"
    plus = "+" if sign else ""
    if metric in FRACTIONS:
        return f"{100 * number:{plus}.1f}"
    return f"{number:{plus}.3f}"


def _verdict(summary: Summary) -> str:
    metric = summary.metric
    where = "".join(
        f", {name} {number}" for name, number in summary.facts.items() if number is not None
    )
    before, mean = (value(metric, number) for number in (summary.before, summary.mean))
    return (
        f"{summary.regime}{where} ends WORSE than the base: {metric} {before} → {mean}. "
        "Try a lower --lr, fewer --steps or more examples."
    )
