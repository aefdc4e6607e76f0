"""The settings that a number was measured with, and where each of them came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from svftool.models import Preprocessing
from svftool.tasks.option import options_in
from svftool.tasks.options import TASKS

SIZES = ("image_size", "crop", "short_side", "sides", "interpolation")
"""What a task says of the size of its images."""

_NORMALISATION = ("mean", "std")


@dataclass(frozen=True)
class SourcedSetting:
    """One setting.

    Attributes
    ----------
    value : object
        Plain.
    source : str
        ``option``, ``tuned file``, ``merged checkpoint``, ``model``, ``data``, ``default``, or the
        file beside the weights that says it.
    """

    value: Any
    source: str


@dataclass(frozen=True)
class Origins:
    """What decides where settings came from.

    Attributes
    ----------
    given : mapping
        Options that the user gave.
    handed : mapping
        Options that the weights say themselves.
    trained : mapping
        What the task said when the weights were trained.
    weights : str
        How weights that say so are called: ``tuned file`` or ``merged checkpoint``.
    preprocessing : Preprocessing
        Of the checkpoint.
    """

    given: Mapping[str, Any]
    handed: Mapping[str, Any]
    trained: Mapping[str, Any]
    weights: str
    preprocessing: Preprocessing

    def of_option(self, name: str, otherwise: str = "default") -> str:
        """Say where an option's value came from."""
        if self.given.get(name) is not None:
            return "option"
        return self.weights if self.handed.get(name) is not None else otherwise

    def of_key(self, key: str, option: str, described: Mapping[str, Any]) -> str:
        """Say where something that a task describes came from."""
        if key in SIZES:
            return self._of_size(described)
        if key in _NORMALISATION:
            return self.of_option(option, self._beside())
        if key == "sequence_length":
            return self.of_option(option, "model")
        return self.of_option(option)

    def _of_size(self, described: Mapping[str, Any]) -> str:
        if self.given.get("image_size") is not None:
            return "option"
        if self.handed.get("image_size") is not None or "interpolation" in self.trained:
            return self.weights
        if self.preprocessing.size is not None:
            return self._beside()
        return "data" if described.get("short_side") is None else "default"

    def _beside(self) -> str:
        return self.preprocessing.source


def settings_of(
    task: str, described: Mapping[str, Any], origins: Origins, **more: SourcedSetting | None
) -> dict[str, SourcedSetting]:
    """Gather what a number depends on.

    Parameters
    ----------
    task : str
        A value of ``--task``.
    described : mapping
        What `svftool.tasks.base.Task.describe` says.
    origins : Origins
        What decides where they came from.
    more
        Settings that the task does not describe; they come first, None is left out.
    """
    keys = {
        about.recorded: name
        for name, about in options_in(TASKS[task])
        if about.recorded is not None and about.evaluate
    }
    keys = {**dict.fromkeys(SIZES, "image_size"), **keys}
    found = {name: one for name, one in more.items() if one is not None}
    for key, option in keys.items():
        value = described.get(key)
        if value is not None and key not in found:
            found[key] = SourcedSetting(value, origins.of_key(key, option, described))
    return found
