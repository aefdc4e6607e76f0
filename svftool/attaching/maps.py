"""A layer's linear map split at its singular values: right vectors, left vectors, adjoints.

Every map here takes activations ``x`` to ``y = left(s * right(x))``. `left` and `right` are the
frozen factors in the shape that the layer's own kernels take.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

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
