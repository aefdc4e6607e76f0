"""Options of single tasks, and which of them belongs to which task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from svftool.errors import UsageError

CLASSIFICATION, FEW_SHOT = "Classification", "Few-shot segmentation"
LANGUAGE, SEGMENTATION, IMAGES = "Language", "Segmentation", "Images"

TaskOption = Annotated[
    Literal["classification", "segmentation", "language", "few-shot-segmentation"],
    typer.Option(help="Kind of data, loss and metrics."),
]
HeadNameOption = Annotated[
    str | None,
    typer.Option(
        help="Module that is the head.", show_default="found", rich_help_panel=CLASSIFICATION
    ),
]
ImageSizeOption = Annotated[
    int | None,
    typer.Option(
        help="Pixels a side.", show_default="by checkpoint and data", rich_help_panel=IMAGES
    ),
]
MeanOption = Annotated[
    tuple[float, float, float] | None,
    typer.Option(
        help="Of the channels, from 0 to 1.",
        show_default="as trained, or ImageNet's",
        rich_help_panel=IMAGES,
    ),
]
StdOption = Annotated[
    tuple[float, float, float] | None,
    typer.Option(
        help="Of the channels.", show_default="as trained, or ImageNet's", rich_help_panel=IMAGES
    ),
]
ImagesOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Folder of images in the data.",
        show_default="images",
        rich_help_panel=SEGMENTATION,
    ),
]
MasksOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Folder of label maps in the data.",
        show_default="masks",
        rich_help_panel=SEGMENTATION,
    ),
]
MaskSuffixOption = Annotated[
    str | None,
    typer.Option(
        metavar="_L",
        help="What the maps' names have more than the images'.",
        rich_help_panel=SEGMENTATION,
    ),
]
IgnoreIndexOption = Annotated[
    int | None,
    typer.Option(
        help="Label of pixels without a class.", show_default="255", rich_help_panel=SEGMENTATION
    ),
]
HeadTypeOption = Annotated[
    Literal["linear", "cosine", "fcn", "deeplab"] | None,
    typer.Option(
        help="Kind of a new head: linear or cosine for classification; linear, fcn or deeplab on a "
        "backbone for segmentation.",
        show_default="linear",
        rich_help_panel=CLASSIFICATION,
    ),
]
SamplingOption = Annotated[
    Literal["uniform", "balanced"] | None,
    typer.Option(
        help="balanced shows every class equally often, however many images it has.",
        show_default="uniform",
        rich_help_panel=CLASSIFICATION,
    ),
]

TokenizerOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the model's tokenizer.",
        show_default="the checkpoint's",
        rich_help_panel=LANGUAGE,
    ),
]
SequenceLengthOption = Annotated[
    int | None,
    typer.Option(
        help="Tokens that the model sees at once; longer texts are cut in blocks.",
        show_default="the model's limit, at most 1024",
        rich_help_panel=LANGUAGE,
    ),
]
GradientCheckpointingOption = Annotated[
    bool | None,
    typer.Option(
        "--gradient-checkpointing",
        help="Compute activations twice instead of keeping them: less memory, slower steps.",
        rich_help_panel=LANGUAGE,
    ),
]

HostOption = Annotated[
    Literal["baseline", "pfenet", "bam"] | None,
    typer.Option(
        help="What turns features into masks.", show_default="baseline", rich_help_panel=FEW_SHOT
    ),
]
StartOption = Annotated[
    Literal["nearest", "blank"] | None,
    typer.Option(
        help="The baseline host learns what to add to the nearest prototype, or everything, as "
        "published.",
        show_default="nearest",
        rich_help_panel=FEW_SHOT,
    ),
]
BaseStepsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="STEPS",
        help="Training of BAM's base learner, unless the checkpoint brings its own.",
        show_default="400",
        rich_help_panel=FEW_SHOT,
    ),
]
FoldOption = Annotated[
    str | None,
    typer.Option(
        metavar="0,1,2,3", help="Folds to run.", show_default="0", rich_help_panel=FEW_SHOT
    ),
]
InnerFoldOption = Annotated[
    int | None,
    typer.Option(
        help="Test on this fold's classes and leave those of --fold out altogether, to make "
        "choices without a look at them.",
        rich_help_panel=FEW_SHOT,
    ),
]
TestShotsOption = Annotated[
    str | None,
    typer.Option(
        metavar="5", help="Further shots to test each model with.", rich_help_panel=FEW_SHOT
    ),
]
ListsOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder of list files of PFENet, BAM, HSNet or FSS-1000.",
        show_default="the data set's own",
        rich_help_panel=FEW_SHOT,
    ),
]
RemoveNovelOption = Annotated[
    bool | None,
    typer.Option(
        "--remove-novel/--keep-novel",
        help="Leave out training images that hold novel classes, as BAM and SVF do.",
        show_default="keep",
        rich_help_panel=FEW_SHOT,
    ),
]
FeaturesOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,NAME[,NAME]",
        help="Modules that give the middle features and the high one; for segmentation the one "
        "whose map the head is put on.",
        show_default="by the backbone's family",
        rich_help_panel=FEW_SHOT,
    ),
]
OutputStrideOption = Annotated[
    int | None,
    typer.Option(
        help="Pixels a feature; strides beyond become dilation.",
        show_default="8, VGG-16 16",
        rich_help_panel=FEW_SHOT,
    ),
]
WidthOption = Annotated[
    int | None,
    typer.Option(
        help="Channels of the host.",
        show_default="256, or a third of the features",
        rich_help_panel=FEW_SHOT,
    ),
]
TestEpisodesOption = Annotated[
    int | None,
    typer.Option(help="Test episodes a fold.", show_default="1000", rich_help_panel=FEW_SHOT),
]
SelectEpisodesOption = Annotated[
    int | None,
    typer.Option(
        help="Episodes that weights are chosen by.", show_default="100", rich_help_panel=FEW_SHOT
    ),
]
SelectOnOption = Annotated[
    Literal["base", "novel", "last"] | None,
    typer.Option(
        help="Choose weights on held-out images of base classes, on novel classes as the papers' "
        "code does, or take the last.",
        show_default="base",
        rich_help_panel=FEW_SHOT,
    ),
]
AlignmentOption = Annotated[
    Literal["content", "canvas"] | None,
    typer.Option(
        help="canvas scores as the papers' code does, a little beside the picture.",
        show_default="content",
        rich_help_panel=FEW_SHOT,
    ),
]

OverlaysOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Write test episodes of every run as PNG: supports, truth, prediction.",
        rich_help_panel=FEW_SHOT,
    ),
]
OverlayCountOption = Annotated[
    int | None,
    typer.Option(help="How many a run.", show_default="12", rich_help_panel=FEW_SHOT),
]

SwapSupportsOption = Annotated[
    bool | None,
    typer.Option(
        "--swap-supports/--keep-supports",
        help="Test once more with supports of another class, to see how much the model goes by "
        "them.",
        show_default="keep",
        rich_help_panel=FEW_SHOT,
    ),
]

BELONGING = {
    "classification": frozenset(
        {
            "shots", "evaluation", "classes", "head", "head_name", "image_size", "mean", "std",
            "augment", "hold_out", "head_type", "sampling",
        }
    ),
    "segmentation": frozenset(
        {
            "shots", "evaluation", "classes", "head", "head_name", "head_type", "features",
            "image_size", "mean", "std", "augment", "hold_out", "images", "masks", "mask_suffix",
            "ignore_index",
        }
    ),
    "language": frozenset(
        {
            "shots", "evaluation", "hold_out", "head_name", "tokenizer", "sequence_length",
            "gradient_checkpointing",
        }
    ),
    "few-shot-segmentation": frozenset(
        {
            "shots", "image_size", "mean", "std", "augment", "host", "start", "folds", "inner",
            "lists", "remove_novel", "features", "output_stride", "width", "test_episodes",
            "test_shots", "select_episodes", "select_on", "alignment", "overlays", "overlay_count",
            "swap_supports", "base_steps",
        }
    ),
}  # fmt: skip
"""Options that each task takes, by their names in the library."""

_RENAMED = {"fold": "folds", "inner_fold": "inner"}
"""Options whose names in the library are others than on the command line."""

_NUMBERS = frozenset({"fold", "test_shots"})
"""Options that are several whole numbers in one text."""


def options_of(task: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Take a task's own options out of everything that a command was given.

    Parameters
    ----------
    task : str
        The value of ``--task``.
    given : mapping of str to object
        The command's parameters by name, among them the options of all tasks; None where one was
        not given.

    Raises
    ------
    UsageError
        If an option of another task is given, or numbers are none.
    """
    known = frozenset().union(*BELONGING.values())
    chosen = {}
    for name, value in given.items():
        option = _RENAMED.get(name, name)
        if value is None or option not in known:
            continue
        if option not in BELONGING[task]:
            raise UsageError(f"--{_flag(name)} has no meaning for --task {task}")
        chosen[option] = numbers(_flag(name), value) if name in _NUMBERS else value
    return chosen


def _flag(name: str) -> str:
    return "eval" if name == "evaluation" else name.replace("_", "-")


def numbers(option: str, text: str) -> list[int]:
    """Read whole numbers separated by commas.

    Raises
    ------
    UsageError
        If one is no whole number.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--{option} {text!r}, expected whole numbers such as 1,5") from None
