"""Reading one pickled weight file without running code from it."""

from __future__ import annotations

import argparse
import pickle
import re
import threading
import warnings
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from svftool.checkpoints.base import Layout, TensorInfo
from svftool.errors import CheckpointError, ResourceError, SvftoolError, shortlist

# Finding the tensors in what a pickle holds: dictionaries within dictionaries.


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


ZIP_MAGIC = b"PK\x03\x04"

# Plain values that training scripts put beside the weights; none of them runs anything when built.
_numpy_core = np._core.multiarray  # type: ignore[attr-defined]
_PLAIN: list[Any] = [
    argparse.Namespace,
    np.dtype,
    np.ndarray,
    *(
        (getattr(_numpy_core, name), f"numpy.{package}.multiarray.{name}")
        for package in ("core", "_core")
        for name in ("scalar", "_reconstruct")
    ),
    *(type(np.dtype(code)) for code in "?bhilqBHILQefdFD"),
]
_LOADING = threading.Lock()
_AGAIN = "Copy or download the file again."
_SAVE = "Save the model's state_dict() with torch.save"


class PickleFile:
    """A pickle of torch open for reading: mapped where it is in zip format, else loaded whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            lazy = file.read(4) == ZIP_MAGIC
        self.tree = _load(path, lazy)
        self.nesting, passed_over = find_tensors(self.tree, str(path))
        self._tensors = _at(self.tree, self.nesting)
        tensors = {name: self._tensors[name] for name in tensor_names(self._tensors)}
        self.infos: Mapping[str, TensorInfo] = MappingProxyType(
            {name: _info(name, tensor, path) for name, tensor in tensors.items()}
        )
        self.metadata: Mapping[str, str] = {}
        self.tied = _tied(tensors)
        self.notes = tuple(_notes(path.name, lazy, self.nesting, passed_over))

    def read(self, name: str) -> Tensor:
        """Return one tensor that the caller owns; sparse and quantised ones as they are."""
        tensor: Tensor = self._tensors[name].detach()
        if self.infos[name].layout != "dense":
            return tensor
        return tensor.clone(memory_format=torch.contiguous_format)

    def close(self) -> None:
        """Let go of the tensors."""
        self.tree, self._tensors = {}, {}


def _at(tree: Any, nesting: tuple[str, ...]) -> Mapping[str, Any]:
    """Return the dictionary that the keys of `nesting` lead to."""
    for key in nesting:
        tree = tree[key]
    return cast("Mapping[str, Any]", tree)


def _load(path: Path, lazy: bool) -> Any:
    try:
        # The list of permitted classes and the warning filters belong to the whole process.
        with _LOADING, warnings.catch_warnings(), torch.serialization.safe_globals(_PLAIN):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=lazy)  # noqa: TID251
    except PermissionError:
        raise
    except Exception as error:  # noqa: BLE001 - a broken pickle can raise anything at all
        raise _refusal(path, error) from None


def _refusal(path: Path, error: Exception) -> SvftoolError:
    """Say in one line why torch did not load a file."""
    text = str(error)
    named = re.search(r"GLOBAL ([\w.]+)", text)
    if named:
        return CheckpointError(
            f"{path}: the pickle asks for {named[1]}, which could run code, expected tensors and "
            f"plain values only; nothing was run. {_SAVE} where you trust the file."
        )
    if "TorchScript" in text:
        return CheckpointError(
            f"{path}: a TorchScript program, expected a pickle of tensors. {_SAVE}."
        )
    if isinstance(error, pickle.UnpicklingError):
        return CheckpointError(
            f"{path}: a pickle that torch.save did not write, expected tensors and plain values "
            f"only; nothing was run. {_SAVE}."
        )
    if isinstance(error, MemoryError) or "allocate memory" in text or "not enough memory" in text:
        return ResourceError(
            f"{path}: no memory left to load the pickle, expected {path.stat().st_size} bytes or "
            "more. Convert it to safetensors on a larger machine."
        )
    reason = f"{type(error).__name__}: {text}".strip().partition("\n")[0][:120].rstrip(": ")
    return CheckpointError(
        f"{path}: the pickle is cut off or broken ({reason}), expected a file that torch.save "
        f"wrote. {_AGAIN}"
    )


def _info(name: str, tensor: Tensor, path: Path) -> TensorInfo:
    if tensor.is_nested or tensor.device.type != "cpu":
        raise CheckpointError(
            f"{path}: {name}: a tensor without values of its own, expected one with data. {_SAVE}."
        )
    return TensorInfo(name, tensor.dtype, tuple(tensor.shape), path.name, _layout(tensor))


def _layout(tensor: Tensor) -> Layout:
    if tensor.is_quantized:
        return "quantised"
    return "dense" if tensor.layout is torch.strided else "sparse"


def _tied(tensors: Mapping[str, Tensor]) -> tuple[tuple[str, ...], ...]:
    """Group the names whose tensors are the very same view of one storage."""
    groups: defaultdict[tuple[object, ...], list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        if _layout(tensor) == "dense" and tensor.numel():
            where = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            groups[where].append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def _notes(file: str, lazy: bool, nesting: tuple[str, ...], passed_over: list[str]) -> list[str]:
    notes = []
    if nesting:
        notes.append(f"{file}: the tensors were found under {' > '.join(map(repr, nesting))}")
    if passed_over:
        notes.append(f"{file}: tensors under {', '.join(map(repr, passed_over))} were not used")
    if not lazy:
        notes.append(f"{file}: a pickle in torch's old format, loaded into memory as a whole")
    return notes
