"""Reading one pickled weight file without running code from it."""

from __future__ import annotations

import argparse
import logging
import os
import pathlib
import pickle
import re
import sys
import threading
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from svftool.checkpoints.base import Layout, TensorInfo, plain_name
from svftool.checkpoints.positions import Records, extent
from svftool.errors import CheckpointError, ResourceError, SvftoolError, shortlist, system_fault

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


Named = Callable[[Mapping[Any, Any]], list[str]]


def tensor_names(mapping: Mapping[Any, Any]) -> list[str]:
    """Return the names under which a mapping directly holds tensors."""
    return [
        key for key, value in mapping.items() if isinstance(key, str) and isinstance(value, Tensor)
    ]


def weight_names(mapping: Mapping[Any, Any]) -> list[str]:
    """Return the names of tensors and of arrays of numbers: the weights of other libraries."""
    return [key for key, value in mapping.items() if isinstance(key, str) and _is_weight(value)]


def _is_weight(value: object) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim > 0 and value.dtype.kind in "biufc"
    return isinstance(value, Tensor)


def find_tensors(tree: object, where: str) -> tuple[tuple[str, ...], dict[str, int]]:
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
    passed_over : dict of str to int
        What else holds tensors or arrays, beside the dictionary and in it, with their bytes.

    Raises
    ------
    CheckpointError
        If there is no dictionary of tensors, or several and none has a known name.
    """
    top = _dictionary(tree, where)
    # Arrays decide only where no tensor does: they are often statistics beside the weights.
    named: Named = tensor_names if _holds(top, _DEPTH, tensor_names) else weight_names
    path: tuple[str, ...] = ()
    passed_over: dict[str, int] = {}
    here = top
    for _ in range(_DEPTH):
        key = _choose(here, _inner(here, named), where, named)
        if key is None:
            break
        passed_over |= _beside(here, {key})
        path, here = (*path, key), here[key]
    names = weight_names(here)
    if not names:
        keys = shortlist(map(repr, here), 5) or "no keys"
        raise CheckpointError(
            f"{where}: no tensors ({keys}), expected a dictionary of tensors, or one under "
            f"'state_dict' or 'model'. {_WAY_OUT}"
        )
    return path, passed_over | _beside(here, set(names))


def _beside(mapping: Mapping[Any, Any], chosen: set[str]) -> dict[str, int]:
    """Return the bytes of tensors in every entry but the chosen ones, where there are any."""
    rest = {str(key): _bytes(one, _DEPTH) for key, one in mapping.items() if key not in chosen}
    return {key: size for key, size in rest.items() if size}


def _bytes(value: object, depth: int) -> int:
    """Return the bytes of all tensors in a value, whatever holds them."""
    if isinstance(value, Tensor | np.ndarray):
        return int(value.nbytes) if _is_weight(value) else 0
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    if depth and isinstance(value, list | tuple | set):
        return sum(_bytes(item, depth - 1) for item in value)
    return 0


def _dictionary(tree: object, where: str) -> Mapping[Any, Any]:
    if isinstance(tree, Mapping):
        return tree
    kind = type(tree).__name__
    raise CheckpointError(
        f"{where}: the pickle holds a {kind}, expected a dictionary of tensors. {_WAY_OUT}"
    )


def _inner(mapping: Mapping[Any, Any], named: Named) -> list[str]:
    """Return the keys of dictionaries that hold tensors, the optimizer's and the like left out."""
    return [
        key
        for key, value in mapping.items()
        if isinstance(key, str)
        and isinstance(value, Mapping)
        and not is_training_state(key)
        and _holds(value, _DEPTH, named)
    ]


def is_training_state(key: str) -> bool:
    """Tell whether an entry is the state of an optimizer and the like, by its name."""
    return key.lower().startswith(_TRAINING)


def _holds(mapping: Mapping[Any, Any], depth: int, named: Named) -> bool:
    if named(mapping):
        return True
    return depth > 0 and any(
        _holds(value, depth - 1, named) for value in mapping.values() if isinstance(value, Mapping)
    )


def _choose(mapping: Mapping[Any, Any], inner: list[str], where: str, named: Named) -> str | None:
    """Return the key to go into, or None to stay."""
    known = [key for key in KNOWN_KEYS if key in inner]
    if known:
        return known[0]
    if named(mapping) or not inner:
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
# Paths among hyper-parameters; those of the other system become pure ones.
_PLAIN += [
    (getattr(pathlib, own), f"{module}.{name}")
    for name, own in (
        ("PosixPath", "PosixPath" if os.name == "posix" else "PurePosixPath"),
        ("WindowsPath", "WindowsPath" if os.name == "nt" else "PureWindowsPath"),
        ("PurePosixPath", "PurePosixPath"),
        ("PureWindowsPath", "PureWindowsPath"),
    )
    for module in ("pathlib", "pathlib._local")
]
_TIMM_PREFERS = ("state_dict_ema", "model_ema")
_EXPANDED = 1 << 28
"""Bytes from which a tensor must have values of its own."""
logger = logging.getLogger(__name__)
_LOADING = threading.Lock()
_AGAIN = "Copy or download the file again."
_SAVE = "Save the model's state_dict() with torch.save"


class PickleFile:
    """A pickle of torch open for reading: by position where it is in zip format, else whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self._zipped = file.read(4) == ZIP_MAGIC
        self._records: Records | None = None
        self._tree: Any = None
        if self._zipped:
            self._records, self._tree = _open_records(path)
        if self._tree is None:
            self._tree = _load(path)
        try:
            self.nesting, passed_over = find_tensors(self._tree, str(path))
            self._tensors = _at(self._tree, self.nesting)
            self._weights = {
                name: _tensor(self._tensors[name], path, name)
                for name in weight_names(self._tensors)
            }
            self.infos: Mapping[str, TensorInfo] = MappingProxyType(
                {name: self._info(name, tensor) for name, tensor in self._weights.items()}
            )
        except BaseException:
            self.close()
            raise
        self.metadata: Mapping[str, str] = {}
        self.tied = _tied(self._weights)
        self.passed_over: Mapping[str, int] = passed_over
        self.rivals = {
            place: _bytes(_at(self._tree, place), _DEPTH)
            for place in other_weights(self._tree, self.nesting)
        }
        self.warnings = tuple(_warnings(path.name, self.passed_over))
        whole = "" if self._records is not None else _why_whole(self._zipped, self.infos)
        self.notes = (*_notes(path.name, whole, self.nesting, passed_over), *self.warnings)

    @property
    def tree(self) -> Any:
        """Everything in the pickle; tensors that are read by position are without values."""
        return self._tree

    def filled(self, tree: Any) -> Any:
        """Return a tree made from `tree` with the values of all its tensors.

        Raises
        ------
        CheckpointError
            If the file has been cut off since it was opened, or cannot be read.
        """
        if self._records is None:
            return tree
        try:
            return self._records.filled(tree)
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: reading what lies beside the tensors failed "
                f"({error.strerror or error}), expected a whole file. {_AGAIN}"
            ) from error

    def read(self, name: str) -> Tensor:
        """Return one tensor that the caller owns; sparse and quantised ones as they are.

        Raises
        ------
        CheckpointError
            If the file has been cut off since it was opened, or cannot be read.
        """
        tensor = self._weights[name].detach()
        if self.infos[name].layout != "dense":
            return tensor
        if self._records is None or tensor.device.type != "meta":
            return tensor.clone(memory_format=torch.contiguous_format)
        try:
            return self._records.read(tensor)
        except OSError as error:
            system_fault(error, self.path)
            raise CheckpointError(
                f"{self.path}: {name}: reading failed ({error.strerror or error}), expected "
                f"{tensor.nbytes} bytes. {_AGAIN}"
            ) from error

    def close(self) -> None:
        """Let go of the tensors."""
        self._tree, self._tensors, self._weights = {}, {}, {}
        if self._records is not None:
            self._records.close()

    def _info(self, name: str, tensor: Tensor) -> TensorInfo:
        where = f"{self.path}: {name}"
        lazy = self._records is not None and tensor.device.type == "meta"
        placed = lazy and Records.place(tensor) is not None
        if tensor.is_nested or (tensor.device.type != "cpu" and not placed):
            raise CheckpointError(
                f"{where}: a tensor without values of its own, expected one with data. {_SAVE}."
            )
        if lazy and self._records is not None and not self._records.holds(tensor):
            raise CheckpointError(
                f"{where}: its values are not in the file, expected "
                f"{tensor.untyped_storage().nbytes()} bytes. {_AGAIN}"
            )
        layout = _layout(tensor)
        if layout == "dense" and _is_blown_up(tensor):
            raise CheckpointError(
                f"{where}: {tensor.nbytes} bytes that repeat a few values of the file (strides "
                f"{shortlist(tensor.stride(), 4)}), expected values of its own. {_SAVE}."
            )
        return TensorInfo(name, tensor.dtype, tuple(tensor.shape), self.path.name, layout)


def _is_blown_up(tensor: Tensor) -> bool:
    """Tell whether a tensor is far larger than what the file holds of it."""
    return tensor.nbytes > max(_EXPANDED, extent(tensor) * tensor.element_size())


def _tensor(value: Any, path: Path, name: str) -> Tensor:
    """Return an entry as a tensor; an array of numbers becomes one."""
    if isinstance(value, Tensor):
        return value
    if value.nbytes > path.stat().st_size:
        raise CheckpointError(
            f"{path}: {name}: a numpy array of {value.nbytes} bytes, expected no more than the "
            f"file holds. {_AGAIN}"
        )
    native = value.dtype.newbyteorder("=")
    try:
        return torch.from_numpy(np.array(value, dtype=native, order="C"))
    except TypeError:
        raise CheckpointError(
            f"{path}: {name}: a numpy array of {value.dtype}, expected numbers that torch knows. "
            f"{_SAVE}."
        ) from None


def _at(tree: Any, nesting: tuple[str, ...]) -> Mapping[str, Any]:
    """Return the dictionary that the keys of `nesting` lead to."""
    for key in nesting:
        tree = tree[key]
    return cast("Mapping[str, Any]", tree)


def _open_records(path: Path) -> tuple[Records | None, Any]:
    """Load the structure alone, with the places of its values; nothing where that cannot be.

    Sparse and quantised tensors, and values in the byte order of other machines, are loaded whole.
    """
    try:
        records = Records(path)
    except ValueError as error:
        raise _refusal(path, error) from None
    try:
        if records.byteorder in (b"", sys.byteorder.encode()):
            return records, _unpickle(path, map_location="meta")
    except Exception as error:  # noqa: BLE001 - loading it whole says what is wrong
        logger.debug("%s: not by position: %s", path, error)
    records.close()
    return None, None


def _load(path: Path) -> Any:
    # Never mapped: a file that is cut off meanwhile would end the process.
    try:
        return _unpickle(path, map_location="cpu")
    except PermissionError:
        raise
    except Exception as error:  # noqa: BLE001 - a broken pickle can raise anything at all
        system_fault(error, path)
        raise _refusal(path, error) from None


def _unpickle(path: Path, **options: Any) -> Any:
    # The list of permitted classes and the warning filters belong to the whole process.
    with _LOADING, warnings.catch_warnings(), ExitStack() as stack:
        # At its end torch would take away what the caller permits too.
        missing = [one for one in _PLAIN if one not in torch.serialization.get_safe_globals()]
        stack.enter_context(torch.serialization.safe_globals(missing))
        warnings.simplefilter("ignore")
        return torch.load(path, weights_only=True, **options)  # noqa: TID251


def _refusal(path: Path, error: Exception) -> SvftoolError:
    """Say in one line why torch did not load a file."""
    text = str(error)
    named = re.search(r"GLOBAL ([\w.]+)", text)
    if named and named[1].startswith("torchao."):
        return CheckpointError(
            f"{path}: the pickle holds {named[1]}, a format of torchao that is not supported, "
            "expected plain tensors; nothing was run. Save the dequantised weights where you "
            "trust the file."
        )
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


def _layout(tensor: Tensor) -> Layout:
    if tensor.is_quantized:
        return "quantised"
    return "dense" if tensor.layout is torch.strided else "sparse"


def _tied(tensors: Mapping[str, Tensor]) -> tuple[tuple[str, ...], ...]:
    """Group the names whose tensors are the very same view of one storage."""
    groups: defaultdict[tuple[object, ...], list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        if _layout(tensor) == "dense" and tensor.numel():
            place = (Records.place(tensor), tensor.storage_offset(), tensor.data_ptr())
            groups[*place, tensor.dtype, tensor.shape, tensor.stride()].append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def _warnings(file: str, passed_over: Mapping[str, int]) -> Iterator[str]:
    """Say what may be weights and was not read."""
    found = {key: size for key, size in passed_over.items() if not is_training_state(key)}
    if not found:
        return
    sizes = shortlist((f"{key!r} {size:,} bytes" for key, size in found.items()), 8)
    text = f"{file}: tensors under {shortlist(map(repr, found), 8)} were not used ({sizes})"
    preferred = [key for key in _TIMM_PREFERS if key in found]
    if preferred:
        text += f"; timm loads {preferred[0]!r} in place of what was read"
    yield text


def _why_whole(zipped: bool, infos: Mapping[str, TensorInfo]) -> str:
    """Say why a pickle could not be read by position."""
    if not zipped:
        return "a pickle in torch's old format"
    if any(info.layout != "dense" for info in infos.values()):
        return "a pickle with sparse or quantised tensors"
    return "a pickle that cannot be read by position"


def other_weights(tree: Any, nesting: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Return the places of entries that a loader may take in place of the tensors found.

    These are dictionaries beside the chosen one, at any depth, whose key is one that loaders look
    for, or with tensors of the same names and shapes: moving averages, the best state so far.
    timm prefers ``state_dict_ema``.
    """
    chosen = _plain_shapes(_at(tree, nesting))
    found = []
    for depth, own in enumerate((*nesting, None)):
        here = _at(tree, nesting[:depth])
        found += [
            (*nesting[:depth], key)
            for key, value in here.items()
            if key != own
            and isinstance(value, Mapping)
            and not is_training_state(key)
            and _bytes(value, _DEPTH)
            and (key in KNOWN_KEYS or _rivals(value, chosen, _DEPTH))
        ]
    return found


def _plain_shapes(mapping: Mapping[Any, Any]) -> set[tuple[str, tuple[int, ...]]]:
    return {
        (plain_name(name), tuple(value.shape))
        for name, value in mapping.items()
        if isinstance(name, str) and isinstance(value, Tensor | np.ndarray)
    }


def _rivals(value: Mapping[Any, Any], chosen: set[tuple[str, tuple[int, ...]]], depth: int) -> bool:
    """Tell whether at least half of the tensors somewhere in an entry are named like the chosen."""
    own = _plain_shapes(value)
    if own and 2 * len(own & chosen) >= len(own):
        return True
    inner = [item for item in value.values() if isinstance(item, Mapping)]
    return depth > 0 and any(_rivals(item, chosen, depth - 1) for item in inner)


def _notes(
    file: str, whole: str, nesting: tuple[str, ...], passed_over: Mapping[str, int]
) -> list[str]:
    notes = []
    if nesting:
        notes.append(f"{file}: the tensors were found under {' > '.join(map(repr, nesting))}")
    state = [repr(key) for key in passed_over if is_training_state(key)]
    if state:
        notes.append(f"{file}: training state under {shortlist(state, 8)} was not used")
    if whole:
        notes.append(f"{file}: {whole}, loaded into memory as a whole")
    return notes
