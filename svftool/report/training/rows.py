"""Which summaries of a comparison are drawn side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from svftool.training import Summary
from svftool.training.results import FinetuneResult


@dataclass(frozen=True)
class RunGroup:
    """Regimes of one task.

    Attributes
    ----------
    title : str
        What tells the task from the others; ``""`` where nothing does.
    summaries : tuple of Summary
        One a regime.
    """

    title: str
    summaries: tuple[Summary, ...]


def grouped(result: FinetuneResult) -> list[RunGroup]:
    """Gather the regimes of each task; where there is a mean over folds, it stands for them."""
    over_all = {
        (one.shots, one.regime) for one in result.summary if one.facts and _is_mean(one.facts)
    }
    groups: dict[str, list[Summary]] = {}
    for one in result.summary:
        if (one.shots, one.regime) not in over_all or _is_mean(one.facts):
            groups.setdefault(task_title(one), []).append(one)
    return [RunGroup(title, tuple(found)) for title, found in groups.items()]


def _is_mean(facts: Mapping[str, int | None]) -> bool:
    return all(number is None for number in facts.values())


def task_title(summary: Summary) -> str:
    """Name the task of a summary by its shots and facts."""
    shots = [] if summary.shots is None else [f"{summary.shots}-shot"]
    facts = [
        f"mean over {name}s" if number is None else f"{name} {number}"
        for name, number in summary.facts.items()
    ]
    return ", ".join([*shots, *facts])
