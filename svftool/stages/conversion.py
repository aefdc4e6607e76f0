"""What converting an adapter or a tuned file writes: the layers, and everything beside them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from svftool.adapters.assembly import Source
from svftool.adapters.low_rank import LowRank, Truncated
from svftool.adapters.rewriting import Ranks
from svftool.adapters.writers import Entries
from svftool.checkpoints import matrix_shape
from svftool.stages.extract_lora import LeftOut


@dataclass(frozen=True)
class ConvertOptions:
    """How an adapter is converted.

    Attributes
    ----------
    layout : str or None
        ``peft``, ``kohya``, ``comfy`` or ``diffusers``; that of the input by default, ``peft`` for
        tuned files.
    rank : str or None
        ``8``, ``energy:0.95`` or ``error:0.1``; each layer keeps its own without it.
    base : path-like or None
        The model that the adapter belongs to; for tuned files its factors.
    dtype : str or None
        ``float32``, ``bfloat16`` or ``float16``; that of the input by default.
    """

    layout: str | None = None
    rank: str | None = None
    base: str | os.PathLike[str] | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class Layer:
    """A change that will be two matrices.

    Attributes
    ----------
    name : str
    matrix : (int, int)
    rank : int or None
        Of the product; None of a change that is none.
    form : callable
        Gives the product, or the change as a matrix.
    shown : str
        Its name for people.
    """

    name: str
    matrix: tuple[int, int]
    rank: int | None
    form: Callable[[], LowRank | Tensor]
    shown: str


@dataclass(frozen=True)
class Work:
    """What is to be written.

    Attributes
    ----------
    kind : str
        What the input is.
    layout : str
    is_folder : bool
    layers : sequence of Layer
    scaled : callable
        Whether the scale of a layer is stored.
    entries : callable
        Gives the entries of a layer.
    rest : callable
        Yields all other entries.
    metadata, config : callable
        Of what was written and what was done.
    weights_file : str or None
    dtype : torch.dtype
    whole : tuple of str
    dropped : sequence of LeftOut
    lost : float
        Sum of squares of what was dropped.
    cut : callable or None
        Finds the matrices of a layer of a tuned file.
    """

    kind: str
    layout: str
    is_folder: bool
    layers: Sequence[Layer]
    scaled: Callable[[str], bool]
    entries: Callable[[LowRank], Entries]
    rest: Source
    metadata: Callable[[Ranks, str], dict[str, str]]
    config: Callable[[Ranks], dict[str, Any] | None]
    weights_file: str | None
    dtype: torch.dtype
    whole: tuple[str, ...] = ()
    dropped: Sequence[LeftOut] = ()
    lost: float = 0.0
    cut: Callable[[str], Truncated] | None = None


def sides_of(shape: Sequence[int]) -> tuple[int, int]:
    """Return the sides of a weight's matrix."""
    m, n = matrix_shape(tuple(shape))
    return m, n


def plain_ranks(layers: Ranks) -> dict[str, int]:
    """Return the rank of every layer."""
    return {name: layer.rank for name, layer in layers.items()}
