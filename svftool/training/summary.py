"""Regimes over their seeds: the mean of a metric and its 95 % interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.special import stdtrit

from svftool.tasks.base import TaskMetric
from svftool.training.plan import Run

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """One regime over its seeds.

    Attributes
    ----------
    regime, metric : str
        The regime, and the task's primary metric.
    shots : int or None
        Examples a class.
    facts : mapping of str to int or None
        What tells its task from the others; None stands for the mean over all of them.
    seeds : int
        Runs that count: those that were not interrupted, unless all were.
    before, mean : float
        Mean of the metric over the runs, before and after.
    ci95 : tuple of float or None
        95 % interval of `mean`; None for one run.
    trainable_parameters : int
        Numbers that training could change.
    step_seconds : float or None
        Median over the runs of a step's wall time.
    worse : bool
        `mean` is worse than `before`.
    values : tuple of float
        The metric of every seed, whose mean is `mean`.
    """

    regime: str
    metric: str
    shots: int | None
    facts: Mapping[str, int | None]
    seeds: int
    before: float
    mean: float
    ci95: tuple[float, float] | None
    trainable_parameters: int
    step_seconds: float | None
    worse: bool
    values: tuple[float, ...] = ()


def summarise(runs: Sequence[Run], metric: TaskMetric) -> list[Summary]:
    """Sum up the runs of each task and regime, in the order in which they came.

    Where there are several tasks of the same shots, such as folds, the mean over them follows: its
    interval is that of the seeds' means, over the seeds that went through all tasks.
    """
    whole = [run for run in runs if run.outcome.ending != "interrupted"] or list(runs)
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in whole:
        groups.setdefault((run.shots, run.regime, tuple(run.facts.items())), []).append(run)
    summaries = [_summary(group, metric, group[0].facts) for group in groups.values()]
    for shots, regime in dict.fromkeys((shots, regime) for shots, regime, _ in groups):
        tasks = {facts for s, r, facts in groups if (s, r) == (shots, regime)}
        if len(tasks) > 1:
            chosen = [run for run in whole if (run.shots, run.regime) == (shots, regime)]
            seeds = [run.seed for run in chosen]
            complete = [run for run in chosen if seeds.count(run.seed) == len(tasks)]
            if complete:
                summaries.append(_summary(complete, metric, dict.fromkeys(complete[0].facts)))
    return summaries


def _summary(whole: Sequence[Run], metric: TaskMetric, facts: Mapping[str, int | None]) -> Summary:
    by_seed: dict[int, list[float]] = {}
    for run in whole:
        by_seed.setdefault(run.seed, []).append(run.after[metric.name])
    values = [statistics.fmean(ends) for ends in by_seed.values()]
    before = statistics.fmean(run.before[metric.name] for run in whole)
    mean = statistics.fmean(values)
    times = [run.outcome.step_seconds for run in whole if run.outcome.step_seconds is not None]
    return Summary(
        regime=whole[0].regime,
        metric=metric.name,
        shots=whole[0].shots,
        facts=facts,
        seeds=len(values),
        before=before,
        mean=mean,
        ci95=interval(values),
        trainable_parameters=whole[0].trainable_parameters,
        step_seconds=statistics.median(times) if times else None,
        worse=metric.better(before, mean),
        values=tuple(values),
    )


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Interval of the mean by Student's t distribution; None for one value, or infinite ones.

    Examples
    --------
    >>> low, high = interval([0.84, 0.86, 0.85])
    >>> round(low, 4), round(high, 4)
    (0.8252, 0.8748)
    >>> interval([0.84]) is None
    True
    """
    # A perplexity may overflow: of infinite values there is no spread.
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    half = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)) * error
    return mean - half, mean + half
