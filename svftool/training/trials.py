"""Trials of learning rates, and which rate they speak for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from svftool.tasks.base import TaskMetric


@dataclass(frozen=True)
class Trial:
    """One rate, tried on every fold.

    Attributes
    ----------
    factor : float
        What the default rates were multiplied by.
    scores : tuple of float or None
        TaskMetric on what each fold left out; None where training diverged.
    """

    factor: float
    scores: tuple[float | None, ...]

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
    """Return the factor with the best score; of equal ones that nearest to the default, then lower.

    Returns
    -------
    float or None
        None where every trial diverged.

    Examples
    --------
    >>> trials = [Trial(0.1, (0.5, 0.7)), Trial(1.0, (0.6, 0.6)), Trial(10.0, (0.9, None))]
    >>> choose(trials, TaskMetric("accuracy", higher_is_better=True))
    1.0
    """
    sign = -1.0 if metric.higher_is_better else 1.0
    ranked = [
        (sign * trial.score, abs(math.log(trial.factor)), trial.factor)
        for trial in trials
        if trial.score is not None
    ]
    return min(ranked)[-1] if ranked else None


def tuning_to_plain(tuning: Tuning) -> dict[str, Any]:
    """Return a tuning as values that JSON holds, with each trial's mean."""
    trials = [{**asdict(trial), "score": trial.score} for trial in tuning.trials]
    return {**asdict(tuning), "trials": trials}


def tuning_from_plain(value: Mapping[str, Any]) -> Tuning:
    """Read back what `tuning_to_plain` gave."""
    trials = tuple(Trial(one["factor"], tuple(one["scores"])) for one in value["trials"])
    return Tuning(**{**value, "trials": trials})
