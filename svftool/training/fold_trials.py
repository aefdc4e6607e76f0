"""Trainings on a part of the support set, which the rest of it judges; what they find is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from svftool.attaching import Trainable
from svftool.choices.training import Settings
from svftool.errors import kept_work
from svftool.progress import SILENT, Progress
from svftool.tasks.base import Draw, Subdivides, TaskMetric
from svftool.training.group import ALONE, Group, Interruption
from svftool.training.loop import Outcome, train
from svftool.training.workspace import Journal

_T = TypeVar("_T")

FOLDS = 2
"""Parts of the support set that are left out in turn."""


@dataclass(frozen=True)
class FoldTrials:
    """What trials of one comparison have in common.

    Attributes
    ----------
    settings : Settings
        Those of the comparison.
    metric : TaskMetric
        The task's.
    journal : Journal or None
        Where what was measured is kept, so that it is not measured again.
    group : Group
        The processes that train together; the first one measures.
    interruption : Interruption or None
        Asked before each step whether to stop.
    progress : Progress
        Told how far each trial is, and what was found.
    """

    settings: Settings
    metric: TaskMetric
    journal: Journal | None = None
    group: Group = ALONE
    interruption: Interruption | None = None
    progress: Progress = SILENT

    def folds(self, draw: Draw, seed: int) -> tuple[Draw, ...]:
        """Return the parts of the support set; none where nothing can be left out."""

        def divided() -> tuple[Draw, ...]:
            return tuple(draw.subdivide(FOLDS, seed)) if isinstance(draw, Subdivides) else ()

        return self.group.together(divided)

    def noted(self, record: str, of: Callable[[Any], _T] = lambda value: value) -> dict[str, _T]:
        """Return what was noted before, made of plain values by `of`; in every process."""

        def read() -> dict[str, _T]:
            if self.journal is None:
                return {}
            with kept_work(self.journal.folder / record):
                noted = self.journal.noted(record) or {}
                return {key: of(value) for key, value in noted.items()}

        return dict(self.group.once(read))

    def note(self, record: str, values: Mapping[str, Any]) -> None:
        """Keep what was found."""
        journal = self.journal
        if journal is not None:
            self.group.once(lambda: journal.note(record, values))

    def train(
        self, trainable: Trainable, fold: Draw, settings: Settings, *, seed: int, label: str
    ) -> Outcome:
        """Train on a fold."""
        return train(
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

    def say(self, message: str) -> None:
        """Tell the user, once."""
        if self.group.first:
            self.progress.note(message)
