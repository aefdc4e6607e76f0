"""``svftool convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svftool.choices.adapters import Layout, parse_adapter_rank
from svftool.choices.dtypes import Dtype
from svftool.cli.common import Display, ForceOption, OutputOption, leave_to_first_process
from svftool.cli.completion import one_of
from svftool.files.given import check_exists
from svftool.files.output import check_output

EXAMPLE = "Example: svftool convert style.safetensors -o small.safetensors --rank 16"


def command(
    source: Annotated[
        Path, typer.Argument(metavar="INPUT", help="An adapter in any layout, or a tuned file.")
    ],
    *,
    output: OutputOption,
    layout: Annotated[
        Layout | None,
        typer.Option(
            metavar="peft|kohya|comfy|diffusers",
            help="Whose names the adapter gets (default: as the input; peft for tuned files).",
        ),
    ] = None,
    rank: Annotated[
        str | None,
        typer.Option(
            metavar="N|energy:X|error:X",
            autocompletion=one_of("16", "energy:0.95", "error:0.1"),
            help="A rank, the share of squares to keep, or of the norm to lose.",
        ),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            "--base", help="The model of the adapter, for its names; of tuned files its factors."
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            metavar="float32|bfloat16|float16",
            help="Storage of the matrices (default: that of the input).",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show ranks and sizes; write nothing.")
    ] = False,
    force: ForceOption = False,
    display: Display,
) -> None:
    """Turn an adapter or a tuned file into another layout, rank or form, with its error."""
    leave_to_first_process("convert")
    if rank is not None:
        parse_adapter_rank(rank)
    inputs = [source] if base is None else [source, base]
    for one in inputs:
        check_exists(one)
    if not dry_run:
        check_output(output, force=force, inputs=inputs)
    from svftool.report import convert as report
    from svftool.stages.convert import convert

    result = convert(
        source,
        output=output,
        layout=layout,
        rank=rank,
        base=base,
        dtype=dtype,
        dry_run=dry_run,
        force=force,
        progress=display.progress(),
    )
    display.emit(report.document(result), report.view(result))
