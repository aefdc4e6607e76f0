"""``svftool demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from svftool.cli.common import Display, ForceOption, stdout

EXAMPLE = "Example: svftool demo digits"


def command(
    folder: Annotated[Path, typer.Argument(help="Where everything is written.")] = Path(
        "svftool-demo"
    ),
    *,
    force: ForceOption = False,
    display: Display,
) -> None:
    """Run the whole loop on a small network and handwritten digits, offline.

    A network that knows the digits 0 to 5 is tuned for 6 to 9 from a few images of each.
    """
    from svftool.report import demo as report
    from svftool.stages.demo import demo

    done: list[dict[str, Any]] = []
    for step in demo(folder, force=force, progress=display.progress()):
        done.append(report.step_document(step))
        if not display.json:
            stdout().print(report.step_view(step))
    if display.json:
        display.emit(report.document(done), "")
