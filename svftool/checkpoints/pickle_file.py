"""Reading one pickled weight file without running code from it; writing one with the same nesting."""

from __future__ import annotations

import argparse
import copy
import io
import pickle
import re
import threading
import warnings
from collections import defaultdict
from collections.abc import Collection, Mapping, MutableMapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from svftool.checkpoints.base import Checkpoint, Layout, TensorInfo
from svftool.checkpoints.nesting import find_tensors, tensor_names
from svftool.errors import CheckpointError, UsageError

ZIP_MAGIC = b"PK\x03\x04"

# Plain values that training scripts put beside the weights; none of them runs anything when built.
_numpy_core = np._core.multiarray  # type: ignore[attr-defined]
_PLAIN: list[Any] = [
    argparse.Namespace,
    np.dtype,
    np.ndarray,
    *(
        (function, f"numpy.{package}.multiarray.{name}")
        for package in ("core", "_core")
        for name, function in (
            ("scalar", _numpy_core.scalar),
            ("_reconstruct", _numpy_core._reconstruct),
        )
    ),
    *(type(np.dtype(code)) for code in "?bhilqBHILQefdFD"),
]
_LOADING = threading.Lock()


class PickleFile:
    """A pickle of torch open for reading: mapped where it is in zip format, else loaded whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            lazy = file.read(4) == ZIP_MAGIC
        self.tree = _load(path, lazy)
        self.nesting, passed_over = find_tensors(self.tree, str(path))
        tensors = self._tensors()
        self.infos: Mapping[str, TensorInfo] = MappingProxyType(
            {name: _info(name, tensor, path.name) for name, tensor in tensors.items()}
        )
        self.metadata: Mapping[str, str] = {}
        self.tied = _tied(tensors)
        self.notes = tuple(_notes(path.name, lazy, self.nesting, passed_over))

    def read(self, name: str) -> Tensor:
        """Return one tensor that the caller owns."""
        tensor = self._tensors()[name].detach()
        if tensor.layout is not torch.strided or tensor.is_quantized:
            return tensor.clone()
        return tensor.clone(memory_format=torch.contiguous_format)

    def close(self) -> None:
        """Let go of the tensors."""
        self.tree = None

    def _tensors(self) -> dict[str, Tensor]:
        here: Any = self.tree
        for key in self.nesting:
            here = here[key]
        return {name: here[name] for name in tensor_names(here)}


def _load(path: Path, lazy: bool) -> Any:
    try:
        # The list of permitted classes and the warning filters belong to the whole process.
        with _LOADING, warnings.catch_warnings(), torch.serialization.safe_globals(_PLAIN):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=lazy)  # noqa: TID251
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - a broken pickle can raise anything at all
        raise _refusal(path, error) from None


def _refusal(path: Path, error: Exception) -> CheckpointError:
    """Say in one line why torch did not load a file."""
    text = str(error)
    named = re.search(r"GLOBAL ([\w.]+)", text)
    if named:
        return CheckpointError(
            f"{path}: the pickle asks for {named[1]}, which could run code, expected tensors and plain "
            "values only; nothing was run. Save the model's state_dict() where you trust the file."
        )
    if "TorchScript" in text:
        return CheckpointError(
            f"{path}: the file is a TorchScript program, expected a pickle of tensors. "
            "Save the model's state_dict() instead."
        )
    if isinstance(error, pickle.UnpicklingError):
        return CheckpointError(
            f"{path}: the pickle is not one that torch.save writes, expected tensors and plain values only; "
            "nothing was run. Save the model's state_dict() with torch.save."
        )
    reason = f"{type(error).__name__}: {text}".splitlines()[0][:120].rstrip(": ")
    return CheckpointError(
        f"{path}: the pickle is cut off or broken ({reason}), expected a file written by torch.save. "
        "Copy or download the file again."
    )


def _layout(tensor: Tensor) -> Layout:
    if tensor.is_quantized:
        return "quantised"
    return "dense" if tensor.layout is torch.strided else "sparse"


def _info(name: str, tensor: Tensor, file: str) -> TensorInfo:
    return TensorInfo(name, tensor.dtype, tuple(tensor.shape), file, _layout(tensor))


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
        notes.append(f"{file}: not used: the tensors under {', '.join(map(repr, passed_over))}")
    if not lazy:
        notes.append(f"{file}: a pickle in torch's old format, loaded into memory as a whole")
    return notes
