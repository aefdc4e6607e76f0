"""Add a change in the singular basis to a weight: ``W' = W + U diag(delta) Vh``, rounded once.

Merging adds the change to the stored weight rather than rebuilding the weight from its factors. A
layer whose singular values did not change therefore keeps its bytes, at any rank and in any dtype.
"""

from __future__ import annotations

import math
import operator
import sys
from dataclasses import dataclass
from functools import partial, reduce
from typing import Self

import torch
from torch import Tensor

from svftool.checkpoints.views import View, from_matrix, to_matrix
from svftool.factors.spectral import SpectralChange, Terms
from svftool.factors.store import LayerFactors
from svftool.numerics import ThreadPool
from svftool.numerics.rounding import beyond, round_once

_PRODUCT_ELEMENTS, _PRODUCT_ROWS = 1 << 18, 64
"""Entries of one block of the product, and its rows at least: fewer make the product slow."""

_PIECE_ELEMENTS = 1 << 16
"""Entries that are summed and rounded at a time: 512 KB in float64, so that they stay in cache."""


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
    pool: ThreadPool | None = None,
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
    pool : ThreadPool, optional
        Threads that help with blocks of rows; the result does not depend on their number.

    Returns
    -------
    Merged
        `weight` itself where `delta` is zero throughout.
    """
    terms = [(1.0, SpectralChange(delta))]
    return add_change(weight, factors, terms, view=view, clip=clip, dtype=dtype, pool=pool)


def add_change(
    weight: Tensor,
    factors: LayerFactors,
    terms: Terms,
    *,
    view: View,
    clip: bool = False,
    dtype: torch.dtype | None = None,
    pool: ThreadPool | None = None,
) -> Merged:
    """Add changes in the singular basis, each with its weight, to a weight; as `add_delta`.

    Parameters
    ----------
    weight, factors, view, clip, dtype, pool
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
    used = ThreadPool() if pool is None else pool
    sums = _Sums()
    if view == "batch":
        for e in range(matrices.shape[0]):
            one = LayerFactors(factors.U[e], factors.S[e], factors.Vh[e])
            found = [(factor, change.one(e)) for factor, change in terms]
            sums += _add_rows(matrices[e], _product(one, found), merged[e], clip, used)
    else:
        sums = _add_rows(matrices, _product(factors, terms), merged, clip, used)
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


@dataclass
class _Sums:
    """Norms that add up over blocks, and what the dtype could not hold."""

    weight: float = 0.0
    delta: float = 0.0
    error: float = 0.0
    overflow: int = 0
    undefined: int = 0

    @property
    def change(self) -> float:
        if self.delta == 0.0:
            return 0.0
        return self.delta / self.weight if self.weight > 0.0 else math.inf

    @property
    def loss(self) -> float:
        return self.error / self.delta if self.delta > 0.0 else 0.0

    def __iadd__(self, other: Self) -> Self:
        for kind in ("weight", "delta", "error"):
            setattr(self, kind, math.hypot(getattr(self, kind), getattr(other, kind)))
        self.overflow += other.overflow
        self.undefined += other.undefined
        return self


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


def _add_rows(
    matrix: Tensor, product: tuple[Tensor, Tensor], merged: Tensor, clip: bool, pool: ThreadPool
) -> _Sums:
    left, right = product
    m, n = matrix.shape
    rows = max(_PRODUCT_ROWS, _PRODUCT_ELEMENTS // max(1, n))
    few = max(1, _PIECE_ELEMENTS // max(1, n))
    found = [_Sums() for _ in range(0, m, rows)]

    def add(index: int) -> None:
        start, stop = index * rows, min((index + 1) * rows, m)
        block = left[start:stop] @ right
        for first in range(start, stop, few):
            part = slice(first, min(first + few, stop))
            change = block[part.start - start : part.stop - start]
            found[index] += _add(matrix[part].double(), change, merged[part], clip)

    pool.share([partial(add, index) for index in range(len(found))])
    return reduce(operator.iadd, found, _Sums())


def _add(base: Tensor, change: Tensor, merged: Tensor, clip: bool) -> _Sums:
    """Write the sum of a few rows, float64, into `merged`."""
    total, sums = base + change, _Sums()
    # One pass tells that all is well, and only where it is not, entries are looked at.
    if not float(total.abs().max() if total.numel() else 0.0) <= torch.finfo(merged.dtype).max:
        over = beyond(total, merged.dtype) | (total.isinf() & base.isfinite())
        sums.overflow, sums.undefined = int(over.sum()), int(total.isnan().sum())
        if sums.overflow and clip:
            top = torch.finfo(merged.dtype).max
            total = torch.where(over, total.clamp(-top, top), total)
    merged.copy_(round_once(total, merged.dtype))
    sums.weight, sums.delta = norm(base), norm(change)
    sums.error = norm(merged.double() - base - change)
    return sums
