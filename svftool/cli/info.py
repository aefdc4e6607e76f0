"""``svftool info``."""

from __future__ import annotations

from typing import Annotated

import typer

from svftool.cli.common import Display
from svftool.errors import CheckpointError, shortlist

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

    found = info(path, check=check, progress=display.progress())
    display.emit(report.document(found), report.view(found, all_rows=every))
    problems = found.contents.problems
    if problems:
        raise CheckpointError(f"{path}: {shortlist(problems, 1)}")
