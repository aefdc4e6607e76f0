"""The command line: one file a command; each parses, calls one stage, hands the result to report.

A command is imported when it is called or listed, and none imports torch at its top, so that
``svftool --help`` and the refusal of a wrong option come at once.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from types import FrameType
from typing import Annotated, Any

import typer

from svftool.cli.common import keep_words, lasting_streams, stderr
from svftool.cli.help import Command, CommandLine
from svftool.cli.usage import is_help, said
from svftool.cli.values import taken_by
from svftool.errors import SvftoolError, refused
from svftool.report.text import one_line

NAMES = (
    "decompose",
    "finetune",
    "evaluate",
    "predict",
    "merge",
    "inspect",
    "lineage",
    "info",
    "extract",
    "convert",
    "demo",
    "schema",
)
"""The commands, in the order of the help; each is a module here."""

INTERRUPTED = 130
TERMINATED = 143


class Terminated(BaseException):
    """SIGTERM as an exception, so that cleaning up runs as for Ctrl-C."""


class Commands(Mapping[str, Any]):
    """The commands by name, each built when it is asked for."""

    def __getitem__(self, name: str) -> Any:
        if name not in NAMES:
            raise KeyError(name)
        return _build(name)

    def __iter__(self) -> Iterator[str]:
        return iter(NAMES)

    def __len__(self) -> int:
        return len(NAMES)


@cache
def _build(name: str) -> Any:
    from svftool.cli.signature import expanded

    module = import_module(f"svftool.cli.{name}")
    command = expanded(module.command)
    single = typer.Typer(add_completion=False, **_STYLE)
    single.command(name, cls=Command, epilog=module.EXAMPLE)(command)
    built: Any = typer.main.get_command(single)
    built.first = getattr(module, "FIRST", ())
    built.taken = taken_by(command)
    return built


class ErrorBoundary(CommandLine):
    """Turn expected failures into one line on stderr and the exit code of their class."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = Commands()  # type: ignore[assignment]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keep the words, for what is to say by which command it was made."""
        keep_words(args)
        return super().parse_args(ctx, args)

    def main(self, *args: Any, **settings: Any) -> Any:
        """Run the command line; what is wrong with it is one line, as every other error."""
        standalone = settings.pop("standalone_mode", True)
        try:
            code = super().main(*args, **{**settings, "standalone_mode": False})
        except typer.TyperException as error:
            if not standalone:
                raise
            wrong: Any = error
            if is_help(error):
                wrong.show()
            else:
                _say_error(said(error))
            sys.exit(wrong.exit_code)
        if standalone:
            sys.exit(code if isinstance(code, int) else 0)
        return code

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except SvftoolError as error:
            _report(error)
            raise typer.Exit(error.exit_code) from None
        except OSError as error:  # the system refused something that no stage foresaw
            failure = refused(error, "the system")
            _report(failure)
            raise typer.Exit(failure.exit_code) from None
        except KeyboardInterrupt:
            _say_error("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except Terminated as stop:
            if isinstance(stop.__context__, SvftoolError):
                _report(stop.__context__)
                raise typer.Exit(stop.__context__.exit_code) from None
            _say_error("terminated")
            raise typer.Exit(TERMINATED) from None


def _report(error: SvftoolError) -> None:
    if error.reported_elsewhere:
        return
    # A launcher ends what is left of a broken run while this says why it broke.
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        _say_error(str(error))
    finally:
        signal.signal(signal.SIGTERM, before)


def _say_error(message: str) -> None:
    console = stderr()
    console.print("error:", style="bold red", end=" ")
    console.print(one_line(message), markup=False)


_STYLE: dict[str, Any] = {
    "pretty_exceptions_enable": False,
    "rich_markup_mode": "rich",
    "context_settings": {"help_option_names": ["-h", "--help"], "max_content_width": 100},
}

app = typer.Typer(name="svftool", cls=ErrorBoundary, no_args_is_help=True, **_STYLE)


def _print_version(ctx: typer.Context, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from svftool.version import __version__

        typer.echo(f"svftool {__version__}")
        raise typer.Exit


@app.callback()
def svftool(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Convert, fine-tune, merge and audit checkpoints in the singular-value basis.

    Each weight is written as U diag(S) Vh; only the singular values S are trained.
    """


def main() -> None:
    """Run the command line; the entry point of the ``svftool`` script."""
    signal.signal(signal.SIGTERM, _terminate)
    # Large tensors in large pages: the system clears and maps them in a third of the time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        with lasting_streams():
            app()
    except SvftoolError as error:  # of the streams themselves; the others end in the boundary
        _report(error)
        sys.exit(error.exit_code)


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated
