"""``svftool lineage``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svftool.cli.common import Display
from svftool.errors import UsageError
from svftool.files.given import check_exists
from svftool.files.output import check_output, replace_output

EXAMPLE = "Example: svftool lineage base.safetensors one.safetensors other.safetensors"


def command(
    checkpoints: Annotated[
        list[str], typer.Argument(help="Two checkpoints or more, of whole weights.")
    ],
    *,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with the tree, for any browser.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    display: Display,
) -> None:
    """Tell which checkpoints come from one another."""
    if len(checkpoints) < 2:
        raise UsageError(f"{checkpoints[0]}: one checkpoint, expected two or more. Name another.")
    for one in checkpoints:
        check_exists(one)
    if html is not None:
        from svftool.report.drawing import require_jinja

        check_output(html, force=force, inputs=[*map(Path, checkpoints)])
        require_jinja()
    from svftool.report import lineage as report
    from svftool.stages.lineage import lineage

    found = lineage(checkpoints, progress=display.progress())
    if html is not None:
        inputs = [*map(Path, checkpoints)]
        with replace_output(html, force=force, inputs=inputs) as partial:
            partial.write_text(report.page(found), encoding="utf-8")
        display.wrote(html)
    display.emit(report.document(found), report.view(found))
