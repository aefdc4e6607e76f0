"""One tensor of numbers that is stored as codes, scales and tables under several names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from svftool.checkpoints.base import TensorInfo


@dataclass(frozen=True)
class Numbers:
    """What codes stand for.

    Attributes
    ----------
    values : Tensor
        float32, in the shape of the tensor.
    step : callable
        Computes the distance from each value to the next one that its code could have stood for; of
        the two neighbours the farther one. A tensor that broadcasts to `values`.
    """

    values: Tensor
    step: Callable[[], Tensor]


@dataclass(frozen=True)
class Coded:
    """A tensor stored as codes.

    Attributes
    ----------
    name : str
        What the tensor is called where it is stored as numbers.
    shape : tuple of int
        Of the numbers.
    storage : str
        The format, as reports name it.
    parts : mapping of str to str
        Tensors of the file by what they are for; ``codes`` is among them.
    decode : callable
        Makes numbers of the parts' tensors, given under the same keys.
    """

    name: str
    shape: tuple[int, ...]
    storage: str
    parts: Mapping[str, str]
    decode: Callable[[Mapping[str, Tensor]], Numbers]


@dataclass(frozen=True)
class StoredParts:
    """What a format is recognised by.

    Attributes
    ----------
    infos : mapping of str to TensorInfo
        Every tensor of the files.
    config : mapping
        ``quantization_config`` of ``config.json``; empty where there is none.
    read : callable
        Reads one tensor; for small ones that say how others are stored.
    """

    infos: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    read: Callable[[str], Tensor]

    def ending(self, end: str) -> Iterator[tuple[str, TensorInfo]]:
        """Yield the tensors whose names end so, each under what its name begins with."""
        for name, info in self.infos.items():
            if name.endswith(end) and info.layout == "dense":
                yield name.removesuffix(end), info

    def get(self, name: str, *dtypes: torch.dtype) -> TensorInfo | None:
        """Return what is known of a tensor of one of these dtypes; None where there is none."""
        info = self.infos.get(name)
        return info if info is not None and info.dtype in dtypes else None


SCALES = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes that scales have in most formats."""


def gaps(levels: Tensor) -> Tensor:
    """Return how far each level of a table lies from the farther one of its neighbours.

    Parameters
    ----------
    levels : (k,) Tensor
        In any order; equal ones count once.
    """
    values, where = torch.unique(levels.float(), sorted=True, return_inverse=True)
    apart = values.diff()
    none = torch.zeros(1)
    return torch.maximum(torch.cat((none, apart)), torch.cat((apart, none)))[where]


def unpacked(
    words: Tensor, bits: int, *, dim: int = -1, order: Sequence[int] | None = None
) -> Tensor:
    """Take whole words apart into codes: ``(..., k, ...)`` to ``(..., k * codes, ...)``.

    Parameters
    ----------
    words : Tensor
        uint8 or int32.
    bits : int
        Of a code; divides those of a word.
    dim : int
        Dimension of `words` along which codes lie.
    order : sequence of int, optional
        Which codes of a word come one after the other, counted from its low bits; as they lie, by
        default.
    """
    dim %= words.ndim
    places = torch.tensor(order or range(8 * words.dtype.itemsize // bits), dtype=words.dtype)
    shifts = (bits * places).view(-1, *[1] * (words.ndim - 1 - dim))
    codes = (words.unsqueeze(dim + 1) >> shifts) & (2**bits - 1)
    return torch.flatten(codes, dim, dim + 1)


def looked_up(pairs: Tensor, levels: Tensor, *, high_first: bool = False) -> Tensor:
    """Return the levels that two codes a byte stand for: ``(..., k)`` to ``(..., 2 k)``.

    Parameters
    ----------
    pairs : Tensor
        uint8.
    levels : (16,) Tensor
    high_first : bool
        Whether the code in a byte's high half is the first one.
    """
    low, high = levels.repeat(16), levels.repeat_interleave(16)
    both = torch.stack((high, low) if high_first else (low, high), dim=-1)
    return both[pairs.int()].flatten(-2)
