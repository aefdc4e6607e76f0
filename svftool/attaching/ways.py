"""Which of the three ways a layer runs: factored, composed or residual."""

from __future__ import annotations

from typing import Literal

from svftool.attaching.layer import AttachedLayer
from svftool.attaching.weight import AttachedWeight

Way = Literal["factored", "composed", "residual"]


def choose_way(weight: AttachedWeight, positions: int) -> Way:
    """Choose how to run a layer whose map can be split at its singular values.

    Operations of one training step, counted in multiply-adds for N positions of an m x n weight of
    rank k: factored ``2 N k (m + n)``; residual that and ``2 N m n``; composed ``3 N m n`` for the
    layer and its weight gradient and ``2 m n k`` for the weight and its projection.

    Parameters
    ----------
    weight : AttachedWeight
        A weight that is one tensor of the file.
    positions : int
        Positions of the activations: batch times pixels or tokens.
    """
    layer = weight.single
    if layer is None or weight.mode == "composed":
        return "composed"
    if weight.mode == "residual":
        return "residual"
    if weight.mode == "factored":
        return "factored" if replaces_weight(layer) else "residual"
    exact = replaces_weight(layer)
    costs = count_operations(layer, positions)
    split: Way = "factored" if exact else "residual"
    return "composed" if costs["composed"] < costs[split] else split


def count_operations(layer: AttachedLayer, positions: int) -> dict[Way, int]:
    """Return the multiply-adds of one training step for each way to run a layer."""
    m, k = layer.U.shape
    n = layer.Vh.numel() // k
    factored = 2 * positions * k * (m + n)
    return {
        "factored": factored,
        "residual": factored + 2 * positions * m * n,
        "composed": 3 * positions * m * n + 2 * m * n * k,
    }


def runs_without_base(weight: AttachedWeight) -> bool:
    """Whether training passes use the factors alone, never the base's weight."""
    layer = weight.single
    factored = weight.mode in ("auto", "factored")
    return factored and layer is not None and replaces_weight(layer)


def replaces_weight(layer: AttachedLayer) -> bool:
    """Whether the factors stand for the weight: full rank, and in single precision or better."""
    return layer.exact and layer.U.dtype.itemsize >= 4
