"""The autograd functions: a layer in factored or residual form, and a weight composed of factors.

Neither of the two ways through the layer forms a weight gradient; each keeps one activation, the
input in the singular basis.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from svftool.attaching.maps import SplitMap

if TYPE_CHECKING:
    from svftool.attaching.weight import AttachedWeight


def along(scale: Tensor, like: Tensor, channel: int) -> Tensor:
    """Shape a (k,) vector so that it multiplies dimension `channel` of `like`, in its dtype."""
    shape = [1] * like.ndim
    shape[channel] = -1
    return scale.to(like.dtype).view(shape)


class SplitLayer(torch.autograd.Function):
    """``left(s * right(x)) + bias``, plus ``whole(x)`` where a dense weight is given.

    With ``s = S`` and no weight this is the factored way, with ``s = S - S_base`` and the base's
    weight the residual way. Gradients reach `x`, `s` and the bias.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        s: Tensor,
        right: Tensor,
        left: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        split: SplitMap,
    ) -> Tensor:
        """Run the layer and keep ``right(x)``."""
        z = split.right(x, right)
        if weight is None:
            y = _expand(z, s, left, bias, split)
        else:
            y = split.whole(x, weight, bias).add_(_expand(z, s, left, None, split))
        ctx.split = split
        ctx.shape = tuple(x.shape)
        ctx.save_for_backward(z, s, right, left, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of `x`, `s` and the bias."""
        z, s, right, left, weight = ctx.saved_tensors
        split: SplitMap = ctx.split
        want_x, want_s, _, _, _, want_bias, _ = ctx.needs_input_grad
        g = split.left_adjoint(dy, left) if want_x or want_s else None
        ds = dx = db = None
        if g is not None and want_s:
            ds = sum_positions(g * z, split.channel, s.dtype)
        if g is not None and want_x:
            dx = _contract(g, s, right, ctx.shape, split)
            if weight is not None:
                dx = dx.add_(split.whole_adjoint(dy, weight, ctx.shape))
        if want_bias:
            db = sum_positions(dy, split.channel, dy.dtype)
        return dx, ds, None, None, None, db, None


def _expand(z: Tensor, s: Tensor, left: Tensor, bias: Tensor | None, split: SplitMap) -> Tensor:
    # s goes onto whichever is smaller, the activations or the left factor.
    if z.numel() > left.numel():
        return split.left(z, left * along(s, left, split.inner), bias)
    return split.left(z * along(s, z, split.channel), left, bias)


def _contract(
    g: Tensor, s: Tensor, right: Tensor, shape: tuple[int, ...], split: SplitMap
) -> Tensor:
    # As in `_expand`; the gradient is this pass's own and may be changed in place.
    if g.numel() > right.numel():
        return split.right_adjoint(g, right * along(s, right, 0), shape)
    return split.right_adjoint(g.mul_(along(s, g, split.channel)), right, shape)


def sum_positions(values: Tensor, channel: int, dtype: torch.dtype) -> Tensor:
    """Sum over every dimension but `channel`."""
    kept = channel % values.ndim
    rest = [dim for dim in range(values.ndim) if dim != kept]
    return values.sum(rest, dtype=dtype) if rest else values.to(dtype)


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
