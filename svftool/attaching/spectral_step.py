"""A layer that has more than singular values, run through the frozen singular vectors.

Scales go onto activations, entries of M onto what is in the singular basis, and a remainder is two
thin products of its own. So the vectors are neither copied nor given gradients, but where that
takes fewer operations. Gradients come by autograd.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from svftool.attaching.layer import AttachedLayer
from svftool.attaching.split_maps import SplitMap, along, mix_channels
from svftool.factors import SpectralChange


def run_change(
    x: Tensor,
    layer: AttachedLayer,
    dense: Tensor | None,
    bias: Tensor | None,
    split: SplitMap,
    *,
    dtype: torch.dtype,
    positions: int,
) -> Tensor:
    """Run a layer through its factors, or beside its base's dense weight.

    Parameters
    ----------
    x : Tensor
        Activations in `dtype`, or indices of an embedding.
    layer : AttachedLayer
        Of the matrix view.
    dense : Tensor or None
        The base's weight as the layer multiplies by it, where the factors do not replace it.
    bias : Tensor or None
        In `dtype`, as `dense` is.
    split : SplitMap
    dtype : torch.dtype
        What is computed in.
    positions : int
        Positions of the activations: batch times pixels or tokens.
    """
    change = layer.present()
    mixed, folded = _entry_operations(layer, positions)
    step = _Step(layer, change, split, dtype, folds=folded < mixed)
    y = step.factored(x, bias) if dense is None else step.beside(x, dense, bias)
    if change.B is None or change.A is None:
        return y
    remainder = change.A.reshape(-1, *layer.shape[1:])
    right, left = split.kernels(change.B.to(dtype), remainder.to(dtype))
    return y + split.left(split.right(x, right), left, None)


class _Step:
    """One pass through a layer; with `folds` entries are multiplied into its left vectors.

    What changes keeps its own dtype, and is rounded to that of the activations where it meets them.
    """

    def __init__(
        self,
        layer: AttachedLayer,
        change: SpectralChange,
        split: SplitMap,
        dtype: torch.dtype,
        *,
        folds: bool,
    ) -> None:
        self.change, self.split, self.dtype, self.folds = change, split, dtype, folds
        self.U, self.S, self.Vh = (one.detach() for one in (layer.U, layer.S_base, layer.Vh))
        scales = (change.row, change.col) if split.swapped else (change.col, change.row)
        self.of_inputs, self.of_outputs = scales

    def factored(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``R U M Vh C x + bias``."""
        scales = (self.of_inputs, self.of_outputs)
        inputs, outputs = (None if one is None else 1.0 + one for one in scales)
        if self.folds:
            right, left = self._kernels(self.U * self.S.to(self.U) + self._moved())
            return self.split.left(self.split.right(x, right, inputs), left, bias, outputs)
        right, left = self._kernels(self.U)
        z = self._mixed(self.split.right(x, right, inputs), self.S + self.change.delta)
        return self.split.left(z, left, bias, outputs)

    def beside(self, x: Tensor, dense: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``W x + (R U M Vh C - U S Vh) x + bias``: what does not change adds zeros."""
        y = self.split.whole(x, dense, bias)
        if self.folds and self.change.linear:
            right, left = self._kernels(self._moved())
            return y + self.split.left(self.split.right(x, right), left, None)
        right, left = self._kernels(self.U)
        z = self.split.right(x, right)
        scaled = None if self.of_inputs is None else self.split.right(x, right, self.of_inputs)
        z = z if scaled is None else z + scaled
        moved = self._mixed(z, self.change.delta)
        y = y + self.split.left(moved if scaled is None else moved + self._by(scaled), left, None)
        if self.of_outputs is None:
            return y
        return y + self.split.left(moved + self._by(z), left, None, self.of_outputs)

    def _kernels(self, U: Tensor) -> tuple[Tensor, Tensor]:
        return self.split.kernels(U.to(self.dtype), self.Vh.to(self.dtype))

    def _moved(self) -> Tensor:
        return self.change.to(self.U).moved(self.U)

    def _by(self, z: Tensor) -> Tensor:
        """Return ``S z``."""
        return z * along(self.S, z, self.split.channel)

    def _mixed(self, z: Tensor, diagonal: Tensor) -> Tensor:
        """Return ``D z``, and what the entries beside the diagonal add."""
        block, value, channel = self.change.block, self.change.value, self.split.channel
        if block is None or value is None:
            return z * along(diagonal, z, channel)
        rows, columns, entries = block.rows, block.columns, block.filled(value)
        if self.split.swapped:
            rows, columns, entries = columns, rows, entries.t()
        if len(rows) == len(columns) == len(diagonal):
            return mix_channels(z, torch.diag(diagonal) + entries, channel)
        mixed = mix_channels(z.index_select(channel, columns), entries, channel)
        return (z * along(diagonal, z, channel)).index_add(channel, rows, mixed)


def _entry_operations(layer: AttachedLayer, positions: int) -> tuple[int, int]:
    """Return the multiply-adds of a step for entries: with activations, and with left vectors."""
    m, k = layer.U.shape
    size = _block_size(layer)
    return 3 * positions * size, positions * m * k + 2 * m * size


def _block_size(layer: AttachedLayer) -> int:
    block = layer.extras.block(layer.rank, layer.S_base.device)
    return 0 if block is None else len(block.rows) * len(block.columns)


def count_change(layer: AttachedLayer, positions: int) -> tuple[int, int, int]:
    """Return the multiply-adds of a step that what is trained beside singular values takes.

    Parameters
    ----------
    layer : AttachedLayer
        Of the matrix view.
    positions : int
        Positions of the activations: batch times pixels or tokens.

    Returns
    -------
    factored, residual, composed : int
        In each way to run the layer. A composed weight is the product of two thin matrices. It is
        formed twice, and its gradient is taken to whichever of them follows what is trained.
    """
    if layer.plain:
        return 0, 0, 0
    m, k = layer.U.shape
    n = layer.Vh.numel() // k
    extras = layer.extras
    rows, columns = (extras.row is not None, extras.col is not None)
    rank = 0 if extras.B is None else extras.B.shape[-1]
    factored = min(_entry_operations(layer, positions)) + 3 * positions * rank * (m + n)
    if columns and prod(layer.shape[2:]) > 1:
        factored += positions * k * n  # the gradient of a scaled kernel
    residual = factored + 2 * positions * k * (m * rows + n * columns)
    products = m * n * (k * (1 + rows + columns) + rank)
    composed = (4 if columns or rank else 3) * products - 2 * m * n * k
    return factored, residual, composed + 3 * m * _block_size(layer)
