"""Trials of learning rates, and which rate they speak for."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from svftool.tasks.base import TaskMetric

_EXACT = 1 + 1e-9
"""A single example is one standard error off, and rounding must not decide."""


@dataclass(frozen=True)
class Trial:
    """One rate, tried on every fold.

    Attributes
    ----------
    factor : float
        What the default rates were multiplied by.
    scores : tuple of float or None
        TaskMetric on what each fold left out; None where training diverged.
    error : float or None
        Standard error of how far its score is from the best trial's: both saw the same examples.
        None where the task does not judge its examples one by one, or training diverged.
    """

    factor: float
    scores: tuple[float | None, ...]
    error: float | None = None

    @property
    def score(self) -> float | None:
        """Mean over the folds; None where training diverged on one."""
        known = [score for score in self.scores if score is not None]
        return sum(known) / len(known) if known and len(known) == len(self.scores) else None


@dataclass(frozen=True)
class Tuning:
    """How the learning rates of a run were chosen.

    Attributes
    ----------
    factor : float
        What the default rates were multiplied by.
    metric : str
        What the trials were scored by.
    steps : int
        Optimiser steps of every trial.
    trials : tuple of Trial
        All of them, by factor; none where the support set could not be split.
    kept : str or None
        Why the default was kept without a choice.
    """

    factor: float
    metric: str
    steps: int
    trials: tuple[Trial, ...] = ()
    kept: str | None = None


def choose(trials: Sequence[Trial], metric: TaskMetric) -> float | None:
    """Return the factor nearest to the default whose score is within a standard error of the best.

    Few examples tell rates hardly apart, and the best of several scores is the luckiest one, too.
    (The rule of Breiman et al. 1984, Classification and Regression Trees, section 3.4.3, with the
    default as the simplest choice.) Of two as near, the one with the better score, then the lower.
    Without errors the best score decides.

    Returns
    -------
    float or None
        None where every trial diverged.

    Examples
    --------
    >>> trials = [Trial(0.1, (0.5, 0.7)), Trial(1.0, (0.5, 0.6)), Trial(10.0, (0.9, None))]
    >>> accuracy = TaskMetric("accuracy", higher_is_better=True)
    >>> choose(trials, accuracy)
    0.1
    >>> choose([trials[0], replace(trials[1], error=0.08)], accuracy)
    1.0
    """
    sign = -1.0 if metric.higher_is_better else 1.0
    ranked = [
        (sign * trial.score, abs(math.log(trial.factor)), trial.factor, trial.error or 0.0)
        for trial in trials
        if trial.score is not None
    ]
    if not ranked:
        return None
    best = min(ranked)[0]
    near = [
        (away, score, factor)
        for score, away, factor, error in ranked
        if score <= best + _EXACT * error
    ]
    return min(near)[-1]


def best_of(trials: Sequence[Trial], metric: TaskMetric) -> float | None:
    """Return the factor with the best score, as `choose` does without errors."""
    return choose([replace(trial, error=None) for trial in trials], metric)


def with_errors(
    trials: Sequence[Trial], right: Mapping[float, Sequence[bool]], metric: TaskMetric
) -> tuple[Trial, ...]:
    """Give trials their standard errors, from what each of them got right of the same examples.

    Parameters
    ----------
    trials : sequence of Trial
    right : mapping of float to sequence of bool
        By factor, for every example that was left out; without those that diverged.
    metric : TaskMetric
        Decides which trial is the best.
    """
    best = best_of(trials, metric)
    if best is None or best not in right:
        return tuple(trials)
    return tuple(
        replace(trial, error=_paired_error(right[best], right[trial.factor]))
        if trial.factor in right
        else trial
        for trial in trials
    )


def _paired_error(one: Sequence[bool], other: Sequence[bool]) -> float:
    differences = [float(a) - float(b) for a, b in zip(one, other, strict=True)]
    return mean_and_error(differences)[1]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error; both 0 of a single value."""
    if len(values) < 2:
        return 0.0, 0.0
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def tuning_to_plain(tuning: Tuning) -> dict[str, Any]:
    """Return a tuning as values that JSON holds, with each trial's mean."""
    trials = [{**asdict(trial), "score": trial.score} for trial in tuning.trials]
    return {**asdict(tuning), "trials": trials}


def tuning_from_plain(value: Mapping[str, Any]) -> Tuning:
    """Read back what `tuning_to_plain` gave."""
    trials = tuple(
        Trial(one["factor"], tuple(one["scores"]), one.get("error")) for one in value["trials"]
    )
    return Tuning(**{**value, "trials": trials})
