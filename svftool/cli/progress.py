"""Bars, notes and warnings on stderr, and a line until the first of them comes."""

from __future__ import annotations

import os
import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

from svftool.progress import SILENT, ProgressTask
from svftool.report.text import one_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress


class WaitingLine:
    """A dim line on a terminal that says a command has begun; it goes before anything is shown.

    Written without a library: it is there before those that take long are imported.
    """

    def __init__(self) -> None:
        self._shown = False

    def show(self, text: str) -> None:
        """Write the line, where stderr is a terminal."""
        if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            self._shown = True
            sys.stderr.write(f"\r\x1b[2m{text}\x1b[0m\x1b[K")
            sys.stderr.flush()

    def clear(self) -> None:
        """Take the line away, if it is there."""
        if self._shown:
            self._shown = False
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


WAITING = WaitingLine()


class ConsoleProgress:
    """Draws bars with time left on a terminal; notes and warnings as lines.

    Parameters
    ----------
    console : Console
        Where to draw. Bars appear only when it is a terminal.
    quiet : bool
        Leave out bars and notes; warnings are still shown.
    """

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self._console = console
        self._quiet = quiet

    def task(self, description: str, total: float | None = None, *, unit: str = "") -> ProgressTask:
        """Begin a bar of `total` units."""
        if self._quiet or not self._console.is_terminal:
            return SILENT.task(description, total, unit=unit)
        return ConsoleTask(_bar(self._console, total, unit), description, total)

    def note(self, message: str) -> None:
        """Print one dim line."""
        if not self._quiet:
            self._console.print(one_line(message), style="dim", markup=False)

    def warn(self, message: str) -> None:
        """Print one yellow line."""
        self._console.print("warning:", style="bold yellow", end=" ")
        self._console.print(one_line(message), markup=False)


def _bar(console: Console, total: float | None, unit: str) -> RichProgress:
    from rich import progress  # only a terminal needs it, and it takes long to import

    counted = unit != "" and total is not None and float(total).is_integer()
    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(bar_width=24),
        progress.MofNCompleteColumn() if counted else progress.TaskProgressColumn(),
        progress.TextColumn(unit, markup=False),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left", style="dim"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[detail]}", style="dim", markup=False),
        console=console,
        transient=True,
    )


class ConsoleTask:
    """One bar; see `svftool.progress.ProgressTask`."""

    def __init__(self, bar: RichProgress, description: str, total: float | None) -> None:
        self._bar = bar
        self._id = bar.add_task(description, total=total, detail="")

    def advance(self, amount: float = 1.0, *, detail: str | None = None) -> None:
        """Move the bar by `amount`."""
        if detail is None:
            self._bar.update(self._id, advance=amount)
        else:
            self._bar.update(self._id, advance=amount, detail=detail)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
