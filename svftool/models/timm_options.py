"""What a config.json may tell timm: a plain name, and arguments that describe the network."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import nn

from svftool.checkpoints import Checkpoint
from svftool.errors import ModelError, shortlist

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_COMMON = frozenset(
    [
        "drop_rate",
        "exportable",
        "features_only",
        "global_pool",
        "in_chans",
        "no_jit",
        "num_classes",
        "out_indices",
        "scriptable",
    ]
)
"""Arguments of every model of timm."""

_FILES = ("pretrained", "checkpoint", "cache_dir", "url", "path", "kwargs")
"""Beginnings of arguments that name files, or stand for any argument."""

_MOST_CLASSES = 1 << 20


def timm_options(name: Any, checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that ``timm.create_model`` takes from a ``config.json``.

    Arguments are those that the classes of the architecture's module take. Nothing that names a
    file or a place on the network is among them: timm unpickles a ``checkpoint_path``, and
    fetches the architecture ``hf-hub:...``.

    Parameters
    ----------
    name : object
        The architecture.
    checkpoint : Checkpoint
        Named in messages.
    config : mapping
        The ``config.json``.

    Raises
    ------
    ModelError
        If the name is not a plain one, an argument is not among those, or a value is of another
        type than expected.
    """
    if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
        raise ModelError(
            f"{checkpoint.path}: the architecture is {str(name)[:60]!r}, expected the plain name "
            "of a timm model. A model on the hub is fetched first, and its folder given."
        )
    arguments = _mapping(checkpoint, config, "model_args")
    _require_known(checkpoint, name, arguments)
    options = dict(arguments)
    if "num_classes" in config:
        options["num_classes"] = _class_count(checkpoint, config["num_classes"])
    elif "num_classes" in options:
        options["num_classes"] = _class_count(checkpoint, options["num_classes"])
    pretrained = _mapping(checkpoint, config, "pretrained_cfg")
    if pretrained:
        options["pretrained_cfg"] = {**pretrained, "architecture": name}
    return options


def _mapping(checkpoint: Checkpoint, config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise _wrong(checkpoint, key, value, "an object")
    return value


def _class_count(checkpoint: Checkpoint, value: Any) -> int:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole and not (isinstance(value, str) and value.isdecimal() and len(value) < 9):
        raise _wrong(checkpoint, "num_classes", value, "a whole number")
    if not 0 <= int(value) <= _MOST_CLASSES:
        raise _wrong(checkpoint, "num_classes", value, f"a number from 0 to {_MOST_CLASSES}")
    return int(value)


def _wrong(checkpoint: Checkpoint, key: str, value: Any, expected: str) -> ModelError:
    return ModelError(
        f"{checkpoint.path}: config.json: {key} is {repr(value)[:60]}, expected {expected}. "
        "Repair config.json, or name the model with --model."
    )


def _require_known(checkpoint: Checkpoint, name: str, arguments: Mapping[str, Any]) -> None:
    if not arguments:
        return
    known = _known_arguments(name)
    unknown = sorted(key for key in arguments if key not in known)
    if unknown:
        raise ModelError(
            f"{checkpoint.path}: config.json: model_args holds {shortlist(unknown)}, expected "
            f"arguments of the network {name!r}. Remove them from config.json, or name the model "
            "with --model FILE.py:FACTORY."
        )


def _known_arguments(name: str) -> set[str]:
    """Return the arguments of the classes and functions that make an architecture."""
    from timm.models import is_model, model_entrypoint

    plain = name.partition(".")[0]
    if not is_model(plain):
        return set(_COMMON)
    module = sys.modules[model_entrypoint(plain).__module__]
    known = set(_COMMON)
    for value in vars(module).values():
        if inspect.isclass(value) and issubclass(value, nn.Module):
            known |= set(inspect.signature(value.__init__).parameters)
        elif is_dataclass(value):
            known |= {field.name for field in fields(value)}
        elif inspect.isfunction(value) and value.__module__ == module.__name__:
            known |= set(inspect.signature(value).parameters)
    return {key for key in known - {"self"} if not key.startswith(_FILES)}
