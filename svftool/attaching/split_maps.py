"""A layer's linear map split at its singular values: two half steps, and their adjoints.

What comes first is called right, and what comes last left, as in ``y = W x = U diag(S) Vh x``.
Where a layer multiplies by its weight from the other side, as in ``x W``, it is the other way
round: the left singular vectors are the right kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


class SplitMap(Protocol):
    """The half steps of a layer, and its whole step for the residual way.

    A scale that a half step is given has a number for each input, or output, of the weight seen as
    a matrix.
    """

    @property
    def channel(self) -> int:
        """Dimension of the activations that holds channels."""

    @property
    def inner(self) -> int:
        """Dimension of the left factor that holds the singular basis; the other one is outputs."""

    @property
    def outer(self) -> int:
        """Dimension of the dense weight that holds outputs."""

    @property
    def swapped(self) -> bool:
        """Whether the left singular vectors of the weight come first."""

    def kernels(self, U: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
        """Return the right and the left kernel of two thin matrices (m, k) and (k, ...)."""

    def right(self, x: Tensor, right: Tensor, scale: Tensor | None = None) -> Tensor:
        """Project activations, whose inputs may be scaled, on the singular basis."""

    def left(
        self, z: Tensor, left: Tensor, bias: Tensor | None, scale: Tensor | None = None
    ) -> Tensor:
        """Leave the singular basis, scale the outputs where asked to, and add the bias."""

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
    """``y = x W'`` with ``left`` (m, k), ``right`` (k, n) and a dense weight (m, n).

    Swapped it is ``y = x W``.
    """

    swapped: bool = False
    channel: int = -1
    inner: int = 1

    @property
    def outer(self) -> int:
        """Dimension of the dense weight that holds outputs."""
        return 1 if self.swapped else 0

    def kernels(self, U: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``Vh`` and ``U``; swapped, ``U'`` and ``Vh'``."""
        return (U.t(), Vh.t()) if self.swapped else (Vh, U)

    def right(self, x: Tensor, right: Tensor, scale: Tensor | None = None) -> Tensor:
        """Return ``(x scale) right'``."""
        return F.linear(x if scale is None else x * along(scale, x, self.channel), right)

    def left(
        self, z: Tensor, left: Tensor, bias: Tensor | None, scale: Tensor | None = None
    ) -> Tensor:
        """Return ``(z left') scale + bias``."""
        if scale is None:
            return F.linear(z, left, bias)
        return _scaled_with_bias(F.linear(z, left), scale, bias, self.channel)

    def left_adjoint(self, dy: Tensor, left: Tensor) -> Tensor:
        """Return ``dy left``."""
        return dy @ left

    def right_adjoint(self, g: Tensor, right: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return ``g right``."""
        return g @ right

    def whole(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x weight' + bias``; swapped, ``x weight + bias``."""
        if not self.swapped:
            return F.linear(x, weight, bias)
        return x @ weight if bias is None else torch.addmm(bias, x, weight)

    def whole_adjoint(self, dy: Tensor, weight: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return ``dy weight``; swapped, ``dy weight'``."""
        return dy @ (weight.t() if self.swapped else weight)


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
    swapped: bool = False
    channel: int = 1
    inner: int = 1
    outer: int = 0

    @property
    def dims(self) -> int:
        """Number of spatial dimensions."""
        return len(self.stride)

    def kernels(self, U: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``Vh``, which has the kernel's spatial dimensions, and a pointwise ``U``."""
        return Vh, _pointwise(U, self.dims)

    def right(self, x: Tensor, right: Tensor, scale: Tensor | None = None) -> Tensor:
        """Convolve with the right singular vectors."""
        if scale is not None and all(size == 1 for size in right.shape[2:]):
            x = x * along(scale, x, self.channel)
        elif scale is not None:
            right = right * scale.to(right.dtype).view(right.shape[1:])
        return _CONV[self.dims](x, right, None, self.stride, self.padding, self.dilation)

    def left(
        self, z: Tensor, left: Tensor, bias: Tensor | None, scale: Tensor | None = None
    ) -> Tensor:
        """Mix channels with the left singular vectors."""
        if scale is None:
            return _CONV[self.dims](z, left, bias)
        return _scaled_with_bias(_CONV[self.dims](z, left), scale, bias, self.channel)

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
    swapped: bool = True
    channel: int = 1
    inner: int = 0
    outer: int = 1

    @property
    def dims(self) -> int:
        """Number of spatial dimensions."""
        return len(self.stride)

    def kernels(self, U: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
        """Return a pointwise ``U'``, and ``Vh``, which has the kernel's spatial dimensions."""
        return _pointwise(U.t(), self.dims), Vh

    def right(self, x: Tensor, right: Tensor, scale: Tensor | None = None) -> Tensor:
        """Mix channels."""
        x = x if scale is None else x * along(scale, x, self.channel)
        return _CONV[self.dims](x, right)

    def left(
        self, z: Tensor, left: Tensor, bias: Tensor | None, scale: Tensor | None = None
    ) -> Tensor:
        """Transposed convolution."""
        left = left if scale is None else left * scale.to(left.dtype).view(left.shape[1:])
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

    swapped: bool = True
    channel: int = -1
    inner: int = 1
    outer: int = 1

    def kernels(self, U: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``U`` to look rows up in, and ``Vh'``."""
        return U, Vh.t()

    def right(self, x: Tensor, right: Tensor, scale: Tensor | None = None) -> Tensor:
        """Look rows up, and the number that each of them is scaled by."""
        z = F.embedding(x, right)
        return z if scale is None else z * F.embedding(x, scale.to(z.dtype).unsqueeze(-1))

    def left(
        self, z: Tensor, left: Tensor, bias: Tensor | None, scale: Tensor | None = None
    ) -> Tensor:
        """Expand to the embedding's dimension."""
        return LinearMap().left(z, left, bias, scale)

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


def mix_channels(z: Tensor, matrix: Tensor, channel: int) -> Tensor:
    """Multiply what dimension `channel` holds by a matrix, in its dtype."""
    matrix = matrix.to(z.dtype)
    if channel == -1:
        return F.linear(z, matrix)
    dims = z.ndim - 2
    return _CONV[dims](z, _pointwise(matrix, dims))


def _scaled_with_bias(y: Tensor, scale: Tensor, bias: Tensor | None, channel: int) -> Tensor:
    scale = along(scale, y, channel)
    return y * scale if bias is None else torch.addcmul(along(bias, y, channel), y, scale)


def _pointwise(matrix: Tensor, dims: int) -> Tensor:
    return matrix.reshape(*matrix.shape, *(1,) * dims)
