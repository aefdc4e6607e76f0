"""Finding the tensors in what a pickle holds: dictionaries within dictionaries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from svftool.errors import CheckpointError, shortlist

# In order of preference: the weights as trained before their moving averages.
KNOWN_KEYS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "module",
    "network",
    "net",
    "weights",
    "params",
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema_model",
    "params_ema",
    "ema",
)
_TRAINING = (
    "optim",
    "sched",
    "scaler",
    "loss",
    "callback",
    "loops",
    "rng",
    "hyper",
    "args",
    "config",
)
_DEPTH = 8
_WAY_OUT = "Save the model's state_dict() instead."


def tensor_names(mapping: Mapping[Any, Any]) -> list[str]:
    """Return the names under which a mapping directly holds tensors."""
    return [
        key for key, value in mapping.items() if isinstance(key, str) and isinstance(value, Tensor)
    ]


def find_tensors(tree: object, where: str) -> tuple[tuple[str, ...], list[str]]:
    """Find the dictionary of tensors in an unpickled object.

    Parameters
    ----------
    tree : object
        What the pickle held.
    where : str
        The file, for messages.

    Returns
    -------
    path : tuple of str
        Keys that lead to the dictionary, outermost first; empty when it is the object itself.
    passed_over : list of str
        Other dictionaries of tensors on the way, which were not chosen.

    Raises
    ------
    CheckpointError
        If there is no dictionary of tensors, or several and none has a known name.
    """
    path: tuple[str, ...] = ()
    passed_over: list[str] = []
    here = _dictionary(tree, where)
    for _ in range(_DEPTH):
        inner = _inner(here)
        key = _choose(here, inner, where)
        if key is None:
            break
        passed_over += [one for one in inner if one != key]
        path, here = (*path, key), here[key]
    if not tensor_names(here):
        keys = shortlist(map(repr, here), 5) or "no keys"
        raise CheckpointError(
            f"{where}: no tensors ({keys}), expected a dictionary of tensors, or one under "
            f"'state_dict' or 'model'. {_WAY_OUT}"
        )
    return path, passed_over


def _dictionary(tree: object, where: str) -> Mapping[Any, Any]:
    if isinstance(tree, Mapping):
        return tree
    kind = type(tree).__name__
    raise CheckpointError(
        f"{where}: the pickle holds a {kind}, expected a dictionary of tensors. {_WAY_OUT}"
    )


def _inner(mapping: Mapping[Any, Any]) -> list[str]:
    """Return the keys of dictionaries that hold tensors, the optimizer's and the like left out."""
    return [
        key
        for key, value in mapping.items()
        if isinstance(key, str)
        and isinstance(value, Mapping)
        and not key.lower().startswith(_TRAINING)
        and _holds_tensors(value, _DEPTH)
    ]


def _holds_tensors(mapping: Mapping[Any, Any], depth: int) -> bool:
    if tensor_names(mapping):
        return True
    return depth > 0 and any(
        _holds_tensors(value, depth - 1) for value in mapping.values() if isinstance(value, Mapping)
    )


def _choose(mapping: Mapping[Any, Any], inner: list[str], where: str) -> str | None:
    """Return the key to go into, or None to stay."""
    known = [key for key in KNOWN_KEYS if key in inner]
    if known:
        return known[0]
    if tensor_names(mapping) or not inner:
        return None
    if len(inner) == 1:
        return inner[0]
    raise CheckpointError(
        f"{where}: several dictionaries of tensors ({shortlist(map(repr, inner), 5)}), "
        "expected one. Save the one that is meant to a file of its own."
    )
