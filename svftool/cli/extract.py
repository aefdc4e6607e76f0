"""``svftool extract``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svftool.cli.common import (
    Display,
    ForceOption,
    OutputOption,
    leave_to_first_process,
)
from svftool.files.folder import check_exists
from svftool.files.output import check_output

EXAMPLE = "Example: svftool extract base.safetensors tuned.safetensors -o small.svf.safetensors"


def command(
    base: Annotated[Path, typer.Argument(help="The base, or its factor checkpoint.")],
    tuned: Annotated[Path, typer.Argument(help="Its dense fine-tune.")],
    *,
    output: OutputOption,
    force: ForceOption = False,
    display: Display,
) -> None:
    """Turn a dense fine-tune into the tuned file that approximates it best."""
    leave_to_first_process("extract")
    for one in (base, tuned):
        check_exists(one)
    check_output(output, force=force, inputs=[base, tuned])
    from svftool.report import extract as report
    from svftool.stages.extract import extract

    result = extract(
        base,
        tuned,
        output=output,
        force=force,
        progress=display.progress(),
    )
    display.emit(report.document(result), report.view(result))
