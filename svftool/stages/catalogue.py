"""The tasks by name, and what each is told of the model that is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from svftool.checkpoints import Checkpoint
from svftool.errors import UsageError
from svftool.few_shot.options import few_shot_tasks
from svftool.models import DEFAULT_PREPROCESSING, Preprocessing, find_preprocessing
from svftool.progress import SILENT, Progress
from svftool.tasks.base import Task
from svftool.tasks.classification import Classification
from svftool.tasks.language import Language
from svftool.tasks.segmentation import Segmentation


@dataclass(frozen=True)
class ModelFacts:
    """What a checkpoint and its folder say about the input of the model.

    Attributes
    ----------
    preprocessing : Preprocessing
        Size and normalisation of images.
    folder : Path or None
        Where the checkpoint's tokenizer would lie.
    config : mapping
        Its ``config.json``; empty where there is none.
    trust_remote_code : bool
        Whether code that lies beside the checkpoint may run.
    """

    preprocessing: Preprocessing = DEFAULT_PREPROCESSING
    folder: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, model: nn.Module | None, *, trust_remote_code: bool = False
    ) -> ModelFacts:
        """Gather them from a checkpoint and the model built for it."""
        return cls(
            preprocessing=find_preprocessing(checkpoint, model),
            folder=checkpoint.path if checkpoint.is_folder else checkpoint.path.parent,
            config=checkpoint.config or {},
            trust_remote_code=trust_remote_code,
        )


def _classification(
    data: Path, facts: ModelFacts, _progress: Progress, **options: Any
) -> list[Task]:
    return [Classification(data, preprocessing=facts.preprocessing, **options)]


def _few_shot(data: Path, facts: ModelFacts, progress: Progress, **options: Any) -> Sequence[Task]:
    return few_shot_tasks(data, preprocessing=facts.preprocessing, progress=progress, **options)


def _language(data: Path, facts: ModelFacts, _progress: Progress, **options: Any) -> list[Task]:
    return [
        Language(
            data,
            **{"tokenizer": facts.folder, **options},
            config=facts.config,
            trust_remote_code=facts.trust_remote_code,
        )
    ]


def _segmentation(data: Path, facts: ModelFacts, _progress: Progress, **options: Any) -> list[Task]:
    return [Segmentation(data, preprocessing=facts.preprocessing, config=facts.config, **options)]


TASKS: dict[str, Callable[..., Sequence[Task]]] = {
    "classification": _classification,
    "segmentation": _segmentation,
    "language": _language,
    "few-shot-segmentation": _few_shot,
}
"""Makers of tasks by name, from data, facts of the model, progress and the task's options."""

SPLIT = frozenset({"classification", "segmentation", "language"})
"""Tasks that measure with what shots left over, or with ``evaluation``."""

PICTURED = frozenset({"segmentation", "few-shot-segmentation"})
"""Tasks whose predictions are pictures."""

_RECORDED = {
    "classification": ("mean", "std", "head_type"),
    "segmentation": ("mean", "std", "head_type", "features", "ignore_index"),
    "language": ("sequence_length",),
    "few-shot-segmentation": (
        "host", "start", "width", "features", "output_stride", "image_size", "mean", "std",
        "test_episodes", "alignment", "base_steps",
    ),
}  # fmt: skip
"""Options by which the same weights give the same metrics, under the names of `Task.describe`."""


def recorded(name: str, described: Mapping[str, Any]) -> dict[str, Any]:
    """Give the options that a task was trained with, as far as its metrics depend on them.

    Parameters
    ----------
    name : str
        One of `TASKS`.
    described : mapping
        What `Task.describe` said then.

    Examples
    --------
    >>> recorded("classification", {"shots": 5, "mean": [0.5], "head_type": "cosine"})
    {'mean': (0.5,), 'head_type': 'cosine'}
    """
    found = {
        key: tuple(described[key]) if isinstance(described[key], list) else described[key]
        for key in _RECORDED.get(name, ())
        if described.get(key) is not None
    }
    if name == "few-shot-segmentation":
        several = {"folds": "fold", "shots": "shots"}
        found |= {option: [described[key]] for option, key in several.items() if key in described}
        if described.get("inner_fold") is not None:
            found["inner"] = described["inner_fold"]
        if described.get("removed_images_with_novel_classes"):
            found["remove_novel"] = True
    return found


def make_tasks(
    name: str,
    data: Path,
    facts: ModelFacts,
    options: Mapping[str, Any],
    *,
    progress: Progress = SILENT,
) -> Sequence[Task]:
    """Make the tasks of a name: one, or several of a kind such as the folds of a data set.

    Parameters
    ----------
    name : str
        One of `TASKS`.
    data : Path
        What to train on.
    facts : ModelFacts
        What the checkpoint says about its input.
    options : mapping
        The task's own options.
    progress : Progress
        Told of what takes long before training begins.

    Raises
    ------
    UsageError
        If there is no such task.
    DataError
        If the data does not hold what was asked for.
    """
    if name not in TASKS:
        raise UsageError(f"task {name!r}, expected one of {', '.join(TASKS)}")
    return TASKS[name](data, facts, progress, **options)
