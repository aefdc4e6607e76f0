"""``svftool evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from svftool.cli.common import (
    DeviceOption,
    ForceOption,
    JsonOption,
    ModelOption,
    MovedBaseOption,
    QuietOption,
    TrustOption,
    VerboseOption,
    emit,
)
from svftool.cli.console import progress_for
from svftool.cli.task_options import (
    CLASSIFICATION,
    AlignmentOption,
    BaseStepsOption,
    FeaturesOption,
    FoldOption,
    HeadNameOption,
    HeadTypeOption,
    HostOption,
    IgnoreIndexOption,
    ImageSizeOption,
    ImagesOption,
    InnerFoldOption,
    ListsOption,
    MasksOption,
    MaskSuffixOption,
    MeanOption,
    OutputStrideOption,
    RemoveNovelOption,
    SequenceLengthOption,
    StartOption,
    StdOption,
    SwapSupportsOption,
    TaskOption,
    TestEpisodesOption,
    TestShotsOption,
    TokenizerOption,
    WidthOption,
    options_of,
)

NAME = "evaluate"
EXAMPLE = (
    "Example: svftool evaluate factors --tuned birds.svf.safetensors --data test "
    "--model timm:resnet50 --predictions birds.jsonl"
)


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
    task: TaskOption = "classification",
    model: ModelOption = "auto",
    base: MovedBaseOption = None,
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
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="The fine-tune's seed, for --shots.",
            show_default="the tuned file's, or 0",
        ),
    ] = None,
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
    head_name: HeadNameOption = None,
    image_size: ImageSizeOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    head_type: HeadTypeOption = None,
    images: ImagesOption = None,
    masks: MasksOption = None,
    mask_suffix: MaskSuffixOption = None,
    ignore_index: IgnoreIndexOption = None,
    tokenizer: TokenizerOption = None,
    sequence_length: SequenceLengthOption = None,
    host: HostOption = None,
    start: StartOption = None,
    base_steps: BaseStepsOption = None,
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
    trust_remote_code: TrustOption = False,
    device: DeviceOption = "auto",
    force: ForceOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Measure a checkpoint, or factors with a tuned file, on a data set."""
    given = locals()
    from svftool.report import evaluate as report
    from svftool.stages.evaluate import evaluate

    several = [shots] if shots and task == "few-shot-segmentation" else shots
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
        **options_of(task, given | {"shots": several}),
    )
    emit(report.document(result), report.view(result), as_json=json)
