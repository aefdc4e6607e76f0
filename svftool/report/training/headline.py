"""What a comparison of regimes says, in one line: who leads by how much, and whether it is told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from svftool.report.finetune import FRACTIONS, value
from svftool.report.text import safe
from svftool.training import Summary
from svftool.training.results import FinetuneResult, PairedDifference, differences

_NAMED = 4
"""Regimes that the leader is held against in words; the table has all."""


@dataclass(frozen=True)
class Headline:
    """The verdict of one number of shots.

    Attributes
    ----------
    text : str
        The regime with the best mean against the next one, or against the start where it is alone.
    facts : str
        What the numbers are, and the leader against all others.
    clear : bool
        Whether the interval of the difference leaves out zero.
    warning : str
        What forbids to believe it; empty where nothing does.
    """

    text: str
    facts: str
    clear: bool
    warning: str


def headlines(result: FinetuneResult) -> list[Headline]:
    """Return the verdict for each number of shots, in the order in which they were asked for."""
    shots = dict.fromkeys(run.shots for run in result.runs)
    found = [_headline(result, count, named=len(shots) > 1) for count in shots]
    return [one for one in found if one is not None]


def _headline(result: FinetuneResult, shots: int | None, *, named: bool) -> Headline | None:
    runs = [run for run in result.runs if run.shots == shots]
    ranked = _ranked([one for one in result.summary if one.shots == shots])
    if not ranked:
        return None
    leader, *others = ranked
    metric = result.metric
    references: Sequence[str | None] = [one.regime for one in others] or [None]
    against = [
        found
        for name in references
        if (found := differences(runs, metric, leader.regime, name)) is not None
    ]
    if not against:
        return None
    first = against[0]
    count = len(first.values)
    start = f"{shots}-shot, " if named else ""
    text = f"{start}{count} seed{'s' * (count > 1)}: {_words(first, metric)}"
    chance = "" if first.clear or count == 1 or first.half is None else ", which may be chance"
    return Headline(text + chance, _facts(against, leader), first.clear, _warning(count))


def _ranked(summaries: Sequence[Summary]) -> list[Summary]:
    """Sort the regimes by their mean, the best first; a mean over folds stands for them."""
    last = {one.regime: one for one in summaries}  # the mean over folds comes after them

    def key(one: Summary) -> tuple[bool, float]:
        return math.isnan(one.mean), -one.mean if one.higher_is_better else one.mean

    return sorted(last.values(), key=key)


def _words(one: PairedDifference, metric: str, *, named: bool = True) -> str:
    name = safe(one.regime)
    reference = "its start" if one.reference is None else safe(one.reference)
    if one.mean == 0.0:
        return f"{name} and {reference} are level"
    side = "above" if one.mean > 0.0 else "below"
    if not math.isfinite(one.mean):
        return f"{name} and {reference} cannot be compared"
    spread = "" if one.half is None else f" ± {value(metric, one.half)}"
    start = f"{name} " if named else ""
    return f"{start}{side} {reference} by {value(metric, abs(one.mean))}{spread}"


def _facts(against: Sequence[PairedDifference], leader: Summary) -> str:
    metric = leader.metric
    unit = f"{metric}, %" if metric in FRACTIONS else metric
    better = "" if leader.higher_is_better else ", where less is better"
    start, end = value(metric, leader.before), value(metric, leader.mean)
    parts = [f"{safe(unit)}{better}; {safe(leader.regime)} went from {start} to {end}"]
    first = against[0]
    if len(first.values) > 1:
        sign = 1.0 if leader.higher_is_better else -1.0
        wins = sum(sign * one > 0.0 for one in first.values)
        parts.append(f"ahead on {wins} of {len(first.values)} seeds, paired, 95 % interval")
    parts += [_words(one, metric, named=False) for one in against[1:_NAMED]]
    if len(against) > _NAMED:
        parts.append(f"and {len(against) - _NAMED} more")
    return "; ".join(parts)


def _warning(count: int) -> str:
    if count > 1:
        return ""
    return (
        "One seed does not tell a difference from chance: another draw of examples may turn it "
        "round. Take --seeds 3 or more for an interval."
    )
