"""The autograd functions that run a layer split at its singular values.

Neither of the two ways through the layer forms a weight gradient; each keeps one activation, the
input in the singular basis.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import CheckpointFunction

from svftool.attaching.split_maps import SplitMap, along

# Activation checkpointing: a region of the pass that is computed again during the backward pass.


def region() -> object | None:
    """Return what stands for the innermost checkpointed region that is running; None outside.

    Two calls in one region return the same object, and each pass over a region has its own.
    """
    if torch.compiler.is_compiling():
        return None  # a compiler handles checkpoints itself
    if torch.is_grad_enabled():
        hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
        pack = None if hooks is None else hooks[0]
        # Other hooks, which move what is saved to the CPU say, compute nothing again.
        return pack if getattr(pack, "__module__", None) == CheckpointFunction.__module__ else None
    frame = reentrant_frame()
    return None if frame is None else id(frame.f_locals["ctx"])


def reentrant_frame() -> FrameType | None:
    """Return the frame of the reentrant checkpoint whose function is running, without gradients."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not CheckpointFunction.forward.__code__:
        frame = frame.f_back
    return frame


def recomputing() -> bool:
    """Whether a backward pass is running, which computes checkpointed regions again."""
    return bool(torch._C._current_graph_task_id() != -1)


def kept_apart() -> AbstractContextManager[None]:
    """Keep what autograd saves from a checkpoint, which compares two passes over a region by it.

    A composed weight may come from outside the region the first time and from inside it the second.
    """
    return torch.autograd.graph.saved_tensors_hooks(_as_is, _as_is)  # type: ignore[no-any-return, unused-ignore]


@contextmanager
def untraced() -> Iterator[None]:
    """Compute constants that a trace of ``torch.jit`` takes as they are."""
    state = None if torch.compiler.is_compiling() else torch._C._get_tracing_state()
    if state is None:
        yield
        return
    resume: Any = getattr(torch._C, "_set_tracing_state")  # noqa: B009 (not in torch's stubs)
    resume(None)
    try:
        yield
    finally:
        resume(state)


def _as_is(saved: Tensor) -> Tensor:
    return saved


class SplitLayer(torch.autograd.Function):
    """``left(s * right(x)) + bias``, plus ``whole(x)`` where a dense weight is given.

    With ``s = S`` and no weight this is the factored way, with ``s = S - S_base`` and the base's
    weight the residual way. Gradients reach `x`, `s` and the bias. `rows` scales the outputs
    before the bias is added; factors scaled by it are made anew for the backward pass, not kept.
    With `rectify` a ReLU follows, of which a byte a value is kept instead of its output.
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
        rows: Tensor | None,
        rectify: bool,
    ) -> Tensor:
        """Run the layer and keep ``right(x)``."""
        z = split.right(x, right)
        scaled = _scaled(left, rows, 1 - split.inner)
        if weight is None:
            y = _expand(z, s, scaled, bias, split)
        else:
            dense = _scaled(weight, rows, split.outer)
            y = split.whole(x, dense, bias).add_(_expand(z, s, scaled, None, split))
        passed = passed_by(y.relu_()) if rectify else None
        ctx.split = split
        ctx.shape = tuple(x.shape)
        ctx.save_for_backward(z, s, right, left, weight, rows, passed)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of `x`, `s` and the bias."""
        z, s, right, left, weight, rows, passed = ctx.saved_tensors
        split: SplitMap = ctx.split
        want_x, want_s, _, _, _, want_bias, *_ = ctx.needs_input_grad
        dy = dy if passed is None else dy * passed
        g = None
        if want_x or want_s:
            g = split.left_adjoint(dy, _scaled(left, rows, 1 - split.inner))
        ds = dx = db = None
        if g is not None:
            dx, ds = _contract(
                g, z if want_s else None, s, right, ctx.shape if want_x else None, split
            )
            if dx is not None and weight is not None:
                dx = dx.add_(split.whole_adjoint(dy, _scaled(weight, rows, split.outer), ctx.shape))
        if want_bias:
            db = sum_positions(dy, split.channel, dy.dtype)
        return dx, ds, None, None, None, db, None, None, None


class Rectify(torch.autograd.Function):
    """A ReLU that keeps a byte a value for the backward pass, not its output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        """Clamp at zero, in `x` itself or in a new tensor."""
        y = x.relu_() if inplace else x.relu()
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(passed_by(y))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        """Let the gradient through where values were positive."""
        (passed,) = ctx.saved_tensors
        return dy * passed, None


def passed_by(y: Tensor) -> Tensor:
    """Return 1 where the output of a ReLU is not zero and 0 elsewhere, in bytes.

    The conversion to bool is several times as fast as a comparison, and products with bytes are
    several times as fast as with bools.
    """
    return y.to(torch.bool).view(torch.uint8)


def _scaled(kernel: Tensor, rows: Tensor | None, dim: int) -> Tensor:
    return kernel if rows is None else kernel * along(rows, kernel, dim)


def _expand(z: Tensor, s: Tensor, left: Tensor, bias: Tensor | None, split: SplitMap) -> Tensor:
    # s goes onto whichever is smaller, the activations or the left factor.
    if z.numel() > left.numel():
        return split.left(z, left * along(s, left, split.inner), bias)
    return split.left(z * along(s, z, split.channel), left, bias)


def _contract(
    g: Tensor,
    z: Tensor | None,
    s: Tensor,
    right: Tensor,
    shape: tuple[int, ...] | None,
    split: SplitMap,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of the input, of `shape`, and of `s`, or None for what is not given.

    `g` is this pass's own and is changed in place: memory that is in use already is cheaper than
    new memory. As in `_expand`, s goes onto whichever is smaller.
    """
    dx = ds = None
    scale_right = g.numel() > right.numel()
    if shape is not None and scale_right:
        dx = split.right_adjoint(g, right * along(s, right, 0), shape)
    if z is not None:
        product = g.mul_(z) if shape is None or scale_right else g * z
        ds = sum_positions(product, split.channel, s.dtype)
    if shape is not None and not scale_right:
        dx = split.right_adjoint(g.mul_(along(s, g, split.channel)), right, shape)
    return dx, ds


def sum_positions(values: Tensor, channel: int, dtype: torch.dtype) -> Tensor:
    """Sum over every dimension but `channel`."""
    kept = channel % values.ndim
    rest = [dim for dim in range(values.ndim) if dim != kept]
    return values.sum(rest, dtype=dtype) if rest else values.to(dtype)
