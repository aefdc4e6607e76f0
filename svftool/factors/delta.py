"""Add a change in the singular basis to a weight: ``W' = W + U diag(delta) Vh``, rounded once.

Merging adds the change to the stored weight rather than rebuilding the weight from its factors. A
layer whose singular values did not change therefore keeps its bytes, at any rank and in any dtype.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from svftool.checkpoints.views import View, from_matrix, to_matrix
from svftool.factors.spectral import SpectralChange, Terms
from svftool.factors.store import LayerFactors
from svftool.numerics.rounding import beyond, round_once

BLOCK_ELEMENTS = 1 << 22
"""Elements of one row block in float64 arithmetic: 32 MB."""


@dataclass(frozen=True)
class Merged:
    """A weight after its singular values were changed.

    Attributes
    ----------
    weight : Tensor
        Shape and dtype of the base's weight.
    relative_change : float
        ``||U diag(delta) Vh||_F / ||W||_F``, before rounding; infinite when W is zero.
    rounding_loss : float
        ``||round(W + D) - W - D||_F / ||D||_F`` for the delta D: the share that rounding to the
        weight's dtype swallowed. 0 where nothing changed, about 1 where D is below the rounding.
    overflow : int
        Entries of the sum that the weight's dtype cannot hold.
    undefined : int
        Entries of the sum that are NaN.
    """

    weight: Tensor
    relative_change: float
    rounding_loss: float
    overflow: int = 0
    undefined: int = 0


def add_delta(
    weight: Tensor,
    factors: LayerFactors,
    delta: Tensor,
    *,
    view: View,
    clip: bool = False,
    dtype: torch.dtype | None = None,
) -> Merged:
    """Add a change of singular values to a weight.

    Parameters
    ----------
    weight : Tensor
        The base's weight, any floating dtype; not changed.
    factors : LayerFactors
        Factors of the weight.
    delta : (..., k) Tensor
        Change of the singular values.
    view : {"matrix", "batch"}
        How the weight is seen as matrices.
    clip : bool
        Replace entries that the dtype cannot hold by its largest number, with their sign.
    dtype : torch.dtype, optional
        Of the result; the weight's if left out.

    Returns
    -------
    Merged
        `weight` itself where `delta` is zero throughout.
    """
    terms = [(1.0, SpectralChange(delta))]
    return add_change(weight, factors, terms, view=view, clip=clip, dtype=dtype)


def add_change(
    weight: Tensor,
    factors: LayerFactors,
    terms: Terms,
    *,
    view: View,
    clip: bool = False,
    dtype: torch.dtype | None = None,
) -> Merged:
    """Add changes in the singular basis, each with its weight, to a weight; as `add_delta`.

    Parameters
    ----------
    weight, factors, view, clip, dtype
        See `add_delta`. ``factors.S`` is what scales of rows and columns multiply.
    terms : sequence of (float, SpectralChange)
        What is summed in float64 before it is rounded, once.
    """
    terms = [(factor, one) for factor, one in terms if factor and one.moves()]
    if not terms:
        return Merged(weight, 0.0, 0.0)
    matrices = to_matrix(weight, view)
    merged = torch.empty_like(
        matrices, dtype=dtype or weight.dtype, memory_format=torch.contiguous_format
    )
    sums = _Sums(clip=clip)
    if view == "batch":
        for e in range(matrices.shape[0]):
            one = LayerFactors(factors.U[e], factors.S[e], factors.Vh[e])
            found = [(factor, change.one(e)) for factor, change in terms]
            _add_rows(matrices[e], _product(one, found), merged[e], sums)
    else:
        _add_rows(matrices, _product(factors, terms), merged, sums)
    return Merged(
        from_matrix(merged, tuple(weight.shape)),
        sums.change,
        sums.loss,
        overflow=sums.overflow,
        undefined=sums.undefined,
    )


def rebuild(
    factors: LayerFactors, S: Tensor, *, shape: tuple[int, ...], dtype: torch.dtype, view: View
) -> Tensor:
    """Build a weight from factors alone, ``U diag(S) Vh``, in float64 and rounded once.

    Parameters
    ----------
    factors : LayerFactors
        Factors of the weight; their own ``S`` is ignored.
    S : (..., k) Tensor
        Singular values to use.
    shape, dtype
        Of the weight to build.
    view : {"matrix", "batch"}
        How the weight is seen as matrices.
    """
    zero = torch.zeros(shape, dtype=torch.float64)
    return round_once(add_delta(zero, factors, S, view=view).weight, dtype)


def norm(values: Tensor) -> float:
    """Return the Euclidean norm of float64 values, also where their squares leave float64.

    Examples
    --------
    >>> norm(torch.tensor([3e300, 4e300], dtype=torch.float64))
    5e+300
    """
    found = float(torch.linalg.vector_norm(values))
    if _SMALL < found < _LARGE or values.numel() == 0:
        return found
    top = float(values.abs().max())
    if top == 0.0 or not math.isfinite(top):
        return top
    share = float(torch.linalg.vector_norm(values / top))
    return min(top * share, sys.float_info.max)


_SMALL, _LARGE = 1e-140, 1e150
"""Norms between which the squares of all entries that matter are normal numbers."""


class _Sums:
    """Norms that add up over row blocks, and what the dtype could not hold."""

    def __init__(self, *, clip: bool) -> None:
        self.clip = clip
        self.weight = self.delta = self.error = 0.0
        self.overflow = self.undefined = 0

    @property
    def change(self) -> float:
        if self.delta == 0.0:
            return 0.0
        return self.delta / self.weight if self.weight > 0.0 else math.inf

    @property
    def loss(self) -> float:
        return self.error / self.delta if self.delta > 0.0 else 0.0

    def add(self, base: Tensor, change: Tensor, dtype: torch.dtype) -> Tensor:
        """Take in a block of rows, float64; return their sum in `dtype`."""
        total = base + change
        self.undefined += int(total.isnan().sum())
        over = beyond(total, dtype) | (total.isinf() & base.isfinite())
        count = int(over.sum())
        self.overflow += count
        if count and self.clip:
            top = torch.finfo(dtype).max
            total = torch.where(over, total.clamp(-top, top), total)
        rounded = round_once(total, dtype)
        self.weight = math.hypot(self.weight, norm(base))
        self.delta = math.hypot(self.delta, norm(change))
        self.error = math.hypot(self.error, norm(rounded.double() - base - change))
        return rounded


def _product(factors: LayerFactors, terms: Terms) -> tuple[Tensor, Tensor]:
    """Return two thin matrices, float64, whose product is the sum of the changes."""
    products = [_one_product(factors, factor, change) for factor, change in terms]
    if len(products) == 1:
        return products[0]
    left, right = zip(*products, strict=True)
    return torch.cat(left, dim=1), torch.cat(right)


def _one_product(
    factors: LayerFactors, factor: float, change: SpectralChange
) -> tuple[Tensor, Tensor]:
    if change.plain:
        # Directions that did not change cost nothing.
        delta = change.delta.double() if factor == 1.0 else factor * change.delta.double()
        changed = torch.nonzero(delta).flatten()
        return factors.U[:, changed].double() * delta[changed], factors.Vh[changed].double()
    U, S, Vh = factors.U.double(), factors.S.double(), factors.Vh.double()
    left, right = change.to(U).product(U, S, Vh)
    return factor * left, right


def _add_rows(matrix: Tensor, product: tuple[Tensor, Tensor], merged: Tensor, sums: _Sums) -> None:
    left, right = product
    rows = max(1, BLOCK_ELEMENTS // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], rows):
        block = slice(start, start + rows)
        merged[block] = sums.add(matrix[block].double(), left[block] @ right, merged.dtype)
