"""Writing a pickle with the nesting, and everything beside the tensors, of the one it came from."""

from __future__ import annotations

import copy
import io
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from svftool.checkpoints.base import Checkpoint
from svftool.checkpoints.pickle_file import PickleFile
from svftool.errors import write_errors


def save_pickled(
    path: Path,
    template: Checkpoint,
    tensors: Mapping[str, Tensor],
    *,
    removed: Collection[str] = (),
) -> None:
    """Write tensors as a pickle that is nested like the checkpoint they came from.

    Everything else that a pickled template holds (epoch, optimizer) is kept, as are the types of
    its dictionaries, parameters, and storages that several names share, where their new values
    agree. Other weights of the same model (`rivals`) are left out. All tensors are held in memory.

    Parameters
    ----------
    path : Path
        The file to write; not the template's own.
    template : Checkpoint
        Open. A template without nesting (safetensors) gives a plain dictionary.
    tensors : mapping of str to Tensor
        New values; names that the template does not have are appended, names that are not given
        keep the template's value.
    removed : collection of str
        Names that are left out.

    Raises
    ------
    ResourceError
        If the disk refuses it.
    """
    # What was read as numbers is written as numbers, without the parts of its codes.
    removed = {*removed, *(name for name in template.hidden if name not in tensors)}
    single = template.files[0] if len(template.files) == 1 else None
    if isinstance(single, PickleFile):
        values = _share(template.tied, tensors)
        tree = single.filled(
            _replaced(single.tree, single.nesting, values, removed, rivals=set(single.rivals))
        )
    else:
        flat = dict.fromkeys([*template.infos, *tensors])
        tree = {
            name: _compact(tensors[name]) if name in tensors else template.read(name)
            for name in flat
            if name not in removed
        }
    with write_errors(path), _Recorder(path) as file:
        try:
            torch.save(tree, file)
        except RuntimeError:
            # torch reports a failed write in words of its own; the cause is what the file raised.
            if file.failure is None:
                raise
            raise file.failure from None


def rivals(template: Checkpoint) -> dict[str, int]:
    """Return the entries of a pickle that `save_pickled` leaves out, with their bytes.

    They hold other weights of the same model, such as moving averages. A loader that prefers them
    would load the model from before the change.
    """
    single = template.files[0] if len(template.files) == 1 else None
    if not isinstance(single, PickleFile):
        return {}
    return {" > ".join(place): size for place, size in single.rivals.items()}


class _Recorder(io.FileIO):
    """A new file that remembers why a write failed."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "xb")
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view):
                done += super().write(view[done:])
        except OSError as error:
            self.failure = error
            raise
        return done


def _share(tied: Collection[tuple[str, ...]], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return compact tensors, with one object for all names of a tied group that still agree."""
    values = {name: _compact(tensor) for name, tensor in tensors.items()}
    for group in tied:
        given = [name for name in group if name in values]
        if len(given) == len(group) and all(_same(values[given[0]], values[one]) for one in given):
            values.update(dict.fromkeys(given, values[given[0]]))
    return values


def _compact(tensor: Tensor) -> Tensor:
    """Return a tensor that does not drag a larger storage into the file."""
    tensor = tensor.detach().cpu()
    if tensor.layout is not torch.strided:
        return tensor
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


def _same(one: Tensor, other: Tensor) -> bool:
    """Tell whether two dense tensors agree bit for bit."""
    if one is other:
        return True
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    left, right = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(left, right)


def _replaced(
    tree: Any,
    nesting: tuple[str, ...],
    values: Mapping[str, Tensor],
    removed: Collection[str],
    *,
    rivals: Collection[tuple[str, ...]],
) -> Any:
    """Return a copy of the dictionaries on the way to the tensors, with the tensors replaced."""
    # A shallow copy keeps the class, and what state_dict() hangs onto its dictionary.
    here = copy.copy(tree)
    for place in rivals:
        if len(place) == 1:
            del here[place[0]]
    if nesting:
        key, *rest = nesting
        inner = [place[1:] for place in rivals if place[0] == key and len(place) > 1]
        here[key] = _replaced(tree[key], tuple(rest), values, removed, rivals=inner)
        return here
    for name, value in values.items():
        here[name] = _like(value, here.get(name))
    for name in removed:
        here.pop(name, None)
    return here


def _like(value: Tensor, old: object) -> object:
    if isinstance(old, np.ndarray):
        array = value.numpy()
        native = old.dtype.newbyteorder("=") == array.dtype
        return array.astype(old.dtype) if native else array  # its byte order
    if isinstance(old, nn.Parameter):
        return nn.Parameter(value, requires_grad=old.requires_grad)
    return value
