"""``svftool finetune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from svftool.cli.common import (
    DeviceOption,
    ExcludeOption,
    ForceOption,
    JsonOption,
    ModelOption,
    MovedBaseOption,
    OutputOption,
    QuietOption,
    TrustOption,
    VerboseOption,
    emit,
    is_first_process,
)
from svftool.cli.console import progress_for
from svftool.cli.task_options import (
    CLASSIFICATION,
    IMAGES,
    AlignmentOption,
    BaseStepsOption,
    FeaturesOption,
    FoldOption,
    GradientCheckpointingOption,
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
    OverlayCountOption,
    OverlaysOption,
    RemoveNovelOption,
    SamplingOption,
    SelectEpisodesOption,
    SelectOnOption,
    SequenceLengthOption,
    StartOption,
    StdOption,
    SwapSupportsOption,
    TaskOption,
    TestEpisodesOption,
    TestShotsOption,
    TokenizerOption,
    WidthOption,
    numbers,
    options_of,
)
from svftool.errors import UsageError

NAME = "finetune"
EXAMPLE = (
    "Example: svftool finetune factors -o birds.svf.safetensors --data images --shots 10 "
    "--model timm:resnet50"
)
SIGNAL_EXIT = 128

TRAINING = "Training"


def command(
    factors: Annotated[Path, typer.Argument(help="Factor checkpoint from 'svftool decompose'.")],
    *,
    output: OutputOption,
    data: Annotated[
        Path,
        typer.Option(
            help="Folder of class folders, CSV of path,label, JSONL of texts, or a segmentation "
            "data set."
        ),
    ],
    task: TaskOption = "classification",
    model: ModelOption = "auto",
    base: MovedBaseOption = None,
    regime: Annotated[
        str,
        typer.Option(
            help="Comma-separated: head, svf, bias, norm, svf+bias, svf+norm, lora:8, full."
        ),
    ] = "svf",
    shots: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="Examples a class to train on; in few-shot segmentation supports of an episode, "
            "several as 1,5.",
            show_default="all, or 1",
        ),
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option("--eval", help="Data to measure with.", show_default="what --shots left over"),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds; each draws anew.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="The first seed.")] = 0,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the examples.", rich_help_panel=TRAINING)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimiser steps.", rich_help_panel=TRAINING)
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Examples a step.", rich_help_panel=TRAINING)
    ] = 16,
    optimizer: Annotated[Literal["adamw", "sgd"], typer.Option(rich_help_panel=TRAINING)] = "adamw",
    lr: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate of all but the head.",
            show_default="by regime",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    head_lr: Annotated[
        float | None, typer.Option(help="Peak learning rate of the head.", rich_help_panel=TRAINING)
    ] = None,
    tune_lr: Annotated[
        bool,
        typer.Option(
            "--tune-lr",
            help="Choose each regime's learning rates on folds of the support set.",
            rich_help_panel=TRAINING,
        ),
    ] = False,
    decay: Annotated[
        float,
        typer.Option(
            "--decay",
            "--weight-decay",
            min=0,
            help="Pull towards the start.",
            rich_help_panel=TRAINING,
        ),
    ] = 0.0,
    head_decay: Annotated[
        float | None,
        typer.Option(
            "--head-decay",
            "--head-weight-decay",
            min=0,
            help="Pull of the head towards its start.",
            show_default="as --decay",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    head_first: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="STEPS",
            help="Steps in which the head alone is trained before the rest joins.",
            rich_help_panel=TRAINING,
        ),
    ] = 0,
    precision: Annotated[
        Literal["fp32", "bf16", "fp16"],
        typer.Option(help="Of the network's products.", rich_help_panel=TRAINING),
    ] = "fp32",
    hold_out: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=0.9,
            help="Share of the shots that chooses the best weights; 0 keeps the last ones.",
            show_default="0",
            rich_help_panel=CLASSIFICATION,
        ),
    ] = None,
    train_layers: Annotated[
        list[str] | None,
        typer.Option(
            "--train-layers",
            "--include",
            metavar="GLOB",
            help="Tensors whose singular values are trained (repeatable).",
            show_default="all",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    exclude: ExcludeOption = None,
    parametrisation: Annotated[
        Literal["scale", "shift", "absolute"],
        typer.Option(
            help="S (1 + t), S + t, or the paper's t in place of S.", rich_help_panel=TRAINING
        ),
    ] = "scale",
    train_rank: Annotated[
        str | None,
        typer.Option(
            metavar="top:64",
            help="Train only these singular values of each layer.",
            show_default="all",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    nonnegative: Annotated[
        bool,
        typer.Option(
            "--nonnegative",
            help="Keep singular values from going below zero.",
            rich_help_panel=TRAINING,
        ),
    ] = False,
    log_with: Annotated[
        str | None,
        typer.Option(
            metavar="TRACKER",
            help="Comma-separated: tensorboard, wandb, or another tracker that accelerate knows.",
            show_default="none",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    log_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where trackers put their files.",
            show_default="OUTPUT-logs",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw curves and regimes: a page (.html) or a figure (.png, .svg, .pdf).",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(
            help="Text file of class names in the order of the head's outputs.",
            show_default="sorted",
            rich_help_panel=CLASSIFICATION,
        ),
    ] = None,
    head: Annotated[
        Literal["auto", "keep", "new"] | None,
        typer.Option(
            help="auto keeps the head where the number of classes is the same.",
            show_default="auto",
            rich_help_panel=CLASSIFICATION,
        ),
    ] = None,
    head_name: HeadNameOption = None,
    image_size: ImageSizeOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    augment: Annotated[
        Literal["none", "light", "strong"] | None,
        typer.Option(
            help="light crops and flips (few-shot segmentation: flips); strong distorts besides.",
            show_default="light",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    head_type: HeadTypeOption = None,
    sampling: SamplingOption = None,
    images: ImagesOption = None,
    masks: MasksOption = None,
    mask_suffix: MaskSuffixOption = None,
    ignore_index: IgnoreIndexOption = None,
    tokenizer: TokenizerOption = None,
    sequence_length: SequenceLengthOption = None,
    gradient_checkpointing: GradientCheckpointingOption = None,
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
    select_episodes: SelectEpisodesOption = None,
    select_on: SelectOnOption = None,
    alignment: AlignmentOption = None,
    swap_supports: SwapSupportsOption = None,
    overlays: OverlaysOption = None,
    overlay_count: OverlayCountOption = None,
    trust_remote_code: TrustOption = False,
    device: DeviceOption = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the same command was interrupted.")
    ] = False,
    save_every: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="STEPS",
            help="How often a run's state is kept for --resume.",
            show_default="every 30 seconds",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    force: ForceOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Train singular values on a few examples, beside other regimes if asked for."""
    given = locals()
    from svftool.report.finetune import document, view
    from svftool.report.training import ReportFile
    from svftool.stages.finetune import finetune
    from svftool.training import Settings

    # The same command has drawn what --resume goes on from.
    drawing = ReportFile(report, force=force or resume, apart=(factors, data, output))
    drawing.check()
    result = finetune(
        factors,
        data=data,
        output=output,
        task=task,
        model=model,
        base=base,
        regimes=regime.split(","),
        seeds=range(seed, seed + seeds),
        settings=Settings(
            steps=steps,
            epochs=epochs,
            batch_size=batch_size,
            optimizer=optimizer,
            lr=lr,
            head_lr=head_lr,
            tune_lr=tune_lr,
            decay=decay,
            head_decay=head_decay,
            head_first=head_first,
            precision=precision,
        ),
        include=train_layers or (),
        exclude=exclude or (),
        parametrisation=parametrisation,
        train_rank=train_rank,
        nonnegative=nonnegative,
        device=device,
        log_with=log_with.split(",") if log_with else (),
        log_dir=log_dir,
        trust_remote_code=trust_remote_code,
        force=force,
        resume=resume,
        save_every=save_every,
        progress=progress_for(quiet=quiet, verbose=verbose),
        **options_of(task, given | {"shots": _shots(task, shots)}),
    )
    emit(document(result), view(result), as_json=json)
    if is_first_process():
        drawing.write(result)
    if result.interrupted is not None:
        raise typer.Exit(SIGNAL_EXIT + result.interrupted)


def _shots(task: str, text: str | None) -> int | list[int] | None:
    """Read --shots: one number, or several for few-shot segmentation."""
    if text is None:
        return None
    found = numbers("shots", text)
    if min(found) < 1:
        raise UsageError(f"--shots is {min(found)}, expected at least 1")
    if task == "few-shot-segmentation":
        return found
    if len(found) > 1:
        raise UsageError(f"--shots {text}: several numbers, --task {task} takes one")
    return found[0]
