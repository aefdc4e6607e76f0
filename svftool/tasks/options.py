"""The options of each task, each declared once.

A field of a task's dataclass is an option of ``svftool finetune``, and of ``svftool evaluate``
where it says so. Flags, help panels, what a tuned file records and what `svftool.finetune` takes
all come from here. No module of a task is imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

from svftool.choices.training import UNMEASURED
from svftool.errors import UsageError
from svftool.tasks.option import (
    Option,
    TaskOptions,
    flag_of,
    option,
    options_in,
    read_count,
    read_counts,
    read_numbers,
)

StrPath = str | os.PathLike[str]
AugmentName = Literal["none", "light", "strong"]

CLASSIFICATION, FEW_SHOT = "Classification", "Few-shot segmentation"
LANGUAGE, SEGMENTATION, IMAGES = "Language", "Segmentation", "Images"
TEXTS = "Text classification"


SHOTS = Option(
    help="Examples a class to train on; in few-shot segmentation supports of an episode, several "
    "as 1,5.",
    shown="all, or 1",
    metavar="N",
    type=str,
    evaluate=True,
    evaluate_help="Leave out what a fine-tune with as many shots and the same seed was trained "
    "on; in few-shot segmentation supports of an episode.",
    evaluate_shown="none, or 1",
)
IMAGE_SIZE = Option(
    help="Pixels a side.", shown="by checkpoint and data", panel=IMAGES, evaluate=True
)
FEATURES = Option(
    help="Modules that give the middle features and the high one; for segmentation the one whose "
    "map the head is put on.",
    shown="by the backbone's family",
    metavar="NAME,NAME[,NAME]",
    panel=FEW_SHOT,
    recorded="features",
    evaluate=True,
)
HEAD_NAME = Option(
    help="Module that is the head.",
    shown="found",
    panel=CLASSIFICATION,
    recorded="head_name",
    evaluate=True,
)
HEAD_TYPE = Option(
    help="Kind of a new head: linear or cosine for classification; linear, fcn or deeplab on a "
    "backbone for segmentation.",
    panel=CLASSIFICATION,
    recorded="head_type",
    evaluate=True,
)
HEAD_INIT = Option(
    help="Start of a new head: the means of each class's examples; the classes' names, which needs "
    "no example, and for images a model with a text side; or random weights.",
    panel=CLASSIFICATION,
    recorded="head_init",
    evaluate=True,
    evaluate_help="names makes a head that was not trained, out of the classes' names.",
    evaluate_shown="as trained",
)
TOKENIZER = Option(
    help="Folder of the model's tokenizer.",
    shown="the checkpoint's",
    type=Path,
    panel=LANGUAGE,
    evaluate=True,
)


@dataclass(frozen=True, kw_only=True)
class SplitOptions(TaskOptions):
    """Options of tasks that measure with what the shots left over, or with data of its own.

    Without `shots` every example is trained on, which needs `evaluation`; ``"none"`` says that
    nothing is to be measured.
    """

    shots: int | None = option(None, SHOTS, read=read_count)
    evaluation: StrPath | None = option(
        None,
        help="Data to measure with; none measures nothing.",
        flag="--eval",
        shown="what --shots left over",
        type=Path,
        evaluate=True,
        evaluate_help="Measure on this; --data gives the classes alone.",
        evaluate_shown="",
    )
    hold_out: float = option(
        0.0,
        help="Share of the shots that chooses the best weights; 0 keeps the last ones.",
        shown="0",
        limits=(0, 0.9),
        panel=CLASSIFICATION,
    )

    @property
    def measured(self) -> bool:
        """Whether there is a query set."""
        return self.evaluation is None or os.fspath(self.evaluation) != UNMEASURED

    @property
    def query_data(self) -> Path | None:
        """The data to measure with; None for what the shots left over, or for nothing."""
        return Path(self.evaluation) if self.evaluation is not None and self.measured else None


@dataclass(frozen=True, kw_only=True)
class ImageOptions(TaskOptions):
    """Options of tasks on images.

    `image_size`, `mean` and `std` override the checkpoint's own; see
    `svftool.tasks.views.choose_view`, `svftool.tasks.segmentation.views.choose_dense_view`.
    `augment` may be a function, too; see `svftool.tasks.views.ImageView.augmented`.
    """

    image_size: int | None = option(None, IMAGE_SIZE)
    mean: tuple[float, ...] | None = option(
        None,
        help="Of the channels, from 0 to 1.",
        shown="as trained, or ImageNet's",
        type=tuple[float, float, float],
        panel=IMAGES,
        recorded="mean",
        evaluate=True,
    )
    std: tuple[float, ...] | None = option(
        None,
        help="Of the channels.",
        shown="as trained, or ImageNet's",
        type=tuple[float, float, float],
        panel=IMAGES,
        recorded="std",
        evaluate=True,
    )
    augment: AugmentName | Callable[..., Any] = option(
        "light",
        help="light crops and flips (few-shot segmentation: flips); strong distorts besides.",
        type=AugmentName,
        panel=IMAGES,
    )


@dataclass(frozen=True, kw_only=True)
class ClassesOptions(TaskOptions):
    """Options of tasks whose head has one output a class.

    `classes` may be the names themselves. Classification sorts those of the data by default.
    Segmentation looks for ``classes.txt`` beside the images, then at the checkpoint's
    ``config.json``, and else counts the labels (`svftool.tasks.segmentation.pairs.read_classes`).
    """

    classes: StrPath | Sequence[str] | None = option(
        None,
        help="Text file of class names in the order of the head's outputs.",
        shown="sorted",
        type=Path,
        panel=CLASSIFICATION,
        evaluate=True,
        evaluate_shown="the tuned file's, config.json's, or sorted",
    )
    head: Literal["auto", "keep", "new"] = option(
        "auto",
        help="auto keeps the checkpoint's head where it is for the data's classes.",
        panel=CLASSIFICATION,
        recorded="head",
        evaluate=True,
        evaluate_help="Whether the fine-tune's head was the checkpoint's.",
        evaluate_shown="as trained",
    )
    head_name: str | None = option(None, HEAD_NAME)


@dataclass(frozen=True, kw_only=True)
class ClassifierOptions(ClassesOptions, SplitOptions):
    """Options of tasks with one class an example; see `svftool.tasks.labelled`."""

    head_type: Literal["linear", "cosine"] = option("linear", HEAD_TYPE)
    head_init: Literal["means", "names", "random"] = option("means", HEAD_INIT)
    sampling: Literal["uniform", "balanced"] = option(
        "uniform",
        help="balanced shows every class equally often, however many examples it has.",
        panel=CLASSIFICATION,
    )


@dataclass(frozen=True, kw_only=True)
class ClassificationOptions(ClassifierOptions, ImageOptions):
    """Options of `svftool.tasks.classification.Classification`.

    The tokenizer is that of a model with a text side, for a head that starts from names.
    """

    task = "classification"

    tokenizer: StrPath | None = option(None, TOKENIZER)


@dataclass(frozen=True, kw_only=True)
class TextClassificationOptions(ClassifierOptions):
    """Options of `svftool.tasks.text_classification.TextClassification`."""

    task = "text-classification"

    text_column: str | None = option(
        None,
        help="Column, or key, of the texts.",
        shown="text",
        metavar="NAME",
        panel=TEXTS,
        recorded="text_column",
        evaluate=True,
    )
    label_column: str | None = option(
        None,
        help="Column, or key, of the classes' names.",
        shown="the other of two, or label",
        metavar="NAME",
        panel=TEXTS,
        recorded="label_column",
        evaluate=True,
    )
    max_length: int | None = option(
        None,
        help="Tokens of a text that the model sees; what is longer is cut.",
        shown="the model's limit, at most 512",
        metavar="TOKENS",
        limits=(1, None),
        panel=TEXTS,
        recorded="max_length",
        evaluate=True,
    )
    pooling: Literal["mean", "cls"] | None = option(
        None,
        help="Features of an encoder without a head: the mean over the tokens, or the first one.",
        shown="the checkpoint's, or mean",
        panel=TEXTS,
        recorded="pooling",
        evaluate=True,
    )
    tokenizer: StrPath | None = option(None, TOKENIZER)

    def __post_init__(self) -> None:
        super().__post_init__()
        texts, labels = self.text_column, self.label_column
        if texts is not None and labels is not None and _plain(texts) == _plain(labels):
            raise UsageError(
                f"--text-column and --label-column both name {labels!r}, expected two columns"
            )


def _plain(column: str) -> str:
    """Return the name of a column as columns are compared."""
    return column.strip().lower()


@dataclass(frozen=True, kw_only=True)
class SegmentationOptions(ClassesOptions, ImageOptions, SplitOptions):
    """Options of `svftool.tasks.segmentation.Segmentation`."""

    task = "segmentation"
    pictured = True

    head_type: Literal["linear", "fcn", "deeplab"] = option("linear", HEAD_TYPE)
    images: str = option(
        "images",
        help="Folder of images in the data.",
        metavar="NAME",
        panel=SEGMENTATION,
        evaluate=True,
    )
    masks: str = option(
        "masks",
        help="Folder of label maps in the data.",
        metavar="NAME",
        panel=SEGMENTATION,
        evaluate=True,
    )
    mask_suffix: str = option(
        "",
        help="What the maps' names have more than the images'.",
        metavar="_L",
        panel=SEGMENTATION,
        evaluate=True,
    )
    ignore_index: int = option(
        255,
        help="Label of pixels without a class.",
        panel=SEGMENTATION,
        recorded="ignore_index",
        evaluate=True,
    )
    features: str | None = option(None, FEATURES)


@dataclass(frozen=True, kw_only=True)
class LanguageOptions(SplitOptions):
    """Options of `svftool.tasks.language.Language`."""

    task = "language"

    head_name: str | None = option(None, HEAD_NAME)
    tokenizer: StrPath | None = option(None, TOKENIZER)
    sequence_length: int | None = option(
        None,
        help="Tokens that the model sees at once; longer texts are cut in blocks.",
        shown="the model's limit, at most 1024",
        panel=LANGUAGE,
        recorded="sequence_length",
        evaluate=True,
    )
    gradient_checkpointing: bool = option(
        False,
        help="Compute activations twice instead of keeping them: less memory, slower steps.",
        flag="--gradient-checkpointing",
        panel=LANGUAGE,
    )


@dataclass(frozen=True, kw_only=True)
class FewShotOptions(ImageOptions):
    """Options of few-shot segmentation: the data, the host, the episodes, how models are chosen.

    `image_size` is the side of the canvases, rounded to ``8 k + 1``: 473 by default, 641 on
    COCO-20i. With `inner`, a fold whose classes stand in for the novel ones, those of `folds` take
    no part. ``augment="strong"`` scales, rotates, blurs, mirrors and crops as the papers do, so
    that nothing is kept between epochs.
    """

    task = "few-shot-segmentation"
    pictured = True

    shots: Sequence[int] = option((1,), SHOTS, read=read_counts, recorded="shots")
    image_size: int | None = option(None, IMAGE_SIZE, recorded="image_size")
    host: Literal["baseline", "pfenet", "bam"] = option(
        "baseline",
        help="What turns features into masks.",
        panel=FEW_SHOT,
        recorded="host",
        evaluate=True,
    )
    start: Literal["nearest", "blank"] | None = option(
        None,
        help="The baseline host learns what to add to the nearest prototype, or everything, as "
        "published.",
        shown="nearest",
        panel=FEW_SHOT,
        recorded="start",
        evaluate=True,
    )
    base_steps: int | None = option(
        None,
        help="Training of BAM's base learner, unless the checkpoint brings its own.",
        shown="400",
        metavar="STEPS",
        limits=(1, None),
        panel=FEW_SHOT,
        recorded="base_steps",
        evaluate=True,
    )
    folds: Sequence[int] = option(
        (0,),
        help="Folds to run.",
        flag="--fold",
        metavar="0,1,2,3",
        type=str,
        read=read_numbers,
        panel=FEW_SHOT,
        recorded="fold",
        evaluate=True,
    )
    inner: int | None = option(
        None,
        help="Test on this fold's classes and leave those of --fold out altogether, to make "
        "choices without a look at them.",
        flag="--inner-fold",
        panel=FEW_SHOT,
        recorded="inner_fold",
        evaluate=True,
    )
    test_shots: Sequence[int] = option(
        (),
        help="Further shots to test each model with.",
        metavar="5",
        type=str,
        read=read_numbers,
        panel=FEW_SHOT,
        evaluate=True,
    )
    lists: Path | None = option(
        None,
        help="Folder of list files of PFENet, BAM, HSNet or FSS-1000.",
        shown="the data set's own",
        panel=FEW_SHOT,
        evaluate=True,
    )
    remove_novel: bool = option(
        False,
        help="Leave out training images that hold novel classes, as BAM and SVF do.",
        flag="--remove-novel/--keep-novel",
        shown="keep",
        panel=FEW_SHOT,
        recorded="removed_images_with_novel_classes",
        evaluate=True,
    )
    features: str | None = option(None, FEATURES)
    output_stride: int | None = option(
        None,
        help="Pixels a feature; strides beyond become dilation.",
        shown="8, VGG-16 16",
        panel=FEW_SHOT,
        recorded="output_stride",
        evaluate=True,
    )
    width: int | None = option(
        None,
        help="Channels of the host.",
        shown="256, or a third of the features",
        panel=FEW_SHOT,
        recorded="width",
        evaluate=True,
    )
    test_episodes: int = option(
        1000,
        help="Test episodes a fold.",
        panel=FEW_SHOT,
        recorded="test_episodes",
        evaluate=True,
    )
    select_episodes: int = option(100, help="Episodes that weights are chosen by.", panel=FEW_SHOT)
    # Nothing is chosen where nothing is trained: no images need be held out.
    select_on: Literal["base", "novel", "last"] = option(
        "base",
        help="Choose weights on held-out images of base classes, on novel classes as the papers' "
        "code does, or take the last.",
        panel=FEW_SHOT,
        evaluate_as="last",
    )
    alignment: Literal["content", "canvas"] = option(
        "content",
        help="canvas scores as the papers' code does, a little beside the picture.",
        panel=FEW_SHOT,
        recorded="alignment",
        evaluate=True,
    )
    swap_supports: bool = option(
        False,
        help="Test once more with supports of another class, to see how much the model goes by "
        "them.",
        flag="--swap-supports/--keep-supports",
        shown="keep",
        panel=FEW_SHOT,
        evaluate=True,
    )
    overlays: Path | None = option(
        None,
        help="Write test episodes of every run as PNG: supports, truth, prediction.",
        metavar="FOLDER",
        panel=FEW_SHOT,
    )
    overlay_count: int | None = option(None, help="How many a run.", shown="12", panel=FEW_SHOT)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_numbers()
        self._require_host("start", "baseline")
        self._require_host("base_steps", "bam")
        if self.overlay_count is not None and self.overlays is None:
            raise UsageError("--overlay-count has no meaning without --overlays")
        stride = self.output_stride
        if stride is not None and (stride < 1 or stride & (stride - 1)):
            raise UsageError(
                f"--output-stride is {stride}, expected a power of two such as 8, 16 or 32"
            )

    def _check_numbers(self) -> None:
        for flag, values in (("--fold", self.folds), ("--shots", self.shots)):
            if not values or len(set(values)) < len(values):
                raise UsageError(f"{flag} {','.join(map(str, values))}: expected each number once")
        if min(self.shots) < 1:
            raise UsageError(f"--shots {min(self.shots)}: expected at least 1")
        if any(shots < 1 for shots in self.test_shots):
            raise UsageError(f"--test-shots is {min(self.test_shots)}, expected at least 1")
        for name in ("test_episodes", "select_episodes", "width", "image_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{flag_of(type(self), name)} is {value}, expected at least 1")

    def _require_host(self, name: str, owner: str) -> None:
        if getattr(self, name) is not None and self.host != owner:
            flag = flag_of(type(self), name)
            raise UsageError(f"{flag} has no meaning for --host {self.host}, only for {owner}")


TASKS: dict[str, type[TaskOptions]] = {
    kind.task: kind
    for kind in (
        ClassificationOptions,
        TextClassificationOptions,
        SegmentationOptions,
        LanguageOptions,
        FewShotOptions,
    )
}
"""The options of each task, by the value of ``--task``."""


def recorded(task: str, described: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that a task was trained with, as far as its metrics depend on them.

    Parameters
    ----------
    task : str
        One of `TASKS`.
    described : mapping
        What `Task.describe` said then.

    Examples
    --------
    >>> recorded("classification", {"shots": 5, "mean": [0.5], "head_type": "cosine"})
    {'mean': (0.5,), 'head_type': 'cosine'}
    """
    hints = get_type_hints(TASKS[task])
    return {
        name: _as_field(described[about.recorded], hints[name])
        for name, about in options_in(TASKS[task])
        if about.recorded is not None and described.get(about.recorded) is not None
    }


def _as_field(value: Any, hint: Any) -> Any:
    """Turn a described value into the option's own: one number of several, a count into a yes."""
    if hint is bool:
        return bool(value)
    if hint == Sequence[int]:
        return [value]
    return tuple(value) if isinstance(value, list) else value
