"""Options that several commands share, and how a result is shown."""

from __future__ import annotations

import errno
import io
import logging
import os
import select
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO, get_args

import typer
from rich.console import Console, RenderableType

from svftool.cli.completion import one_of
from svftool.cli.progress import WAITING, ConsoleProgress
from svftool.errors import ResourceError
from svftool.progress import SILENT, Progress
from svftool.report.json import to_json
from svftool.report.text import safe
from svftool.tasks.option import TaskName

_words: list[str] = []


def keep_words(words: Sequence[str]) -> None:
    """Remember the words of the command that runs."""
    _words[:] = words


def words() -> tuple[str, ...]:
    """Return the words of the command that runs, its name first."""
    return tuple(_words)


def check_device(name: str) -> None:
    """Refuse a device before any file is looked at; torch is asked only where a GPU is named.

    Raises
    ------
    UsageError
        As `svftool.machine.pick_device`.
    """
    if name not in ("auto", "cpu"):
        from svftool.machine import pick_device

        pick_device(name)


# stdout and stderr that outlast their readers: a closed pipe, a full disk, a narrow encoding.


class _Sink(io.FileIO):
    """A descriptor whose writes never fail: what nobody takes is dropped, and why is kept.

    The work goes on, so that its files are written and the exit code says how it went.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self.failure: OSError | None = None

    def write(self, data: object) -> int:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        done = 0
        while self.failure is None and done < len(view):
            try:
                count = super().write(view[done:])
                if count is None:  # somebody made the descriptor non-blocking
                    select.select([], [self], [])
                done += count or 0
            except OSError as error:
                self.failure = error
        return len(view)


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Replace stdout and stderr for the length of a command.

    Raises
    ------
    ResourceError
        At the end of a command that was all right, if the disk did not take its result. A reader
        that has gone (``| head``) is no error.
    """
    before = sys.stdout, sys.stderr
    out, sys.stdout = _lasting(sys.stdout)
    err, sys.stderr = _lasting(sys.stderr)
    code: object = 0
    try:
        try:
            yield
        except SystemExit as end:
            code = end.code
        sys.stdout.flush()
        _check(out, code)
        sys.exit(code)  # type: ignore[arg-type]
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        if out is None and err is None:
            sys.stdout, sys.stderr = before


def _check(out: _Sink | None, code: object) -> None:
    failure = None if out is None else out.failure
    if failure is not None and failure.errno != errno.EPIPE and not code:
        raise ResourceError(
            f"stdout: the result could not be printed ({failure.strerror or failure}), expected "
            "a place that takes it. What the command writes is complete; print elsewhere."
        ) from failure


def _lasting(stream: TextIO | None) -> tuple[_Sink | None, TextIO]:
    if stream is None:  # closed by whoever started the command
        return None, open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123
    try:
        sink = _Sink(stream.fileno())
        stream.flush()
    except (OSError, ValueError):
        return None, stream
    line = sink.isatty() or stream is sys.stderr
    encoding = stream.encoding or "utf-8"
    # A character that the encoding lacks becomes its escape, never an error after the work.
    return sink, io.TextIOWrapper(
        io.BufferedWriter(sink), encoding, "backslashreplace", line_buffering=line
    )


def encodable(text: str) -> str:
    r"""Return a JSON text that stdout can take: other characters become the escapes of JSON.

    Examples
    --------
    >>> encodable('{"a": "\udcff"}')
    '{"a": "\\udcff"}'
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        raw = text.encode("utf-16-be", "surrogatepass")
        units = [int.from_bytes(raw[at : at + 2]) for at in range(0, len(raw), 2)]
        return "".join(chr(one) if one < 0x80 else f"\\u{one:04x}" for one in units)
    return text


# What the command line shows besides its result: progress, notes and warnings, all on stderr.


def stderr() -> Console:
    """Console for everything but the result; made anew so that tests can capture it."""
    return _Console(stderr=True, highlight=False, soft_wrap=True)


class _Console(Console):
    """Takes the waiting line away before it shows anything."""

    def print(self, *objects: Any, **style: Any) -> None:
        """Print as a console does."""
        WAITING.clear()
        super().print(*objects, **style)

    def set_live(self, live: Any) -> bool:
        """Begin to draw a bar."""
        WAITING.clear()
        return super().set_live(live)


def stdout() -> Console:
    """Console for the result."""
    return _Console(highlight=False)


def progress_for(*, quiet: bool = False, verbose: int = 0) -> Progress:
    """Progress that draws on stderr, and logging at the level asked for.

    Parameters
    ----------
    quiet : bool
        Show warnings alone.
    verbose : int
        0 shows warnings of the log, 1 its information, 2 everything.
    """
    level = [logging.WARNING, logging.INFO, logging.DEBUG][min(verbose, 2)]
    from rich.logging import RichHandler

    handler = RichHandler(console=stderr(), show_path=False, show_time=False, markup=False)
    logging.getLogger("svftool").handlers[:] = [handler]
    logging.getLogger("svftool").setLevel(level)
    if int(os.environ.get("RANK", "0")) > 0:
        return SILENT
    return ConsoleProgress(stderr(), quiet=quiet)


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
        autocompletion=one_of("auto", "timm:", "torchvision:"),
        help="auto (by config.json), timm:NAME, torchvision:NAME, FILE.py:FACTORY or "
        "package.module:FACTORY.",
    ),
]
TaskOption = Annotated[
    TaskName,
    typer.Option(
        metavar="TASK",
        help=f"Kind of data, loss and metrics: {', '.join(get_args(TaskName))}.",
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
DeviceOption = Annotated[
    str,
    typer.Option(
        metavar="auto|cpu|cuda[:i]",
        autocompletion=one_of("auto", "cpu", "cuda"),
        help="Where to compute.",
    ),
]
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


def leave_to_first_process(name: str) -> None:
    """End all processes but the first: the command is not shared, and its output has one lock."""
    if not is_first_process() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        stderr().print(f"svftool {name}: left to the first of the processes", style="dim")
        raise typer.Exit(0)


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

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Context in which a terminal shows that the command has begun, until something comes."""
        if not self.quiet and is_first_process():
            WAITING.show("svftool: starting ...")
        try:
            yield
        finally:
            WAITING.clear()

    def progress(self) -> Progress:
        """Return the progress to draw on stderr, and set the level of the log."""
        return progress_for(quiet=self.quiet, verbose=self.verbose)

    def wrote(self, *paths: Path | None) -> None:
        """Name each file that was written besides the result, in a dim line on stderr.

        Parameters
        ----------
        *paths : Path or None
            Files and folders; None for one that was not asked for.
        """
        if is_first_process() and not self.quiet:
            for path in paths:
                if path is not None:
                    stderr().print(f"wrote {safe(str(path))}", style="dim", markup=False)

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
        WAITING.clear()
        if self.json:
            typer.echo(encodable(to_json(document)))
        else:
            stdout().print(view)
