"""Command functions with few parameters, command lines with many options.

A parameter of a command whose type is a dataclass stands for all of its fields, each an option. One
that is annotated with `TaskFlags` stands for the options of every task.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import MISSING, dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from svftool.errors import UsageError
from svftool.tasks.option import Option, choices_of, flag_of, options_in
from svftool.tasks.options import TASKS


@dataclass(frozen=True)
class TaskFlags:
    """Marks the parameter that takes the options of all tasks that were given.

    Attributes
    ----------
    evaluate : bool
        Only those that ``svftool evaluate`` knows, in its words.
    without : tuple of str
        Options that the command does not take.
    without_tasks : tuple of str
        Tasks whose own options it does not take.
    """

    evaluate: bool = False
    without: tuple[str, ...] = ()
    without_tasks: tuple[str, ...] = ()

    def parameters(self) -> Iterator[inspect.Parameter]:
        """Yield a parameter for each option; None where it is not given."""
        for name, about in self._options().items():
            help_text = about.evaluate_help if self.evaluate else None
            option = typer.Option(
                about.flag or f"--{name.replace('_', '-')}",
                metavar=about.metavar,
                min=about.limits[0],
                max=about.limits[1],
                rich_help_panel=about.panel,
                help=help_text or about.help,
                show_default=about.shown_default(evaluate=self.evaluate) or False,
            )
            yield _keyword(name, Annotated[_command_type(name, about) | None, option], None)

    def _options(self) -> dict[str, Option]:
        kinds = [kind for name, kind in TASKS.items() if name not in self.without_tasks]
        every = [found for kind in kinds for found in options_in(kind)]
        return {
            n: about
            for n, about in reversed(every)
            if (about.evaluate or not self.evaluate) and n not in self.without
        }


def options_of(task: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Read a task's own options from what a command was given.

    Parameters
    ----------
    task : str
        The value of ``--task``.
    given : mapping of str to object
        The options of all tasks by name; None where one was not given.

    Raises
    ------
    UsageError
        If an option of another task is given, or numbers are none.
    """
    own = dict(options_in(TASKS[task]))
    chosen = {}
    for name, value in given.items():
        if value is None:
            continue
        if name not in own:
            other = next(kind for kind in TASKS.values() if name in dict(options_in(kind)))
            raise UsageError(f"{flag_of(other, name)} has no meaning for --task {task}")
        read = own[name].read
        chosen[name] = value if read is None else read(flag_of(TASKS[task], name), value)
    return chosen


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that takes the fields of its dataclasses, and the options of the tasks.

    The command itself is called with the dataclasses, and with a mapping of the options given.
    """
    parameters = inspect.signature(command, eval_str=True).parameters
    groups = {name: list(_members(one)) for name, one in parameters.items() if _members(one)}

    def run(**given: Any) -> None:
        for name, members in groups.items():
            values = {one.name: given.pop(one.name) for one in members}
            kind = parameters[name].annotation
            given[name] = values if get_origin(kind) is Annotated else kind(**values)
        with _waiting(given):
            command(**given)

    shown = [p for name, one in parameters.items() for p in groups.get(name, [one])]
    run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    run.__doc__ = command.__doc__
    return run


def _waiting(given: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Show that a command has begun, where it has a display; libraries take long to import."""
    return next((one.waiting() for one in given.values() if hasattr(one, "waiting")), nullcontext())


def _members(one: inspect.Parameter) -> list[inspect.Parameter]:
    """List the parameters that one stands for; empty where it stands for itself."""
    kind = one.annotation
    if is_dataclass(kind):
        hints = get_type_hints(kind, include_extras=True)
        return [_keyword(f.name, hints[f.name], f.default) for f in fields(kind)]
    marks = get_args(kind)[1:] if get_origin(kind) is Annotated else ()
    return [p for mark in marks if isinstance(mark, TaskFlags) for p in mark.parameters()]


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    default = inspect.Parameter.empty if default is MISSING else default
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def _command_type(name: str, about: Option) -> Any:
    """Return an option's type on the command line: for texts, what any of the tasks allows."""
    if about.type is not None:
        return about.type
    hints = [
        get_type_hints(kind)[name] for kind in TASKS.values() if name in dict(options_in(kind))
    ]
    choices = dict.fromkeys(choice for hint in hints for choice in choices_of(hint))
    if choices:
        return Literal[tuple(choices)]
    if get_origin(hints[0]) in (Union, UnionType):
        return next(part for part in get_args(hints[0]) if part is not NoneType)
    return hints[0]
