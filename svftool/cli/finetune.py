"""``svftool finetune``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from svftool.choices.acting import check_acting
from svftool.choices.models import read_model
from svftool.choices.regimes import parse_regime
from svftool.choices.singular_values import parse_band
from svftool.choices.training import Settings, check_comparison, check_safeguard, parse_rates
from svftool.cli import config as config_file
from svftool.cli.common import (
    DeviceOption,
    Display,
    ExcludeOption,
    ForceOption,
    ModelFlags,
    OutputOption,
    TaskOption,
    check_device,
    is_first_process,
)
from svftool.cli.completion import REGIMES, list_of, one_of
from svftool.cli.push import PushFlags
from svftool.cli.signature import TaskFlags, options_of
from svftool.files.given import check_data, check_factors
from svftool.files.output import check_output
from svftool.tasks.options import TASKS

EXAMPLE = (
    "Example: svftool finetune factors -o birds.svf.safetensors --data images --shots 10 "
    "--model timm:resnet50"
)
FIRST = (
    "output", "data", "evaluation", "model", "task", "regime", "shots", "seeds", "steps", "lr",
)  # fmt: skip
"""What most need; the help shows the others on request."""

SIGNAL_EXIT = 128

TRAINING, COST = "Training", "Memory and speed"


@dataclass(frozen=True, kw_only=True)
class RepeatFlags:
    """What is compared, and how often each of it is trained."""

    regime: Annotated[
        str,
        typer.Option(
            autocompletion=list_of(*REGIMES),
            help="Comma-separated: head, svf, svf+scale, entries:SIZE[:gradient|random|band], "
            "core:SIZE, salt:SIZE, rows, bias, norm (also +bias, +norm), lora:SIZE, full. SIZE is "
            "a number a layer, or a multiple of svf's numbers such as 4x.",
        ),
    ] = "svf"
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds; each draws anew.")] = 1
    seed: Annotated[int, typer.Option(min=0, help="The first seed.")] = 0
    against: Annotated[
        str | None,
        typer.Option(
            metavar="REGIME",
            autocompletion=one_of(*REGIMES),
            help="Hold every other regime against this one, seed by seed: mean difference, 95 % "
            "interval, wins.",
            show_default="none",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class TrainingFlags:
    """How a run trains."""

    epochs: Annotated[
        float | None, typer.Option(help="Passes over the examples.", rich_help_panel=TRAINING)
    ] = None
    steps: Annotated[
        int | None, typer.Option(help="Optimiser steps.", rich_help_panel=TRAINING)
    ] = None
    batch_size: Annotated[int, typer.Option(help="Examples a step.", rich_help_panel=TRAINING)] = 16
    optimizer: Annotated[Literal["adamw", "sgd"], typer.Option(rich_help_panel=TRAINING)] = "adamw"
    lr: Annotated[
        str | None,
        typer.Option(
            metavar="RATE",
            help="Peak learning rate of all but the head; one a regime as svf=1e-2,full=1e-4.",
            show_default="by regime",
            rich_help_panel=TRAINING,
        ),
    ] = None
    head_lr: Annotated[
        float | None, typer.Option(help="Peak learning rate of the head.", rich_help_panel=TRAINING)
    ] = None
    safeguard: Annotated[
        Literal["auto", "always", "never"],
        typer.Option(
            help="Whether examples left out in turn decide how much of the training is kept; auto: "
            "few examples, and neither steps nor rates given.",
            rich_help_panel=TRAINING,
        ),
    ] = "auto"
    tune_lr: Annotated[
        bool,
        typer.Option(
            "--tune-lr",
            help="Choose each regime's learning rates on folds of the support set.",
            rich_help_panel=TRAINING,
        ),
    ] = False
    decay: Annotated[
        float,
        typer.Option(
            "--decay",
            "--weight-decay",
            min=0,
            help="Pull towards the start.",
            rich_help_panel=TRAINING,
        ),
    ] = 0.0
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
    ] = None
    head_first: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="STEPS",
            help="Steps in which the head alone is trained before the rest joins.",
            rich_help_panel=TRAINING,
        ),
    ] = 0
    warmup: Annotated[
        float,
        typer.Option(
            min=0,
            help="Share of the steps in which the rate rises; from 1 on their number.",
            rich_help_panel=TRAINING,
        ),
    ] = 0.1
    clip_grad: Annotated[
        float,
        typer.Option(
            "--clip-grad",
            "--max-grad-norm",
            min=0,
            metavar="NORM",
            help="Largest norm of a step's whole gradient; 0 for any.",
            rich_help_panel=TRAINING,
        ),
    ] = 1.0
    label_smoothing: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="SHARE",
            help="Share of each label dealt out over all classes.",
            show_default="0",
            rich_help_panel=TRAINING,
        ),
    ] = 0.0
    patience: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="TIMES",
            help="Stop where so many of a run's ten measurements of --hold-out bring no better "
            "one.",
            show_default="never",
            rich_help_panel=TRAINING,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class SettingFlags(TrainingFlags):
    """How a run trains, and what it takes of memory and time."""

    precision: Annotated[
        Literal["fp32", "bf16", "fp16"],
        typer.Option(help="Of the network's products.", rich_help_panel=COST),
    ] = "fp32"
    dtype: Annotated[
        Literal["float32", "bfloat16"],
        typer.Option(
            help="Of frozen weights and factors; what is trained stays float32.",
            rich_help_panel=COST,
        ),
    ] = "float32"
    accumulate: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="BATCHES",
            help="Batches whose gradients make up one step.",
            rich_help_panel=COST,
        ),
    ] = 1
    workers: Annotated[
        int,
        typer.Option(
            min=0,
            help="Processes that load batches ahead of the steps.",
            show_default="0",
            rich_help_panel=COST,
        ),
    ] = 0

    def settings(self) -> Settings:
        """Return them as the library takes them.

        Raises
        ------
        UsageError
            If they contradict each other.
        """
        given = asdict(self)
        lr, single = parse_rates(given.pop("lr"))
        clip = given.pop("clip_grad") or None
        return Settings(**given, lr=lr, lr_of=single, clip=clip)


@dataclass(frozen=True, kw_only=True)
class SvfFlags:
    """Which singular values are trained, and as what."""

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
    ] = None
    exclude: ExcludeOption = None
    parametrisation: Annotated[
        Literal["scale", "shift", "absolute"],
        typer.Option(
            help="S (1 + t), S + t, or the paper's t in place of S.", rich_help_panel=TRAINING
        ),
    ] = "scale"
    train_rank: Annotated[
        str | None,
        typer.Option(
            metavar="top:64",
            help="Train only these singular values of each layer.",
            show_default="all",
            rich_help_panel=TRAINING,
        ),
    ] = None
    nonnegative: Annotated[
        bool,
        typer.Option(
            "--nonnegative",
            help="Keep singular values from going below zero.",
            rich_help_panel=TRAINING,
        ),
    ] = False

    def attaching(self) -> dict[str, Any]:
        """Return them as the library takes them."""
        given = asdict(self)
        include, exclude = given.pop("train_layers"), given.pop("exclude")
        return {"include": include or (), "exclude": exclude or (), **given}


@dataclass(frozen=True, kw_only=True)
class LogFlags:
    """What is written on the way and beside the result."""

    log_with: Annotated[
        str | None,
        typer.Option(
            metavar="TRACKER",
            autocompletion=list_of("tensorboard", "wandb"),
            help="Comma-separated: tensorboard, wandb, or another tracker that accelerate knows.",
            show_default="none",
            rich_help_panel=TRAINING,
        ),
    ] = None
    log_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where trackers put their files.",
            show_default="OUTPUT-logs",
            rich_help_panel=TRAINING,
        ),
    ] = None
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw curves and regimes: a page (.html) or a figure (.png, .svg, .pdf).",
            rich_help_panel=TRAINING,
        ),
    ] = None
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw quality against trained numbers, with the front (.png, .svg, .pdf).",
            rich_help_panel=TRAINING,
        ),
    ] = None
    save_every: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="STEPS",
            help="How often a run's state is kept for --resume.",
            show_default="every 30 seconds",
            rich_help_panel=TRAINING,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class OutputFlags:
    """What becomes of an output that is there, and of a run that did not end."""

    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the same command was interrupted.")
    ] = False
    force: ForceOption = False

    @property
    def replaces(self) -> bool:
        """Whether what is there may go."""
        return self.force or self.resume


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE.toml",
        is_eager=True,
        callback=config_file.load,
        help="Take options from a file, such as the run.toml of another run; flags go before it.",
        show_default="none",
    ),
]


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
    network: ModelFlags,
    repeats: RepeatFlags,
    training: SettingFlags,
    svf: SvfFlags,
    logs: LogFlags,
    options: Annotated[dict[str, Any], TaskFlags()],
    device: DeviceOption = "auto",
    again: OutputFlags,
    hub: PushFlags,
    config: ConfigOption = None,
    display: Display,
) -> None:
    """Train singular values on a few examples, beside other regimes if asked for."""
    del config  # its options are among the others
    check_device(device)
    settings = training.settings()
    check_safeguard(settings.safeguard, task)
    regimes = repeats.regime.split(",")
    parsed = [parse_regime(regime) for regime in regimes]
    parse_band(svf.train_rank)
    check_acting(parsed, svf.attaching())
    read_model(network.model)
    chosen = options_of(task, options)
    TASKS[task](**chosen)  # refuses values that do not go together
    check_comparison(settings, regimes, against=repeats.against, task=task, options=chosen)
    check_factors(factors)
    check_data(data, task)
    hub.check()
    if is_first_process():
        check_output(output, force=again.replaces, inputs=[factors, data])
    from svftool.report.finetune import document, view
    from svftool.report.training import ReportFile
    from svftool.stages.finetune import finetune

    # The same command has drawn what --resume goes on from.
    apart = (factors, data, output)
    drawings = [
        ReportFile(path, force=again.replaces, apart=apart, curve=path is logs.plot)
        for path in (logs.report, logs.plot)
        if path is not None
    ]
    for drawing in drawings:
        drawing.check()
    result = finetune(
        factors,
        data=data,
        output=output,
        task=task,
        **network.named(),
        regimes=regimes,
        seeds=range(repeats.seed, repeats.seed + repeats.seeds),
        settings=settings,
        **svf.attaching(),
        device=device,
        log_with=logs.log_with.split(",") if logs.log_with else (),
        log_dir=logs.log_dir,
        save_every=logs.save_every,
        against=repeats.against,
        force=again.force,
        resume=again.resume,
        progress=display.progress(),
        **chosen,
    )
    display.wrote(options.get("overlays"))
    display.emit(document(result), view(result))
    for drawing in drawings if is_first_process() else ():
        drawing.write(result)
        display.wrote(drawing.path)
    if result.interrupted is None:
        hub.push(output, view(result), base=factors, relation="adapter")
    else:
        raise typer.Exit(SIGNAL_EXIT + result.interrupted)
