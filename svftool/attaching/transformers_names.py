"""Where transformers puts a checkpoint's tensors: renamed, stacked or concatenated on loading.

transformers can turn a model's state dictionary back into the names and shapes of its checkpoint.
Applied to the live parameters themselves, most results are views of them, and a view says which
part of which parameter it is. Where it copies, the same is done to tensors of running numbers, and
the numbers that come out say where each value lies.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from svftool.attaching.layer import WHOLE, Region, is_own

Revert = Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]


def transformers_regions(model: nn.Module) -> dict[str, tuple[str, Region]]:
    """Return live name and region of every tensor that a transformers model reads from a file.

    Parameters
    ----------
    model : nn.Module
        Any model; one that holds a transformers model as a submodule will do.

    Returns
    -------
    mapping of str to (str, Region)
        By the name in the file; empty where no transformers model is found.
    """
    revert = _revert()
    for path, module in model.named_modules():
        if revert is not None and _is_pretrained(module):
            prefix = f"{path}." if path else ""
            found = _trace(module, revert)
            return {name: (prefix + live, region) for name, (live, region) in found.items()}
    return {}


def _is_pretrained(module: nn.Module) -> bool:
    return any(base.__name__ == "PreTrainedModel" for base in type(module).__mro__)


def _revert() -> Revert | None:
    # Asked for only where the library is loaded already: without it there is no such model.
    if "transformers" not in sys.modules:
        return None
    try:
        from transformers import core_model_loading
    except ImportError:
        return None
    return cast(Revert, core_model_loading.revert_weight_conversion)


def _trace(model: nn.Module, revert: Revert) -> dict[str, tuple[str, Region]]:
    live = _live_tensors(model)
    owners = {tensor.untyped_storage().data_ptr(): name for name, tensor in live.items()}
    found, copied = {}, []
    for name, tensor in revert(model, dict(live)).items():
        owner = owners.get(tensor.untyped_storage().data_ptr())
        if owner is None:
            copied.append(name)
        else:
            found[name] = (owner, _region(tensor, live[owner]))
    if copied:
        found |= _trace_copies(model, revert, live, copied)
    return found


def _live_tensors(model: nn.Module) -> dict[str, Tensor]:
    # A region is one of values row by row, however the live tensor lies.
    return {
        name: tensor.detach().contiguous()
        for name, tensor in model.state_dict(keep_vars=True).items()
        if is_own(name) and isinstance(tensor, Tensor)
    }


def _region(view: Tensor, live: Tensor) -> Region:
    offset = int(view.storage_offset()) - int(live.storage_offset())
    if offset == 0 and view.shape == live.shape and view.stride() == live.stride():
        return WHOLE
    return Region(offset, tuple(view.shape), tuple(view.stride()))


def _trace_copies(
    model: nn.Module, revert: Revert, live: Mapping[str, Tensor], copied: list[str]
) -> dict[str, tuple[str, Region]]:
    """Find the tensors that were copied by sending running numbers the same way."""
    starts, numbered, start = [], {}, 0
    for name, tensor in live.items():
        starts.append((start, name))
        numbered[name] = torch.arange(start, start + tensor.numel()).reshape(tensor.shape)
        start += tensor.numel()
    found = {}
    reverted = revert(model, numbered)
    for name in copied:
        numbers = reverted[name]
        first = int(numbers.flatten()[0]) if numbers.numel() else 0
        begin, owner = max(pair for pair in starts if pair[0] <= first)
        region = _affine(numbers - begin)
        if region is not None:
            found[name] = (owner, WHOLE if _is_all(region, live[owner]) else region)
    return found


def _affine(numbers: Tensor) -> Region | None:
    """Read offset and strides from running numbers, where they have such a pattern."""
    first = int(numbers.flatten()[0])
    strides = []
    for dim, size in enumerate(numbers.shape):
        step = int(numbers.select(dim, 1).flatten()[0]) - first if size > 1 else 1
        strides.append(step)
    region = Region(first, tuple(numbers.shape), tuple(strides))
    flat = torch.zeros(numbers.shape, dtype=torch.int64)
    for dim, (size, stride) in enumerate(zip(numbers.shape, strides, strict=True)):
        shape = [1] * numbers.ndim
        shape[dim] = size
        flat = flat + stride * torch.arange(size).reshape(shape)
    return region if torch.equal(flat + first, numbers) else None


def _is_all(region: Region, live: Tensor) -> bool:
    return region.offset == 0 and region.shape == live.shape and region.stride == live.stride()
