"""The tasks by name, and what each is told of the model that is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from svftool.checkpoints import Checkpoint, class_labels
from svftool.errors import UsageError, no_such
from svftool.files.given import check_data
from svftool.files.side_files import TOKENIZERS
from svftool.models import DEFAULT_PREPROCESSING, Preprocessing, find_preprocessing
from svftool.progress import SILENT, Progress
from svftool.tasks.base import Task


@dataclass(frozen=True)
class ModelFacts:
    """What a checkpoint and its folder say about the input of the model.

    Attributes
    ----------
    preprocessing : Preprocessing
        Size and normalisation of images.
    whole_head : bool
        Whether a head is measured with all of its classes, whichever the data has.
    folder : Path or None
        Where the checkpoint's tokenizer would lie: a folder, or a GGUF file.
    config : mapping
        Its ``config.json``; empty where there is none.
    trust_remote_code : bool
        Whether code that lies beside the checkpoint may run.
    trained : mapping
        What the task said of its settings when the weights were trained; empty for fresh ones.
    """

    preprocessing: Preprocessing = DEFAULT_PREPROCESSING
    whole_head: bool = False
    folder: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False
    trained: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        model: nn.Module | None,
        *,
        trust_remote_code: bool = False,
        whole_head: bool = False,
    ) -> ModelFacts:
        """Gather them from a checkpoint and the model built for it."""
        return cls(
            preprocessing=find_preprocessing(checkpoint, model),
            folder=_tokenizer_place(checkpoint),
            config=checkpoint.config or {},
            trust_remote_code=trust_remote_code,
            whole_head=whole_head,
        )


def _tokenizer_place(checkpoint: Checkpoint) -> Path:
    """Return the folder of the weights; the file itself where its metadata hold a tokenizer."""
    folder = checkpoint.path if checkpoint.is_folder else checkpoint.path.parent
    beside = any((folder / name).is_file() for name in TOKENIZERS)
    return folder if checkpoint.format != "gguf" or beside else checkpoint.files[0].path


def head_classes(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return what ``config.json`` says of the head's outputs: transformers' or timm's names.

    timm describes its names besides; these stand after a comma, as other names of the class.
    """
    names = config.get("label_names")
    if isinstance(names, list) and names:
        more = config.get("label_descriptions")
        described = more if isinstance(more, Mapping) else {}
        return tuple(f"{n}, {described[n]}" if n in described else str(n) for n in names)
    known = class_labels(config)
    if known is None or {int(key) for key in config["id2label"]} != set(range(len(known))):
        return None
    # transformers' stand-ins for names that nobody gave.
    return None if known[0] == "LABEL_0" else known


def _classification(
    data: Path, facts: ModelFacts, progress: Progress, **options: Any
) -> Sequence[Task]:
    from svftool.tasks.classification import Classification
    from svftool.tasks.views import ImageView

    task = Classification(
        data,
        preprocessing=facts.preprocessing,
        view=ImageView.from_plain(facts.trained, facts.preprocessing),
        head_classes=head_classes(facts.config),
        whole_head=facts.whole_head,
        folder=facts.folder,
        trust_remote_code=facts.trust_remote_code,
        **options,
    )
    for message in task.said:
        progress.warn(message)
    return [task]


def _few_shot(data: Path, facts: ModelFacts, progress: Progress, **options: Any) -> Sequence[Task]:
    from svftool.few_shot.task import few_shot_tasks

    return few_shot_tasks(data, preprocessing=facts.preprocessing, progress=progress, **options)


def _language(data: Path, facts: ModelFacts, _progress: Progress, **options: Any) -> Sequence[Task]:
    from svftool.tasks.language import Language

    return [
        Language(
            data,
            config=facts.config,
            trust_remote_code=facts.trust_remote_code,
            **{"tokenizer": facts.folder, **options},
        )
    ]


def _text_classification(
    data: Path, facts: ModelFacts, progress: Progress, **options: Any
) -> Sequence[Task]:
    from svftool.tasks.text_classification import TextClassification

    task = TextClassification(
        data,
        config=facts.config,
        folder=facts.folder,
        trust_remote_code=facts.trust_remote_code,
        head_classes=head_classes(facts.config),
        whole_head=facts.whole_head,
        **options,
    )
    for message in task.said:
        progress.warn(message)
    return [task]


def _segmentation(
    data: Path, facts: ModelFacts, _progress: Progress, **options: Any
) -> Sequence[Task]:
    from svftool.tasks.segmentation import Segmentation

    return [
        Segmentation(
            data,
            preprocessing=facts.preprocessing,
            config=facts.config,
            trained=facts.trained,
            **options,
        )
    ]


_MAKERS: dict[str, Callable[..., Sequence[Task]]] = {
    "classification": _classification,
    "text-classification": _text_classification,
    "segmentation": _segmentation,
    "language": _language,
    "few-shot-segmentation": _few_shot,
}
"""Makers of tasks by name; each imports its task, and no other, when it is called."""


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
        A value of ``--task``.
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
    if name not in _MAKERS:
        raise UsageError(no_such("task", name, _MAKERS))
    check_data(data, name)
    return _MAKERS[name](data, facts, progress, **options)
