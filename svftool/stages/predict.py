"""Checkpoint, or factors with a tuned file, + new pictures or texts -> what it makes of them."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from torch import nn

from svftool.checkpoints import replace_output
from svftool.errors import DataError, UsageError, shortlist
from svftool.files.names import check_predictions_name
from svftool.machine import explain_out_of_memory, pick_device
from svftool.models import Preprocessing, build_model
from svftool.progress import SILENT, Progress
from svftool.stages.catalogue import ModelFacts
from svftool.stages.loading import fit
from svftool.stages.measured import (
    Source,
    classes_setting,
    facts_of,
    known_classes,
    open_source,
    origins_of,
)
from svftool.stages.settings import SourcedSetting, settings_of
from svftool.tasks.class_names import class_names
from svftool.tasks.classification import TextSide
from svftool.tasks.encoded_texts import encoding_of
from svftool.tasks.inputs import TEXTS, list_pictures, list_prompts, unlike_names
from svftool.tasks.language import Language
from svftool.tasks.option import options_in
from svftool.tasks.options import (
    TASKS,
    ClassificationOptions,
    ImageOptions,
    SegmentationOptions,
    TextClassificationOptions,
    recorded,
)
from svftool.tasks.segmentation.views import choose_dense_view
from svftool.tasks.text_encoders import pooling_of
from svftool.tasks.unlabelled import NewMessages, NewPictures, NewScenes, NewTexts, Unlabelled
from svftool.tasks.views import ImageView, choose_view, with_normalisation

SHOWN = 40
"""Rows that a result keeps where all of them are written to a file."""


@dataclass(frozen=True)
class PredictResult:
    """What `predict` found.

    Attributes
    ----------
    checkpoint : Path
        The dense checkpoint or the factors.
    tuned : Path or None
        The tuned file.
    task : str
        A value of ``--task``.
    classes : tuple of str or None
        Class names in the order of the head's outputs.
    examples : int
        NewPictures or texts.
    rows : tuple of dict
        One an example; the first `SHOWN` of them where all are in the output.
    settings : mapping of str to SourcedSetting
        What the predictions depend on, and where each came from.
    output : Path or None
        The file of all rows, or the folder of maps.
    """

    checkpoint: Path
    tuned: Path | None
    task: str
    classes: tuple[str, ...] | None
    examples: int
    rows: tuple[dict[str, Any], ...]
    settings: Mapping[str, SourcedSetting] = field(default_factory=dict)
    output: Path | None = None


def predict(
    checkpoint: str | os.PathLike[str],
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    tuned: str | os.PathLike[str] | None = None,
    task: str | None = None,
    model: str = "auto",
    base: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    top: int = 3,
    device: str = "auto",
    trust_remote_code: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
    **options: Any,
) -> PredictResult:
    """Say what a model makes of new pictures or texts.

    Inputs are prepared as `svftool.evaluate` prepares them.

    Parameters
    ----------
    checkpoint : path-like
        A dense checkpoint, such as a merged one, or a factor checkpoint.
    inputs : path-like or sequence of path-like
        Pictures, or folders of them; files of texts (JSONL, CSV, plain lines), or folders of them.
    tuned : path-like, optional
        The tuned file to put on the factors' base, or an adapter in any layout.
    task : str, optional
        ``classification``, ``text-classification``, ``segmentation`` or ``language``; by default
        what the weights were trained for, or what ``config.json`` and the inputs suggest.
    model : str
        See `svftool.models.build_model`.
    base : path-like, optional
        Where the factors' base is, if not at its recorded place.
    output : path-like, optional
        ``.jsonl`` or ``.csv`` for all rows; for segmentation a folder of maps as PNG.
    top : int
        Classes, or next tokens, in a row.
    device : str
        ``auto``, ``cpu``, ``cuda`` or ``cuda:INDEX``.
    trust_remote_code : bool
        Whether code that lies beside the checkpoint may run.
    force : bool
        Replace an existing output once the new one is complete.
    progress : Progress
        Told how far the work is.
    options
        The task's own, as for `svftool.evaluate`: ``classes``, ``image_size``, ``tokenizer`` ...

    Returns
    -------
    PredictResult

    Raises
    ------
    UsageError
        If options contradict each other or the output exists.
    DataError
        If an input cannot be read, or the classes are not those of the head.
    ModelError
        If the model cannot be built, or has no head.
    FactorsError, CheckpointError
        If factors, base or tuned file are broken or do not belong together.
    """
    if top < 1:
        raise UsageError(f"--top is {top}, expected at least 1")
    places = [Path(inputs)] if isinstance(inputs, (str, os.PathLike)) else [*map(Path, inputs)]
    if not places:
        raise UsageError("no inputs, expected pictures, texts, or folders of them")
    place = pick_device(device)
    target = None if output is None else Path(output)
    with ExitStack() as stack:
        source = open_source(stack, Path(checkpoint), tuned, base, progress, model=model)
        task = _task(task, source, places)
        if target is not None:
            check_predictions_name(target, folder=TASKS[task].pictured)
        given = dict(options)
        _check_options(task, given)
        options = {**recorded(task, source.said_for(task).data), **options}
        fresh = build_model(
            model,
            checkpoint=source.checkpoint,
            trust_remote_code=trust_remote_code,
            strict=source.store is not None,
        )
        facts = facts_of(source, task, fresh, trust_remote_code=trust_remote_code)
        examples = _EXAMPLES[task](places, source, facts, options, fresh)
        writer = stack.enter_context(
            _writer(target, task, top, force=force, inputs=[*source.paths, *places])
        )
        kept: list[dict[str, Any]] = []
        with explain_out_of_memory(None):
            live = fit(source, examples.classes, examples.draw, fresh.to(place), progress)
            with progress.task("predict", total=len(examples), unit="examples") as bar:
                for row in examples.rows(live, top=top, folder=writer.folder):
                    writer.write(row)
                    if target is None or len(kept) < SHOWN:
                        kept.append(row)
                    bar.advance(1)
        origins = origins_of(source, task, facts, given)
        return PredictResult(
            checkpoint=source.path,
            tuned=source.tuned_path,
            task=task,
            classes=examples.classes,
            examples=len(examples),
            rows=tuple(kept),
            settings=settings_of(
                task,
                examples.describe(),
                origins,
                examples=SourcedSetting(len(examples), "data"),
                classes=classes_setting(source, examples.classes, given, otherwise="model"),
            ),
            output=target,
        )


def _task(asked: str | None, source: Source, inputs: Sequence[Path]) -> str:
    """Return what is to be predicted: as asked, as trained, or as config and inputs suggest."""
    trained = source.stated.task
    if asked is not None and source.tuned is not None and trained not in (None, asked):
        raise UsageError(f"{source.tuned.path}: was trained for --task {trained}, not {asked}")
    kind = str((source.checkpoint.config or {}).get("architectures"))
    guessed = "classification"
    if "Segmentation" in kind:
        guessed = "segmentation"
    elif "SequenceClassification" in kind:
        guessed = "text-classification"
    elif "LM" in kind or all(one.suffix.lower() in TEXTS for one in inputs):
        guessed = "language"
    task = asked or trained or guessed
    if task not in _EXAMPLES:
        raise UsageError(
            f"--task {task}: nothing to predict without supports, expected one of "
            f"{', '.join(_EXAMPLES)}. See 'svftool evaluate --predictions'"
        )
    return task


def _check_options(task: str, given: Mapping[str, Any]) -> None:
    """Refuse options of another task."""
    own = dict(options_in(TASKS[task]))
    for name in given:
        if name not in own:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} has no meaning for --task {task}, expected none")


def _named(source: Source, given: Any) -> tuple[str, ...] | None:
    """Return the class names: those given, which must be those of training, or those known."""
    known = known_classes(source)
    if given is None:
        return known
    names = class_names([], given)
    if source.stated.classes not in (None, names):
        raise DataError(
            f"{source.paths[-1]}: was trained on the classes {shortlist(known or ())}, --classes "
            f"has {shortlist(names)}, expected the same in the same order. Leave --classes out"
        )
    return names


def _normalised(found: Preprocessing, chosen: ImageOptions) -> Preprocessing:
    return with_normalisation(found, chosen.mean, chosen.std)


def _pictures(
    inputs: Sequence[Path],
    source: Source,
    facts: ModelFacts,
    options: Mapping[str, Any],
    model: nn.Module,
) -> Unlabelled:
    chosen = ClassificationOptions(**options)
    pictures = list_pictures(inputs)
    preprocessing = _normalised(facts.preprocessing, chosen)
    trained = ImageView.from_plain(facts.trained, preprocessing)
    paths = [one.path for one in pictures]
    view = choose_view(paths, preprocessing, size=chosen.image_size, trained=trained)
    side = TextSide(facts.folder, facts.trust_remote_code)
    return NewPictures(pictures, chosen, view, _named(source, chosen.classes), model, side)


def _scenes(
    inputs: Sequence[Path],
    source: Source,
    facts: ModelFacts,
    options: Mapping[str, Any],
    model: nn.Module,
) -> Unlabelled:
    chosen = SegmentationOptions(**options)
    pictures = list_pictures(inputs)
    unlike_names(pictures)
    preprocessing = _normalised(facts.preprocessing, chosen)
    view = choose_dense_view(
        [one.path for one in pictures],
        preprocessing,
        size=chosen.image_size,
        ignore=chosen.ignore_index,
        trained=facts.trained,
    )
    return NewScenes(pictures, chosen, view, _named(source, chosen.classes), model)


def _prompts(
    inputs: Sequence[Path],
    source: Source,
    facts: ModelFacts,
    options: Mapping[str, Any],
    model: nn.Module,
) -> Unlabelled:
    task = Language(
        list_prompts(inputs),
        config=facts.config,
        trust_remote_code=facts.trust_remote_code,
        **{"tokenizer": facts.folder, **options},
    )
    return NewTexts(task)


def _messages(
    inputs: Sequence[Path],
    source: Source,
    facts: ModelFacts,
    options: Mapping[str, Any],
    model: nn.Module,
) -> Unlabelled:
    chosen = TextClassificationOptions(**options)
    encoding = encoding_of(
        chosen, facts.config, facts.folder, trust_remote_code=facts.trust_remote_code
    )
    return NewMessages(
        list_prompts(inputs, column=chosen.text_column),
        chosen,
        encoding,
        pooling_of(chosen, facts.folder),
        _named(source, chosen.classes),
        model,
    )


_EXAMPLES = {
    "classification": _pictures,
    "text-classification": _messages,
    "segmentation": _scenes,
    "language": _prompts,
}


class _Writer(Protocol):
    """Where rows go."""

    folder: Path | None

    def write(self, row: Mapping[str, Any]) -> None:
        """Add one row."""


@dataclass
class _Nowhere:
    folder: Path | None = None

    def write(self, row: Mapping[str, Any]) -> None:
        """Leave it."""


@dataclass
class _Lines:
    file: IO[str]
    folder: Path | None = None

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a line of JSON."""
        self.file.write(json.dumps(row, ensure_ascii=False) + "\n")


class _Table:
    folder: Path | None = None

    def __init__(self, file: IO[str], task: str, top: int) -> None:
        self._file = csv.DictWriter(file, _columns(task, top), extrasaction="ignore")
        self._file.writeheader()

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row, its lists as numbered columns."""
        flat = {
            f"{name}_{number}": value
            for many in row.values()
            if isinstance(many, list)
            for number, one in enumerate(many, 1)
            for name, value in one.items()
        }
        self._file.writerow({**row, **flat})


def _columns(task: str, top: int) -> list[str]:
    own = ["file", "line", "text", "tokens", "loss", "perplexity"]
    name = "token"
    if task == "classification":
        own, name = ["file", "prediction", "probability"], "name"
    if task == "text-classification":
        own, name = ["file", "line", "text", "prediction", "probability"], "name"
    return own + [f"{one}_{n}" for n in range(1, top + 1) for one in (name, "probability")]


@contextmanager
def _writer(
    target: Path | None, task: str, top: int, *, force: bool, inputs: Sequence[Path]
) -> Iterator[_Writer]:
    """Hold the output until all of it is there."""
    if target is None:
        yield _Nowhere()
        return
    with replace_output(target, force=force, inputs=inputs) as partial:
        if TASKS[task].pictured:
            partial.mkdir()
            yield _Nowhere(partial)
            return
        with partial.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            yield _Table(file, task, top) if target.suffix == ".csv" else _Lines(file)
