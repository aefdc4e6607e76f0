"""Help texts: sections of aligned lines, the options that most need first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from svftool.cli.values import Taken

ALL = "--help-all"
_ARGS = "svftool.args"


class _PlainHelp:
    """Writes help as lines of two columns, without boxes and without a column of types."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write usage, what it does, options and an example."""
        self.format_usage(ctx, formatter)  # type: ignore[attr-defined]
        self.format_help_text(ctx, formatter)  # type: ignore[attr-defined]
        self.format_options(ctx, formatter)  # type: ignore[attr-defined]
        self.format_epilog(ctx, formatter)  # type: ignore[attr-defined]


class CommandLine(_PlainHelp, TyperGroup):
    """The command line as a whole."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the commands, then the options."""
        commands = [
            (name, (one.help or "").partition("\n")[0]) for name, one in self.commands.items()
        ]
        _write(formatter, "Commands", commands)
        _write(formatter, "Options", _records(ctx, self.get_params(ctx)))


class Command(_PlainHelp, TyperCommand):
    """A command whose help shows the options that most need.

    Attributes
    ----------
    first : sequence of str
        Names of those options; empty where all are shown.
    taken : mapping of str to Taken
        What its parameters take.
    """

    first: Sequence[str] = ()
    taken: Mapping[str, Taken] = {}

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keep what was given, for the help; answer ``--help-all``."""
        ctx.meta[_ARGS] = list(args)
        if ALL in args and not ctx.resilient_parsing:  # a shell that completes wants no help
            typer.echo(ctx.get_help(), color=ctx.color)
            ctx.exit()
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, and the options by their headings."""
        given = words_given(ctx)
        params = self.get_params(ctx)
        arguments = [one for one in params if one.param_type_name == "argument"]
        options = [one for one in params if one.param_type_name != "argument"]
        # Some versions of typer put the type behind the name of an argument.
        bare = [(name.partition(" <")[0], text) for name, text in _records(ctx, arguments)]
        _write(formatter, "Arguments", bare)
        task = value_of("--task", given)
        for heading, members in _by_panel(options, self._shown(given, task)).items():
            _write(formatter, heading, _records(ctx, members))
        if self.first and ALL not in given:
            formatter.write_paragraph()
            formatter.write_text(
                f"{ALL} shows every option, --task NAME --help those of one kind of data."
            )

    def _shown(self, given: Sequence[str], task: str | None) -> set[str] | None:
        """Return names of the options to show; None for all."""
        if not self.first or ALL in given:
            return None
        return {*self.first, *(_options_of_task(task) if task else ())}


def words_given(ctx: Any) -> Sequence[str]:
    """Return the words of the command line that a command was called with."""
    words: Sequence[str] = ctx.meta.get(_ARGS, ())
    return words


def value_of(flag: str, given: Sequence[str]) -> str | None:
    """Return what follows a flag on the command line."""
    for place, word in enumerate(given):
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
        if word == flag and place + 1 < len(given):
            return given[place + 1]
    return None


def _options_of_task(task: str) -> Iterator[str]:
    from svftool.tasks.option import options_in
    from svftool.tasks.options import TASKS

    if task in TASKS:
        yield from (name for name, _ in options_in(TASKS[task]))


def _by_panel(options: Iterable[Any], shown: set[str] | None) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = {}
    for one in options:
        if shown is None or one.name in shown or one.name == "help":
            panel = getattr(one, "rich_help_panel", None) or "Options"
            groups.setdefault(panel, []).append(one)
    return groups


def _records(ctx: Any, params: Iterable[Any]) -> list[tuple[str, str]]:
    found = (one.get_help_record(ctx) for one in params)
    return [record for record in found if record is not None]


def _write(formatter: Any, heading: str, records: Sequence[tuple[str, str]]) -> None:
    if records:
        with formatter.section(typer.style(heading, bold=True)):
            formatter.write_dl(records)
