"""``svftool info``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType

from svftool.cli.common import Display
from svftool.errors import CheckpointError, shortlist
from svftool.files.pipeline import is_pipeline, located, read_pipeline

if TYPE_CHECKING:
    from svftool.stages.info import Info

EXAMPLE = "Example: svftool info model.safetensors"


def command(
    path: Annotated[
        str,
        typer.Argument(help="Checkpoint, factors, tuned file, adapter: file, folder or hub id."),
    ],
    *,
    check: Annotated[
        bool, typer.Option("--check", help="Read every byte: hashes, and fingerprints of factors.")
    ] = False,
    every: Annotated[bool, typer.Option("--all", help="Show every tensor.")] = False,
    display: Display,
) -> None:
    """Say what a file or folder is, from its headers."""
    from svftool.report import info as report
    from svftool.stages.info import info

    look = partial(info, check=check, progress=display.progress())
    show = partial(report.view, all_rows=every)
    place = located(path)
    if is_pipeline(place):
        problems = _pipeline(place, look, show, display)
    else:
        found = look(path)
        display.emit(report.document(found), show(found))
        problems = list(found.contents.problems)
    if problems:
        raise CheckpointError(f"{path}: {shortlist(problems, 1)}")


def _pipeline(
    place: Path,
    look: Callable[[Path], Info],
    show: Callable[[Info], RenderableType],
    display: Display,
) -> list[str]:
    """Show every component; return what does not hold in any."""
    from svftool.report import info as report
    from svftool.report import pipeline
    from svftool.stages.pipeline import PipelineResult

    found = {name: look(place / name) for name in read_pipeline(place).components}
    whole = PipelineResult(None, found)
    display.emit(pipeline.document("info", whole, report.document), pipeline.view(whole, show))
    return [f"{name}: {one}" for name, of in found.items() for one in of.contents.problems]
