"""One parameter of the live model whose value follows trainable singular values.

It is made of one decomposed tensor of the file or, where a library packs weights, of several.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from svftool.attaching.layer import AttachedLayer, KeepsDtype, Region
from svftool.factors import add_delta

Mode = Literal["auto", "factored", "composed", "residual"]


class AttachedWeight(KeepsDtype):
    """One parameter of the live model whose value follows trainable singular values.

    Attributes
    ----------
    parts : ModuleList of AttachedLayer
        The file's tensors that lie in the parameter.
    regions : tuple of Region
        Where each of them lies.
    mode : {"auto", "factored", "composed", "residual"}
        The way that was asked for.
    """

    def __init__(
        self, parts: Sequence[AttachedLayer], regions: Sequence[Region], mode: Mode
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.regions = tuple(regions)
        self.mode: Mode = mode
        self._dense: tuple[object, Tensor] | None = None
        self._merged: tuple[object, weakref.ref[Tensor]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_dense": None, "_merged": None}

    def layers(self) -> list[tuple[AttachedLayer, Region]]:
        """Return each part with the region it lies in."""
        return [(cast(AttachedLayer, p), r) for p, r in zip(self.parts, self.regions, strict=True)]

    def copy_of(self, base: Tensor) -> Tensor:
        """Copy the base's weight into a layout in which every region is a view."""
        whole = all(region.whole for region in self.regions)
        layout = torch.preserve_format if whole else torch.contiguous_format
        return base.detach().clone(memory_format=layout)

    @property
    def single(self) -> AttachedLayer | None:
        """The one layer that is the whole parameter, where there is one."""
        layer, region = self.layers()[0]
        alone = len(self.parts) == 1 and region.whole and layer.view == "matrix"
        return layer if alone else None

    @property
    def trains(self) -> bool:
        """Whether any singular value of the parameter requires a gradient."""
        return any(layer.theta.requires_grad for layer, _ in self.layers())

    def compose(self, base: Tensor) -> Tensor:
        """Return the weight of the present singular values, differentiable in them."""
        deltas = [layer.delta() for layer, _ in self.layers()]
        composed: Tensor = ComposeWeight.apply(self, base.detach(), *deltas)
        return composed

    @torch.no_grad()
    def dense(self, base: Tensor) -> Tensor:
        """Return the weight of the present singular values, a constant kept until they change."""
        key = self._key(base)
        if self._dense is None or self._dense[0] != key:
            # An inference tensor would be of no use to a later pass that records gradients.
            with torch.inference_mode(False):
                self._dense = (key, self.compose(base) if self._touched() else base.detach())
        return self._dense[1]

    def forget(self) -> None:
        """Drop what `dense` keeps."""
        self._dense = None

    @torch.no_grad()
    def merged(self, base: Tensor) -> Tensor:
        """Return the weight as merging writes it: the delta added in float64, rounded once.

        The same tensor is returned as long as the caller keeps the last one, so that tied
        parameters stay one tensor in a state dictionary.
        """
        if not self._touched():
            return base.detach()
        key = self._key(base)
        kept = self._merged[1]() if self._merged is not None and self._merged[0] == key else None
        if kept is not None:
            return kept
        merged = self.copy_of(base)
        for layer, region in self.layers():
            view = region.of(merged)
            delta = layer.merging_delta()
            view.copy_(add_delta(view, layer.factors(), delta, view=layer.view).weight)
        self._merged = (key, weakref.ref(merged))
        return merged

    @torch.no_grad()
    def absorb(self, base: Tensor, weight: Tensor) -> float:
        """Set the singular values to those of a merged `weight`, if it is one.

        Returns
        -------
        float
            What singular values do not explain of the difference from `base`, relative to what
            rounding explains. Above 1 the weight is no merge of these factors; nothing is set.
        """
        change = (weight.to(base.device, torch.float64) - base.detach().double()).contiguous()
        rounding = torch.finfo(base.dtype).eps * float(base.detach().double().norm())
        allowed = 4 * rounding + 1e-3 * float(change.norm())
        deltas = []
        for layer, region in self.layers():
            part = region.of(change)
            deltas.append(layer.project(part))
            part.sub_(layer.change(deltas[-1]))
        share = float(change.norm()) / allowed if allowed > 0.0 else 0.0
        if share <= 1.0:
            for (layer, _), delta in zip(self.layers(), deltas, strict=True):
                layer.set_delta(delta)
        return share

    def _touched(self) -> bool:
        return any(bool(layer.delta().any()) for layer, _ in self.layers())

    def _key(self, base: Tensor) -> tuple[object, ...]:
        versions = [
            (x.data_ptr(), x._version)
            for layer, _ in self.layers()
            for x in (layer.theta, layer.offset)
        ]
        return (base.data_ptr(), base._version, base.dtype, *versions)


class ComposeWeight(torch.autograd.Function):
    """``W + sum_i U_i diag(delta_i) Vh_i`` over the parts of a live weight."""

    @staticmethod
    def forward(ctx: Any, weight: AttachedWeight, base: Tensor, *deltas: Tensor) -> Tensor:
        """Add each part's change to its region of the base's weight."""
        ctx.weight = weight
        composed = weight.copy_of(base)
        for (layer, region), delta in zip(weight.layers(), deltas, strict=True):
            region.of(composed).add_(layer.change(delta))
        return composed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Project the weight's gradient on each part's pairs of singular vectors."""
        weight: AttachedWeight = ctx.weight
        grads = [
            layer.project(region.of(gradient)) if wanted else None
            for (layer, region), wanted in zip(
                weight.layers(), ctx.needs_input_grad[2:], strict=True
            )
        ]
        return None, None, *grads


# Which of the three ways a layer runs: factored, composed or residual.


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
