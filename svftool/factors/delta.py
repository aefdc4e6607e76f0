"""Add a change of singular values to a weight: ``W' = W + U diag(delta) Vh``, rounded once.

Merging adds the change to the stored weight rather than rebuilding the weight from its factors. A
layer whose singular values did not change therefore keeps its bytes, at any rank and in any dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from svftool.checkpoints.views import View, from_matrix, to_matrix
from svftool.factors.store import LayerFactors

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
    """

    weight: Tensor
    relative_change: float
    rounding_loss: float


def add_delta(weight: Tensor, factors: LayerFactors, delta: Tensor, *, view: View) -> Merged:
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

    Returns
    -------
    Merged
        `weight` itself where `delta` is zero throughout.
    """
    if not torch.any(delta):
        return Merged(weight, 0.0, 0.0)
    matrices = to_matrix(weight, view)
    merged = torch.empty_like(matrices, memory_format=torch.contiguous_format)
    sums = _Sums()
    if view == "batch":
        for e in range(matrices.shape[0]):
            one = LayerFactors(factors.U[e], factors.S[e], factors.Vh[e])
            _add_rows(matrices[e], one, delta[e].double(), merged[e], sums)
    else:
        _add_rows(matrices, factors, delta.double(), merged, sums)
    return Merged(from_matrix(merged, tuple(weight.shape)), sums.change, sums.loss)


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
    return add_delta(zero, factors, S, view=view).weight.to(dtype)


class _Sums:
    """Squared norms that add up over row blocks."""

    def __init__(self) -> None:
        self.weight = self.delta = self.error = 0.0

    @property
    def change(self) -> float:
        if self.delta == 0.0:
            return 0.0
        return math.sqrt(self.delta / self.weight) if self.weight > 0.0 else math.inf

    @property
    def loss(self) -> float:
        return math.sqrt(self.error / self.delta) if self.delta > 0.0 else 0.0


def _add_rows(
    matrix: Tensor, factors: LayerFactors, delta: Tensor, merged: Tensor, sums: _Sums
) -> None:
    changed = torch.nonzero(delta).flatten()
    left = factors.U[:, changed].double() * delta[changed]
    right = factors.Vh[changed].double()
    rows = max(1, BLOCK_ELEMENTS // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], rows):
        block = slice(start, start + rows)
        base = matrix[block].double()
        change = left[block] @ right
        merged[block] = base + change
        sums.weight += float(base.square().sum())
        sums.delta += float(change.square().sum())
        sums.error += float((merged[block].double() - base - change).square().sum())
