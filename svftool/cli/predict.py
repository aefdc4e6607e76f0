"""``svftool predict``."""

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
    check_device,
    leave_to_first_process,
)
from svftool.files.given import check_data, check_exists, check_tuned_exist
from svftool.files.names import check_predictions_name
from svftool.files.output import check_output
from svftool.tasks.option import TaskName

EXAMPLE = (
    "Example: svftool predict factors new-pictures --tuned birds.svf.safetensors "
    "--model timm:resnet50 -o birds.csv"
)


def command(
    checkpoint: Annotated[
        Path, typer.Argument(help="Dense checkpoint, or factors from 'svftool decompose'.")
    ],
    inputs: Annotated[
        list[Path],
        typer.Argument(
            help="Pictures, texts (JSONL, CSV, plain lines), or folders of them.",
            metavar="INPUT...",
        ),
    ],
    *,
    tuned: Annotated[
        Path | None,
        typer.Option(
            help="Tuned file to put on the factors' base, or an adapter.",
            show_default="the base itself",
        ),
    ] = None,
    task: Annotated[
        TaskName | None,
        typer.Option(
            metavar="TASK",
            help="Kind of input: classification, text-classification, segmentation or language.",
            show_default="as trained, or by model and inputs",
        ),
    ] = None,
    network: ModelFlags,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="All rows as .jsonl or .csv; for segmentation a folder of maps as PNG.",
            show_default="the terminal",
        ),
    ] = None,
    top: Annotated[
        int, typer.Option(min=1, metavar="K", help="Classes, or next tokens, in a row.")
    ] = 3,
    classes: Annotated[
        Path | None,
        typer.Option(
            help="Text file of class names in the order of the head's outputs.",
            show_default="the tuned file's, or config.json's",
        ),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Pixels a side.", show_default="as trained")
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Folder of the model's tokenizer.", show_default="the checkpoint's"),
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(help="Tokens that the model sees at once.", show_default="as trained"),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="TOKENS",
            help="Tokens of a text that a classifier sees.",
            show_default="as trained",
        ),
    ] = None,
    device: DeviceOption = "auto",
    force: ForceOption = False,
    display: Display,
) -> None:
    """Say what a model makes of new pictures or texts."""
    leave_to_first_process("predict")
    check_device(device)
    read_model(network.model)
    check_exists(checkpoint)
    for one in inputs:
        check_data(one)
    check_tuned_exist([] if tuned is None else [str(tuned)])
    if output is not None:
        check_predictions_name(output)
        check_output(output, force=force, inputs=[checkpoint, *inputs])
    from svftool.report import predict as report
    from svftool.stages.predict import predict

    options: dict[str, Any] = {
        "classes": classes,
        "image_size": image_size,
        "tokenizer": tokenizer,
        "sequence_length": sequence_length,
        "max_length": max_length,
    }
    result = predict(
        checkpoint,
        inputs,
        tuned=tuned,
        task=task,
        **network.named(),
        output=output,
        top=top,
        device=device,
        force=force,
        progress=display.progress(),
        **{name: value for name, value in options.items() if value is not None},
    )
    display.emit(report.document(result), report.view(result))
