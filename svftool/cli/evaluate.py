"""``svftool evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from svftool.cli.common import (
    DeviceOption,
    ForceOption,
    JsonOption,
    QuietOption,
    VerboseOption,
    emit,
)
from svftool.cli.console import progress_for
from svftool.cli.task_options import (
    CLASSIFICATION,
    AlignmentOption,
    FeaturesOption,
    FoldOption,
    HeadTypeOption,
    HostOption,
    IgnoreIndexOption,
    ImagesOption,
    InnerFoldOption,
    ListsOption,
    MasksOption,
    MaskSuffixOption,
    OutputStrideOption,
    RemoveNovelOption,
    SequenceLengthOption,
    StartOption,
    SwapSupportsOption,
    TestEpisodesOption,
    TestShotsOption,
    TokenizerOption,
    WidthOption,
    numbers,
    options_of,
)

NAME = "evaluate"
EXAMPLE = (
    "Example: svftool evaluate factors --tuned birds.svf.safetensors --data test "
    "--model timm:resnet50 --predictions birds.jsonl"
)

IMAGES = "Images"


def command(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="Dense checkpoint, or factors from 'svftool decompose'."),
    ],
    *,
    data: Annotated[
        Path,
        typer.Option(help="What to measure on, in a form that 'svftool finetune' takes."),
    ],
    tuned: Annotated[
        Path | None,
        typer.Option(
            help="Tuned file to put on the factors' base.", show_default="the base itself"
        ),
    ] = None,
    task: Annotated[
        Literal["classification", "segmentation", "language", "few-shot-segmentation"],
        typer.Option(help="What is measured."),
    ] = "classification",
    model: Annotated[
        str,
        typer.Option(
            metavar="SPEC",
            help="auto (by config.json), timm:NAME, torchvision:NAME, FILE.py:FACTORY or "
            "package.module:FACTORY.",
        ),
    ] = "auto",
    base: Annotated[
        Path | None, typer.Option(help="The checkpoint that was decomposed, where it has moved.")
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Leave out what a fine-tune with as many shots and the same seed was trained on; "
            "in few-shot segmentation supports of an episode.",
            show_default="none, or 1",
        ),
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option("--eval", help="Measure on this; --data gives the classes alone."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The fine-tune's seed, for --shots.")] = 0,
    predictions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help="Write one line an example; pictures go to a folder beside it.",
        ),
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(
            help="Text file of class names in the order of the head's outputs.",
            show_default="the tuned file's, config.json's, or sorted",
            rich_help_panel=CLASSIFICATION,
        ),
    ] = None,
    head: Annotated[
        Literal["auto", "keep", "new"] | None,
        typer.Option(
            help="As in the fine-tune: whether its head was the checkpoint's.",
            show_default="auto",
            rich_help_panel=CLASSIFICATION,
        ),
    ] = None,
    head_name: Annotated[
        str | None,
        typer.Option(
            help="Module that is the head.", show_default="found", rich_help_panel=CLASSIFICATION
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            help="Pixels a side.",
            show_default="by checkpoint and data",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    mean: Annotated[
        tuple[float, float, float] | None,
        typer.Option(
            help="Of the channels, from 0 to 1.",
            show_default="the tuned file's or the checkpoint's",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    std: Annotated[
        tuple[float, float, float] | None,
        typer.Option(
            help="Of the channels.",
            show_default="the tuned file's or the checkpoint's",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    head_type: HeadTypeOption = None,
    images: ImagesOption = None,
    masks: MasksOption = None,
    mask_suffix: MaskSuffixOption = None,
    ignore_index: IgnoreIndexOption = None,
    tokenizer: TokenizerOption = None,
    sequence_length: SequenceLengthOption = None,
    host: HostOption = None,
    start: StartOption = None,
    fold: FoldOption = None,
    inner_fold: InnerFoldOption = None,
    test_shots: TestShotsOption = None,
    lists: ListsOption = None,
    remove_novel: RemoveNovelOption = None,
    features: FeaturesOption = None,
    output_stride: OutputStrideOption = None,
    width: WidthOption = None,
    test_episodes: TestEpisodesOption = None,
    alignment: AlignmentOption = None,
    swap_supports: SwapSupportsOption = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that lies beside the checkpoint.")
    ] = False,
    device: DeviceOption = "auto",
    force: ForceOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Measure a checkpoint, or factors with a tuned file, on a data set."""
    from svftool.report import evaluate as report
    from svftool.stages.evaluate import evaluate

    result = evaluate(
        checkpoint,
        data=data,
        tuned=tuned,
        task=task,
        model=model,
        base=base,
        seed=seed,
        device=device,
        predictions=predictions,
        trust_remote_code=trust_remote_code,
        force=force,
        progress=progress_for(quiet=quiet, verbose=verbose),
        **options_of(
            task,
            {
                "shots": [shots] if shots and task == "few-shot-segmentation" else shots,
                "evaluation": evaluation,
                "classes": classes,
                "head": head,
                "head_name": head_name,
                "image_size": image_size,
                "mean": mean,
                "std": std,
                "head_type": head_type,
                "images": images,
                "masks": masks,
                "mask_suffix": mask_suffix,
                "ignore_index": ignore_index,
                "tokenizer": tokenizer,
                "sequence_length": sequence_length,
                "host": host,
                "start": start,
                "folds": None if fold is None else numbers("fold", fold),
                "inner": inner_fold,
                "test_shots": None if test_shots is None else numbers("test-shots", test_shots),
                "lists": lists,
                "remove_novel": remove_novel,
                "features": features,
                "output_stride": output_stride,
                "width": width,
                "test_episodes": test_episodes,
                "alignment": alignment,
                "swap_supports": swap_supports,
            },
        ),
    )
    emit(report.document(result), report.view(result), as_json=json)
