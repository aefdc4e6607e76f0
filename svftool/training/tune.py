"""Learning rates chosen on the support set alone, by the same trials for every regime."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from svftool.attaching import Trainable
from svftool.choices.training import Settings
from svftool.errors import kept_work
from svftool.progress import SILENT, Progress
from svftool.tasks.base import Draw, Subdivides, TaskMetric
from svftool.training.group import ALONE, Group, Interruption
from svftool.training.loop import train
from svftool.training.trials import Trial, Tuning, choose
from svftool.training.workspace import Journal

FACTORS = (1 / 9, 1 / 3, 1.0, 3.0, 9.0)
"""What the rates of every kind of parameter are multiplied by together."""

FURTHER = 2
"""Rates that are tried beyond an end of these, one by one, while each is the best."""

FOLDS = 2
"""Parts of the support set that are left out in turn."""


@dataclass(frozen=True)
class Tuner:
    """Tries learning rates for one comparison.

    Attributes
    ----------
    settings : Settings
        Those of the comparison.
    metric : TaskMetric
        Decides.
    journal : Journal or None
        Where scores are kept, so that they are not measured again.
    group : Group
        The processes that train together; the first one measures.
    interruption : Interruption or None
        Asked before each step whether to stop.
    progress : Progress
        Told how far each trial is, and what was chosen.
    """

    settings: Settings
    metric: TaskMetric
    journal: Journal | None = None
    group: Group = ALONE
    interruption: Interruption | None = None
    progress: Progress = SILENT

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
        folds = self.group.together(
            lambda: draw.subdivide(FOLDS, seed) if isinstance(draw, Subdivides) else ()
        )
        if not folds:
            return self._default(steps, label)
        record = f"{name}-rates"
        scores: dict[str, float | None] = dict(self.group.once(lambda: self._noted(record)))
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
                    self.group.once(lambda: self._note(record, scores))
            found = tuple(scores[f"{number}: {factor:.3g}"] for number in range(len(folds)))
            trials.append(Trial(factor, found))
            waiting = waiting or further(trials, self.metric)
        trials.sort(key=lambda trial: trial.factor)
        return self._chosen(tuple(trials), steps, label)

    def _noted(self, record: str) -> dict[str, float | None]:
        if self.journal is None:
            return {}
        with kept_work(self.journal.folder / record):
            known = self.journal.noted(record) or {}
            return {key: None if one is None else float(one) for key, one in known.items()}

    def _note(self, record: str, scores: Mapping[str, float | None]) -> None:
        if self.journal is not None:
            self.journal.note(record, scores)

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
        outcome = train(
            trainable.model,
            trainable.groups,
            fold,
            # Rates suit a length of training: a smaller support set must not shorten it.
            settings if fold.held_out else replace(settings, patience=None),
            seed=seed,
            metric=self.metric,
            label=label,
            interruption=self.interruption,
            group=self.group,
            progress=self.progress,
        )
        if outcome.ending == "interrupted":
            return _Tried(interrupted=True)
        if outcome.ending == "diverged":
            return _Tried()
        name = self.metric.name
        score = self.group.measure(fold, trainable.model)[name]
        return _Tried(score if math.isfinite(score) else None)

    def _default(self, steps: int, label: str) -> Tuning:
        why = "nothing of the support set can be left out to choose by"
        self._say(f"{label}: {why}: the default learning rates are kept")
        return Tuning(1.0, self.metric.name, steps, kept=why)

    def _chosen(self, trials: tuple[Trial, ...], steps: int, label: str) -> Tuning:
        factor = choose(trials, self.metric)
        if factor is None:
            why = "training diverged in every trial"
            self._say(f"{label}: {why}: the default learning rates are kept")
            return Tuning(1.0, self.metric.name, steps, trials, kept=why)
        scores = {trial.factor: trial.score for trial in trials}
        default = "diverged" if scores[1.0] is None else f"{scores[1.0]:.4f}"
        self._say(
            f"{label}: learning rates x {factor:.3g}: {self.metric.name} {scores[factor]:.4f} on "
            f"what was left out of the support set, {default} with the default"
        )
        return Tuning(factor, self.metric.name, steps, trials)

    def _say(self, message: str) -> None:
        if self.group.first:
            self.progress.note(message)


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
