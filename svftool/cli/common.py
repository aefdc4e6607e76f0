"""Options that several commands share, and how a result is shown."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from svftool.cli.console import progress_for, stdout
from svftool.progress import Progress
from svftool.report.json import to_json
from svftool.tasks.options import TaskName

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
TaskOption = Annotated[TaskName, typer.Option(help="Kind of data, loss and metrics.")]
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


@dataclass(frozen=True)
class ModelFlags:
    """Which network the weights are for, and where they are."""

    model: ModelOption = "auto"
    base: MovedBaseOption = None
    trust_remote_code: TrustOption = False

    def named(self) -> dict[str, Any]:
        """Return them under the names of the library."""
        return asdict(self)


@dataclass(frozen=True)
class Display:
    """What a command shows: its result on stdout, everything else on stderr."""

    json: JsonOption = False
    quiet: QuietOption = False
    verbose: VerboseOption = 0

    def progress(self) -> Progress:
        """Return the progress to draw on stderr, and set the level of the log."""
        return progress_for(quiet=self.quiet, verbose=self.verbose)

    def emit(self, document: dict[str, Any], view: RenderableType) -> None:
        """Print a result on stdout, once where several processes share the command.

        Parameters
        ----------
        document : dict
            The result for scripts, from a ``report`` module; printed with ``--json``.
        view : RenderableType
            The result for people.
        """
        if not is_first_process():
            return
        if self.json:
            typer.echo(to_json(document))
        else:
            stdout().print(view)
