"""Options that several commands share, and how a result is shown."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from svftool.cli.console import stdout
from svftool.report.json import to_json

OutputOption = Annotated[
    Path,
    typer.Option(
        "--output", "-o", help="What is written; its suffix decides between file and folder."
    ),
]
ModelOption = Annotated[
    str,
    typer.Option(
        metavar="SPEC",
        help="auto (by config.json), timm:NAME, torchvision:NAME, FILE.py:FACTORY or "
        "package.module:FACTORY.",
    ),
]
MovedBaseOption = Annotated[
    Path | None,
    typer.Option("--base", help="The checkpoint that was decomposed, where it has moved."),
]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that lies beside the checkpoint.")
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Replace an existing output once the new one is complete.")
]
IncludeOption = Annotated[
    list[str] | None,
    typer.Option("--include", metavar="GLOB", help="Tensor names to take (repeatable)."),
]
ExcludeOption = Annotated[
    list[str] | None,
    typer.Option("--exclude", metavar="GLOB", help="Tensor names to leave out (repeatable)."),
]
DeviceOption = Annotated[str, typer.Option(metavar="auto|cpu|cuda[:i]", help="Where to compute.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document instead of tables.")
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress and no notes; warnings remain.")
]
VerboseOption = Annotated[
    int, typer.Option("--verbose", "-v", count=True, help="Show the log (-vv: all of it).")
]


def is_first_process() -> bool:
    """Whether this process speaks for all that share the command."""
    return int(os.environ.get("RANK", "0")) == 0


def emit(document: dict[str, Any], view: RenderableType, *, as_json: bool) -> None:
    """Print a result on stdout, once where several processes share the command.

    Parameters
    ----------
    document : dict
        The result for scripts, from a ``report`` module.
    view : RenderableType
        The result for people.
    as_json : bool
        Which of the two is printed.
    """
    if not is_first_process():
        return
    if as_json:
        typer.echo(to_json(document))
    else:
        stdout().print(view)
