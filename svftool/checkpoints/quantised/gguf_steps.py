"""How far the values lie apart that a block of GGUF can stand for.

Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from __future__ import annotations

import torch
from torch import Tensor

_FIRST = frozenset(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"))
"""Kinds whose blocks begin with the step of all their values, a half-precision number."""

_PAIRED = frozenset(("Q4_K", "Q5_K"))
_GROUP = {"Q2_K": 16, "Q3_K": 16, "Q6_K": 16}


def steps(kind: str, blocks: Tensor, values: Tensor) -> Tensor:
    """Return the distance of neighbouring values, as `values` shaped.

    Parameters
    ----------
    kind : str
        Name of the type.
    blocks : (b, bytes) Tensor
        uint8.
    values : (b, n) Tensor
        What the blocks stand for.

    Notes
    -----
    Where the layout does not state it in one place, it is the smallest distance of two values of a
    group, which is never more than what the group's values lie apart.
    """
    if kind in _FIRST:
        return _half(blocks[:, :2]).abs().expand_as(values)
    if kind in _PAIRED:
        return _paired(blocks).repeat_interleave(32, dim=1)
    if kind == "Q6_K":
        scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
        return (_half(blocks[:, 208:210]) * scales).abs().repeat_interleave(16, dim=1)
    groups = values.reshape(-1, _GROUP.get(kind, 32))
    apart = groups.sort(dim=1).values.diff(dim=1)
    least = torch.where(apart > 0, apart, torch.inf).amin(dim=1, keepdim=True)
    least = torch.where(least.isinf(), 0.0, least)
    return least.expand_as(groups).reshape(values.shape)


def _half(raw: Tensor) -> Tensor:
    return raw.contiguous().view(torch.float16).float()


def _paired(blocks: Tensor) -> Tensor:
    """Return the steps of eight groups of 32: six bits each, in twelve bytes, times one scale."""
    packed = blocks[:, 4:16].to(torch.int32)
    low, high = packed[:, :4] & 63, (packed[:, 8:] & 15) | ((packed[:, :4] >> 6) << 4)
    return (_half(blocks[:, :2]) * torch.cat((low, high), dim=1)).abs()
