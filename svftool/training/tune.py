"""Learning rates chosen on the support set alone, by the same trials for every regime."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from svftool.attaching import Trainable
from svftool.tasks.base import Draw, TaskMetric
from svftool.training.fold_trials import FoldTrials
from svftool.training.trials import Trial, Tuning, choose

FACTORS = (1 / 9, 1 / 3, 1.0, 3.0, 9.0)
"""What the rates of every kind of parameter are multiplied by together."""

FURTHER = 2
"""Rates that are tried beyond an end of these, one by one, while each is the best."""


@dataclass(frozen=True)
class Tuner(FoldTrials):
    """Tries learning rates for one comparison; the task's metric decides."""

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
        scores = {
            key: None if one is None else float(one) for key, one in self.noted(record).items()
        }
        trials: list[Trial] = []
        waiting = list(FACTORS)
        while waiting:
            factor = waiting.pop(0)
            for number, fold in enumerate(folds):
                key = f"{number}: {factor:.3g}"
                if key not in scores:
                    shown = f"{label}: rate x {factor:.3g}, fold {number + 1} of {len(folds)}"
                    outcome = self._try(fold, start, steps, factor, seed=seed, label=shown)
                    if outcome.interrupted:
                        return None
                    scores[key] = outcome.score
                    self.note(record, scores)
            found = tuple(scores[f"{number}: {factor:.3g}"] for number in range(len(folds)))
            trials.append(Trial(factor, found))
            waiting = waiting or further(trials, self.metric)
        trials.sort(key=lambda trial: trial.factor)
        return self._chosen(tuple(trials), steps, label)

    def _try(
        self,
        fold: Draw,
        start: Callable[[Draw], Trainable],
        steps: int,
        factor: float,
        *,
        seed: int,
        label: str,
    ) -> _Tried:
        trainable = start(fold)
        settings = replace(self.settings.scaled(factor), steps=steps, epochs=None)
        outcome = self.train(trainable, fold, settings, seed=seed, label=label)
        if outcome.ending == "interrupted":
            return _Tried(interrupted=True)
        if outcome.ending == "diverged":
            return _Tried()
        name = self.metric.name
        score = self.group.measure(fold, trainable.model)[name]
        return _Tried(score if math.isfinite(score) else None)

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
        scores = {trial.factor: trial.score for trial in trials}
        default = "diverged" if scores[1.0] is None else f"{scores[1.0]:.4f}"
        self.say(
            f"{label}: learning rates x {factor:.3g}: {self.metric.name} {scores[factor]:.4f} on "
            f"what was left out of the support set, {default} with the default"
        )
        return Tuning(factor, self.metric.name, steps, trials)


def further(trials: Sequence[Trial], metric: TaskMetric) -> list[float]:
    """Return the factor to try next, where the best one is an end of those that were tried.

    Examples
    --------
    >>> scores = {0.1: 0.5, 1.0: 0.6, 9.0: 0.7}
    >>> trials = [Trial(factor, (score,)) for factor, score in scores.items()]
    >>> further(trials, TaskMetric("accuracy", higher_is_better=True))
    [27.0]
    """
    factors = [trial.factor for trial in trials]
    best, ends = choose(trials, metric), (min(factors), max(factors))
    if best not in ends or len(trials) >= len(FACTORS) + FURTHER:
        return []
    return [best / 3 if best == ends[0] else best * 3]


@dataclass(frozen=True)
class _Tried:
    """What came of one trial; no score where it diverged."""

    score: float | None = None
    interrupted: bool = False
