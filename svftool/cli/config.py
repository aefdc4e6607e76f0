"""``--config``: options of a command from a TOML file; those of the command line go before them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

from svftool.choices.training import UNMEASURED, parse_rates
from svftool.cli.help import value_of, words_given
from svftool.errors import UsageError
from svftool.files.toml import read_toml
from svftool.tasks.option import options_in
from svftool.tasks.options import TASKS

_LISTS = frozenset({"regime", "lr", "log_with", "features", "shots", "folds", "test_shots"})
"""Options whose value on the command line is a list with commas; a file may hold a real one."""
_NUMBERS = frozenset({"lr", "shots", "folds", "test_shots", "train_rank"})
"""Options that are texts on the command line, and may be numbers in a file."""
_EITHER = (("steps", "epochs"),)
"""Options of which one at most is given: that of the command line takes the place of both."""


def load(ctx: typer.Context, value: Path | None) -> Path | None:
    """Take the options of a file as the defaults of a command.

    Parameters
    ----------
    ctx : typer.Context
        Of the command whose options they are.
    value : Path or None
        The file; a relative path in it counts from the file's folder.

    Raises
    ------
    UsageError
        If the file cannot be read, or names what is no option, or gives one of them a wrong value.
    """
    if value is not None:
        chosen = _Reader(ctx, value).options()
        given = words_given(ctx)
        for group in _EITHER:
            if any(value_of(f"--{name}", given) is not None for name in group):
                chosen = {name: one for name, one in chosen.items() if name not in group}
        ctx.default_map = chosen
    return value


class _Reader:
    """Holds what a file says against the options of a command."""

    def __init__(self, ctx: Any, path: Path) -> None:
        self._ctx, self._path = ctx, path
        self._params = {
            alias: param
            for param in ctx.command.params
            if param.name not in ("config", "help")
            for alias in _aliases(param)
        }

    def options(self) -> dict[str, Any]:
        """Return the options by the names of their parameters, as the command line takes them."""
        content = read_toml(self._path, "a TOML file of options")
        task = str(value_of("--task", words_given(self._ctx)) or content.get("task", ""))
        task = task or str(self._params["task"].default if "task" in self._params else "")
        chosen: dict[str, Any] = {}
        for key, value in content.items():
            if isinstance(value, dict):
                found = dict(self._table(key, value))
                self._add(chosen, found if key == task else {})
            else:
                self._add(chosen, {self._known(key, self._params).name: (key, value)})
        return {
            name: self._value(self._params[name.replace("_", "-")], key, value)
            for name, (key, value) in chosen.items()
        }

    def _table(self, task: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """Yield the options in the table of a task."""
        if task not in TASKS:
            self._known(task, {**self._params, **dict.fromkeys(TASKS)})
            raise self._wrong(task, values, "an option's value; tables are those of tasks: "
                              f"{', '.join(TASKS)}")  # fmt: skip
        own = {name for name, _ in options_in(TASKS[task])}
        allowed = {alias: one for alias, one in self._params.items() if one.name in own}
        for key, value in values.items():
            yield self._known(key, allowed, f"{task}.").name, (f"{task}.{key}", value)

    def _add(self, chosen: dict[str, Any], more: Mapping[str, Any]) -> None:
        for name, (key, value) in more.items():
            if name in chosen:
                raise UsageError(
                    f"{self._path}: {chosen[name][0]} and {key} are the same option, "
                    "expected it once"
                )
            chosen[name] = (key, value)

    def _known(self, key: str, allowed: Mapping[str, Any], where: str = "") -> Any:
        plain = key.replace("_", "-")
        if plain in allowed:
            return allowed[plain]
        close = difflib.get_close_matches(plain, allowed, n=1)
        hint = f". Did you mean {where}{close[0]}?" if close else ". See --help-all for the options"
        task = f" of --task {where.rstrip('.')}" if where else ""
        raise UsageError(f"{self._path}: {where}{key} is no option{task}{hint}")

    def _wrong(self, key: str, value: Any, expected: str) -> UsageError:
        shown = "a table" if isinstance(value, dict) else repr(value)
        return UsageError(f"{self._path}: {key} is {shown[:80]}, expected {expected}")

    def _value(self, param: Any, key: str, value: Any) -> Any:
        """Check a value against its option, and return it as the command line would hold it."""
        taken = self._ctx.command.taken[param.name]
        if taken.count > 1:
            many = value if isinstance(value, list) else [value]
            if len(many) != taken.count or not all(_is_number(one) for one in many):
                raise self._wrong(key, value, f"a list of {taken.count} numbers")
            return many
        if taken.repeated:
            many = value if isinstance(value, list) else [value]
            return [self._single(param, key, one) for one in many]
        if isinstance(value, list) and param.name in _LISTS:
            value = ",".join(str(self._single(param, key, one)) for one in value)
        return self._single(param, key, value)

    def _single(self, param: Any, key: str, value: Any) -> Any:
        taken = self._ctx.command.taken[param.name]
        kind = str if taken.kind is Path else taken.kind
        if param.name in _NUMBERS and _is_number(value):
            value = str(value)
        fits = _is_number(value) if kind is float else type(value) is kind
        if not fits:
            raise self._wrong(key, value, taken.words)
        if param.name == "lr":
            self._check_rates(key, value)
        complaint = taken.complaint(value)
        if complaint:
            raise UsageError(f"{self._path}: {key} is {complaint}")
        return self._placed(param, value) if kind is str else value

    def _check_rates(self, key: str, value: str) -> None:
        try:
            parse_rates(value)
        except UsageError as error:
            raise UsageError(f"{self._path}: {key}: {error}") from None

    def _placed(self, param: Any, value: str) -> str:
        """Return a path as it is from here; other texts as they are."""
        if param.name == "model":
            source, _, name = value.rpartition(":")
            return f"{self._path.parent / source}:{name}" if source.endswith(".py") else value
        if self._ctx.command.taken[param.name].kind is Path and not (
            param.name == "evaluation" and value == UNMEASURED
        ):
            return str(self._path.parent / value)
        return value


def _aliases(param: Any) -> Iterator[str]:
    """Yield what an option is called in a file: by its flags, or by its name in the library."""
    yield param.name.replace("_", "-")
    yield from (flag.removeprefix("--") for flag in param.opts if flag.startswith("--"))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
