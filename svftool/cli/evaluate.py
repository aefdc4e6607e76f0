"""``svftool evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from svftool.choices.models import read_model
from svftool.cli.common import (
    DeviceOption,
    Display,
    ForceOption,
    ModelFlags,
    TaskOption,
    check_device,
)
from svftool.cli.signature import TaskFlags, options_of
from svftool.files.given import check_data, check_exists, check_tuned_exist

EXAMPLE = (
    "Example: svftool evaluate factors --tuned birds.svf.safetensors --data test "
    "--model timm:resnet50 --predictions birds.jsonl"
)

FIRST = ("data", "tuned", "task", "model", "predictions", "device", "json", "quiet")
"""What most need; the help shows the others on request."""


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
            help="Tuned file to put on the factors' base, or an adapter.",
            show_default="the base itself",
        ),
    ] = None,
    task: TaskOption = "classification",
    network: ModelFlags,
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
    options: Annotated[dict[str, Any], TaskFlags(evaluate=True)],
    device: DeviceOption = "auto",
    force: ForceOption = False,
    display: Display,
) -> None:
    """Measure a checkpoint, or factors with a tuned file, on a data set."""
    check_device(device)
    read_model(network.model)
    chosen = options_of(task, options)
    check_exists(checkpoint)
    check_tuned_exist([] if tuned is None else [str(tuned)])
    check_data(data, task)
    from svftool.report import evaluate as report
    from svftool.stages.evaluate import evaluate

    result = evaluate(
        checkpoint,
        data=data,
        tuned=tuned,
        task=task,
        **network.named(),
        seed=seed,
        device=device,
        predictions=predictions,
        force=force,
        progress=display.progress(),
        **chosen,
    )
    display.wrote(predictions)
    display.emit(report.document(result), report.view(result))
