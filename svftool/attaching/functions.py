"""A layer's map split at its singular values, and the autograd functions that run it.

Neither of the two ways through the layer forms a weight gradient; each keeps one activation, the
input in the singular basis.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import CheckpointFunction

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


# A layer's linear map split at its singular values: right vectors, left vectors, adjoints.


_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


class SplitMap(Protocol):
    """The four half steps of a layer, and its whole step for the residual way."""

    @property
    def channel(self) -> int:
        """Dimension of the activations that holds channels."""

    @property
    def inner(self) -> int:
        """Dimension of the left factor that holds the singular basis; the other one is outputs."""

    @property
    def outer(self) -> int:
        """Dimension of the dense weight that holds outputs."""

    def right(self, x: Tensor, right: Tensor) -> Tensor:
        """Project activations on the right singular vectors."""

    def left(self, z: Tensor, left: Tensor, bias: Tensor | None) -> Tensor:
        """Expand in the left singular vectors and add the bias."""

    def left_adjoint(self, dy: Tensor, left: Tensor) -> Tensor:
        """Project the output's gradient on the left singular vectors."""

    def right_adjoint(self, g: Tensor, right: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Take a gradient in the singular basis to the input, of `shape`."""

    def whole(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the dense weight and add the bias."""

    def whole_adjoint(self, dy: Tensor, weight: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Take the output's gradient to the input through the dense weight."""


@dataclass(frozen=True)
class LinearMap:
    """``y = x W'`` with ``left`` (m, k), ``right`` (k, n) and a dense weight (m, n)."""

    channel: int = -1
    inner: int = 1
    outer: int = 0

    def right(self, x: Tensor, right: Tensor) -> Tensor:
        """Return ``x right'``."""
        return F.linear(x, right)

    def left(self, z: Tensor, left: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``z left' + bias``."""
        return F.linear(z, left, bias)

    def left_adjoint(self, dy: Tensor, left: Tensor) -> Tensor:
        """Return ``dy left``."""
        return dy @ left

    def right_adjoint(self, g: Tensor, right: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return ``g right``."""
        return g @ right

    def whole(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x weight' + bias``."""
        return F.linear(x, weight, bias)

    def whole_adjoint(self, dy: Tensor, weight: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return ``dy weight``."""
        return dy @ weight


@dataclass(frozen=True)
class ConvMap:
    """A convolution: ``right`` is a kernel with k outputs, ``left`` a pointwise one.

    Only one of a single group can be split.

    Attributes
    ----------
    stride, padding, dilation : tuple of int
        One number for each spatial dimension.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    channel: int = 1
    inner: int = 1
    outer: int = 0

    @property
    def dims(self) -> int:
        """Number of spatial dimensions."""
        return len(self.stride)

    def right(self, x: Tensor, right: Tensor) -> Tensor:
        """Convolve with the right singular vectors."""
        return _CONV[self.dims](x, right, None, self.stride, self.padding, self.dilation)

    def left(self, z: Tensor, left: Tensor, bias: Tensor | None) -> Tensor:
        """Mix channels with the left singular vectors."""
        return _CONV[self.dims](z, left, bias)

    def left_adjoint(self, dy: Tensor, left: Tensor) -> Tensor:
        """Mix channels with the transposed left singular vectors."""
        return _TRANSPOSED[self.dims](dy, left)

    def right_adjoint(self, g: Tensor, right: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Transposed convolution with the right singular vectors."""
        return self.whole_adjoint(g, right, shape)

    def whole(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve with the dense weight."""
        sizes = (self.stride, self.padding, self.dilation)
        return _CONV[self.dims](x, weight, bias, *sizes, self.groups)

    def whole_adjoint(self, dy: Tensor, weight: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Transposed convolution, back to the spatial size of `shape`."""
        rest = tuple(
            size - ((out - 1) * stride - 2 * pad + dilation * (kernel - 1) + 1)
            for size, out, stride, pad, dilation, kernel in zip(
                shape[2:],
                dy.shape[2:],
                self.stride,
                self.padding,
                self.dilation,
                weight.shape[2:],
                strict=True,
            )
        )
        return _TRANSPOSED[self.dims](
            dy, weight, None, self.stride, self.padding, rest, 1, self.dilation
        )


@dataclass(frozen=True)
class TransposedConvMap:
    """A transposed convolution of one group; its weight (in, out, ...) is seen as (in, out * ...).

    Here the *left* singular vectors of the weight come first: `right` is a pointwise kernel
    (k, in, 1, ...) made of them, and `left` the kernel (k, out, ...) of the right ones.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    channel: int = 1
    inner: int = 0
    outer: int = 1

    @property
    def dims(self) -> int:
        """Number of spatial dimensions."""
        return len(self.stride)

    def right(self, x: Tensor, right: Tensor) -> Tensor:
        """Mix channels."""
        return _CONV[self.dims](x, right)

    def left(self, z: Tensor, left: Tensor, bias: Tensor | None) -> Tensor:
        """Transposed convolution."""
        return _TRANSPOSED[self.dims](
            z, left, bias, self.stride, self.padding, self.output_padding, 1, self.dilation
        )

    def left_adjoint(self, dy: Tensor, left: Tensor) -> Tensor:
        """Convolution with the same kernel."""
        return _CONV[self.dims](dy, left, None, self.stride, self.padding, self.dilation)

    def right_adjoint(self, g: Tensor, right: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Mix channels back."""
        return _TRANSPOSED[self.dims](g, right)

    def whole(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Transposed convolution with the dense weight."""
        return self.left(x, weight, bias)

    def whole_adjoint(self, dy: Tensor, weight: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Convolution with the dense weight."""
        return self.left_adjoint(dy, weight)


@dataclass(frozen=True)
class EmbeddingMap:
    """Rows of a weight (m, n) by index: ``left`` (n, k), ``right`` (m, k); no gradient for indices.

    The right half step looks up rows of the left singular vectors.
    """

    channel: int = -1
    inner: int = 1
    outer: int = 1

    def right(self, x: Tensor, right: Tensor) -> Tensor:
        """Look rows up."""
        return F.embedding(x, right)

    def left(self, z: Tensor, left: Tensor, bias: Tensor | None) -> Tensor:
        """Expand to the embedding's dimension."""
        return F.linear(z, left, bias)

    def left_adjoint(self, dy: Tensor, left: Tensor) -> Tensor:
        """Project the gradient of the embedded tokens."""
        return dy @ left

    def right_adjoint(self, g: Tensor, right: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Refuse: indices have no gradient."""
        raise NotImplementedError("indices have no gradient")

    def whole(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Look rows of the dense weight up."""
        return F.embedding(x, weight)

    def whole_adjoint(self, dy: Tensor, weight: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Refuse: indices have no gradient."""
        raise NotImplementedError("indices have no gradient")


def along(scale: Tensor, like: Tensor, channel: int) -> Tensor:
    """Shape a (k,) vector so that it multiplies dimension `channel` of `like`, in its dtype."""
    shape = [1] * like.ndim
    shape[channel] = -1
    return scale.to(like.dtype).view(shape)


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
