"""Learning rates chosen on the support set alone, by the same trials for every regime."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from svftool.attaching import Trainable
from svftool.tasks.base import Draw, JudgesExamples, TaskMetric
from svftool.training.fold_trials import FoldTrials
from svftool.training.trials import Trial, Tuning, best_of, choose, with_errors

FACTORS = (1 / 3, 1.0, 3.0)
"""What the rates of every kind of parameter are multiplied by together."""

FURTHER = 4
"""Rates that are tried beyond an end of these, one by one, while each is the best."""


@dataclass(frozen=True)
class Tuner(FoldTrials):
    """Tries learning rates for one comparison; the task's metric decides, see `choose`."""

    def tune(
        self,
        draw: Draw,
        start: Callable[[Draw], Trainable],
        *,
        seed: int,
        name: str,
        label: str,
    ) -> Tuning | None:
        """Choose the factor of a run's learning rates.

        Every trial trains for as many steps as the run will, on a part of the support set, and is
        scored on the rest of it.

        Parameters
        ----------
        draw : Draw
            The run's data; only its folds are used.
        start : callable
            Gives a fresh model with the regime attached, for a fold.
        seed : int
            Seed of the run; chooses the folds too.
        name : str
            Name of the run, for the journal.
        label : str
            What the run is called in messages.

        Returns
        -------
        Tuning or None
            None where it was interrupted.
        """
        steps = self.settings.step_count(draw.size)
        folds = self.folds(draw, seed)
        if not folds:
            return self._default(steps, label)
        record = f"{name}-rates"
        noted = self.noted(record, _Measured.of)
        tried: dict[float, list[_Measured]] = {}
        waiting = list(FACTORS)
        while waiting:
            factor = waiting.pop(0)
            for number, fold in enumerate(folds):
                key = f"{number}: {factor:.3g}"
                if key not in noted:
                    shown = f"{label}: rate x {factor:.3g}, fold {number + 1} of {len(folds)}"
                    measured = self._try(fold, start, steps, factor, seed=seed, label=shown)
                    if measured is None:
                        return None
                    noted[key] = measured
                    self.note(record, {key: one.to_plain() for key, one in noted.items()})
            tried[factor] = [noted[f"{number}: {factor:.3g}"] for number in range(len(folds))]
            waiting = waiting or further(self._compared(tried), self.metric)
        return self._chosen(self._compared(tried), steps, label)

    def _compared(self, tried: Mapping[float, Sequence[_Measured]]) -> tuple[Trial, ...]:
        """Return the trials by factor, with their errors where examples are judged."""
        trials = [
            Trial(factor, tuple(one.score for one in found)) for factor, found in tried.items()
        ]
        right = {
            factor: [each for one in found for each in one.right]
            for factor, found in tried.items()
            if all(one.right for one in found)
        }
        return with_errors(sorted(trials, key=lambda one: one.factor), right, self.metric)

    def _try(
        self,
        fold: Draw,
        start: Callable[[Draw], Trainable],
        steps: int,
        factor: float,
        *,
        seed: int,
        label: str,
    ) -> _Measured | None:
        """Train on a fold and measure what it leaves out; None where it was interrupted."""
        trainable = start(fold)
        settings = replace(self.settings.scaled(factor), steps=steps, epochs=None)
        outcome = self.train(trainable, fold, settings, seed=seed, label=label)
        if outcome.ending == "interrupted":
            return None
        if outcome.ending == "diverged":
            return _Measured()
        if self.metric.name == "accuracy" and isinstance(fold, JudgesExamples):
            right = self.group.once(
                lambda: fold.judged(trainable.model.eval(), "query")[1].tolist()
            )
            return _Measured(statistics.fmean(right), right)
        score = self.group.measure(fold, trainable.model)[self.metric.name]
        return _Measured(score if math.isfinite(score) else None)

    def _default(self, steps: int, label: str) -> Tuning:
        why = "nothing of the support set can be left out to choose by"
        self.say(f"{label}: {why}: the default learning rates are kept")
        return Tuning(1.0, self.metric.name, steps, kept=why)

    def _chosen(self, trials: tuple[Trial, ...], steps: int, label: str) -> Tuning:
        factor = choose(trials, self.metric)
        if factor is None:
            why = "training diverged in every trial"
            self.say(f"{label}: {why}: the default learning rates are kept")
            return Tuning(1.0, self.metric.name, steps, trials, kept=why)
        best = best_of(trials, self.metric)
        scores = {trial.factor: trial.score for trial in trials if trial.score is not None}
        default = f"{scores[1.0]:.4f}" if 1.0 in scores else "diverged"
        found = f"learning rates x {factor:.3g}: {self.metric.name} {scores[factor]:.4f}"
        where = f"on what was left out of the support set, {default} with the default"
        if best is not None and best != factor:
            where += f", {scores[best]:.4f} with x {best:.3g}: within a standard error"
        self.say(f"{label}: {found} {where}")
        return Tuning(factor, self.metric.name, steps, trials)


def further(trials: Sequence[Trial], metric: TaskMetric) -> list[float]:
    """Return the factor to try next, where the best one is an end of those that were tried.

    Where training diverged at all of them, it is a smaller one.

    Examples
    --------
    >>> scores = {0.1: 0.5, 1.0: 0.6, 9.0: 0.7}
    >>> trials = [Trial(factor, (score,)) for factor, score in scores.items()]
    >>> further(trials, TaskMetric("accuracy", higher_is_better=True))
    [27.0]
    >>> further([Trial(factor, (None,)) for factor in (1.0, 3.0)], TaskMetric("accuracy", True))
    [0.3333333333333333]
    """
    factors = [trial.factor for trial in trials]
    ends = min(factors), max(factors)
    best = choose(trials, metric) or ends[0]
    if best not in ends or len(trials) >= len(FACTORS) + FURTHER:
        return []
    return [best / 3 if best == ends[0] else best * 3]


@dataclass(frozen=True)
class _Measured:
    """What came of one trial on one fold; nothing where it diverged."""

    score: float | None = None
    right: Sequence[bool] = ()
    """Of each example that was left out, whether its class was found."""

    def to_plain(self) -> list[Any]:
        return [self.score, [int(one) for one in self.right]]

    @classmethod
    def of(cls, plain: Any) -> _Measured:
        score, right = plain if isinstance(plain, list) else (plain, [])  # of an older version
        return cls(None if score is None else float(score), [bool(one) for one in right])
