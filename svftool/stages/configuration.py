"""The full configuration of a fine-tune, as the file that ``--config`` takes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from svftool.checkpoints import WEIGHT_SUFFIXES, replace_output, write_errors
from svftool.choices.training import UNMEASURED
from svftool.errors import UsageError
from svftool.files.names import TUNED_SUFFIX
from svftool.files.toml import to_toml
from svftool.tasks.option import TaskOptions, flag_of, options_in
from svftool.tasks.options import TASKS
from svftool.training import Settings
from svftool.version import __version__

RUN_FILE = "run.toml"
MARK = "# svftool finetune: what this run was made with."
"""First line of every configuration that is written."""

_HEAD = f"""{MARK}
# Repeat it: svftool finetune --config THIS-FILE -o NEW
# Paths are relative to the folder of this file. svftool {__version__}
"""
_LIBRARY_ONLY = ("lr_scale", "head_scale")
"""Settings that the command has no option for: written where they differ from the default."""


@dataclass(frozen=True)
class Configuration:
    """What `svftool.finetune` was called with; its parameters but for where the output goes.

    Attributes
    ----------
    places : mapping of str to path-like
        Files and folders by the names of their options; None where one was not given.
    named : mapping of str to object
        Other options by name; None or empty where one was not given.
    task : str
    model : str
    seeds : sequence of int
    settings : Settings
    options : mapping
        The task's own.
    """

    places: Mapping[str, str | os.PathLike[str] | None]
    named: Mapping[str, Any]
    task: str
    model: str
    seeds: Sequence[int]
    settings: Settings
    options: Mapping[str, Any] = field(default_factory=dict)

    def text(self, folder: Path) -> str:
        """Return the file's content, for a place in `folder`; the same for the same call."""
        try:
            return f"{_HEAD}\n{to_toml(self._values(folder))}"
        except UnicodeEncodeError:
            return f"{MARK}\n# A name is not UTF-8, and no TOML file can hold it.\n"

    def _values(self, folder: Path) -> dict[str, Any]:
        places = {
            name: relative(place, folder)
            for name, place in self.places.items()
            if place is not None
        }
        flat = {
            **places,
            "task": self.task,
            "model": _model(self.model, folder),
            **self.named,
            **_seeds(self.seeds),
            **_settings(self.settings),
        }
        values = {_flag(name): value for name, value in flat.items() if _is_given(value)}
        own = _task_options(self.task, self.options, folder)
        return {**values, **({self.task: own} if own else {})}


def relative(path: str | os.PathLike[str], folder: Path) -> str:
    """Return a path as seen from a folder; absolute where they share nothing but the root."""
    place, start = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    shared = os.path.commonpath([place, start])
    return str(place) if shared == place.anchor else os.path.relpath(place, start)


def _model(spec: str, folder: Path) -> str:
    source, _, name = spec.rpartition(":")
    return f"{relative(source, folder)}:{name}" if source.endswith(".py") else spec


def _seeds(seeds: Sequence[int]) -> dict[str, Any]:
    first, count = min(seeds, default=0), len(seeds)
    if list(seeds) == list(range(first, first + count)):
        return {"seeds": count, "seed": first}
    return {"seeds": list(seeds)}


def _settings(settings: Settings) -> dict[str, Any]:
    usual = Settings()
    values = {
        one.name: getattr(settings, one.name)
        for one in fields(Settings)
        if one.name not in _LIBRARY_ONLY or getattr(settings, one.name) != getattr(usual, one.name)
    }
    values["clip-grad"] = values.pop("clip") or 0.0
    single = values.pop("lr_of")
    if single:
        common = [] if settings.lr is None else [repr(settings.lr)]
        values["lr"] = ",".join([*common, *(f"{name}={rate!r}" for name, rate in single.items())])
    return values


def _task_options(task: str, given: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return a task's options by their flags, those that were not given included."""
    kind = TASKS[task]
    hints = get_type_hints(kind)
    chosen = kind(**given)
    values = {}
    for name, about in options_in(kind):
        value = getattr(chosen, name)
        is_path = Path in (about.type, hints[name], *get_args(hints[name]))
        if is_path and isinstance(value, (str, os.PathLike)):
            value = str(value) if os.fspath(value) == UNMEASURED else relative(value, folder)
        if callable(value):  # which no file holds: the command will say that it is no choice
            value = f"function {getattr(value, '__qualname__', type(value).__name__)}"
        if _is_given(value):
            values[_key_of(kind, name)] = value
    return values


def _key_of(kind: type[TaskOptions], name: str) -> str:
    return flag_of(kind, name).partition("/")[0].removeprefix("--")


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _is_given(value: Any) -> bool:
    return value is not None and not (isinstance(value, (list, tuple)) and not value)


def file_beside(target: Path) -> Path:
    """Return where the configuration of a single file goes: ``NAME.run.toml`` beside it."""
    stem = target.name.removesuffix(TUNED_SUFFIX)
    for suffix in WEIGHT_SUFFIXES:
        stem = stem.removesuffix(suffix)
    return target.with_name(f"{stem}.{RUN_FILE}")


def check_beside(target: Path) -> None:
    """Refuse an output whose configuration would replace a file of another kind.

    Raises
    ------
    UsageError
        If there is one.
    """
    place = file_beside(target)
    if target.suffix not in WEIGHT_SUFFIXES or not os.path.lexists(place):
        return
    try:
        ours = place.read_text(encoding="utf-8", errors="replace").startswith(MARK)
    except OSError:
        ours = False
    if not ours:
        raise UsageError(
            f"{place}: exists and is no configuration of a run, expected a free place for the one "
            f"of {target.name}. Choose another output, or move that file."
        )


def write_into(folder: Path, text: str) -> None:
    """Write a configuration into the folder of an output that is not published yet."""
    with write_errors(folder / RUN_FILE):
        (folder / RUN_FILE).write_text(text, encoding="utf-8")


def write_beside(target: Path, text: str) -> None:
    """Write a configuration beside a single file, whole or not at all."""
    with replace_output(file_beside(target), force=True, inputs=()) as partial:
        partial.write_text(text, encoding="utf-8")
