"""A layer's linear map split at its singular values: right vectors, left vectors, adjoints.

Every map here takes activations ``x`` to ``y = left(s * right(x))``. `left` and `right` are the
frozen factors in the shape that the layer's own kernels take.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# Products of activations with small matrices, by the public kernel that is fast on this processor.


_FEWEST = 64
"""Rows from which on the convolution's own overhead does not matter."""


def times_transposed(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x matrix' + bias``: (..., n) by (m, n) gives (..., m)."""
    if not _as_convolution(x):
        return F.linear(x, matrix, bias)
    return _from_pixels(F.conv2d(_as_pixels(x), matrix[:, :, None, None], bias), x)


def times(x: Tensor, matrix: Tensor) -> Tensor:
    """Return ``x matrix``: (..., m) by (m, n) gives (..., n)."""
    if not _as_convolution(x):
        return x @ matrix
    return _from_pixels(F.conv_transpose2d(_as_pixels(x), matrix[:, :, None, None]), x)


def _as_pixels(x: Tensor) -> Tensor:
    rows = x.reshape(1, -1, 1, x.shape[-1])
    return rows.permute(0, 3, 1, 2)


def _from_pixels(y: Tensor, x: Tensor) -> Tensor:
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], y.shape[1])


def _as_convolution(x: Tensor) -> bool:
    plain = x.dtype == torch.float32 and x.device.type == "cpu"
    return plain and x.numel() >= _FEWEST * max(1, x.shape[-1]) and prefers_convolution()


@functools.cache
def prefers_convolution() -> bool:
    """Whether this processor runs pointwise convolutions faster than linear layers.

    A rule, not a timing: the same machine has to give the same bytes every time.
    """
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):  # type: ignore[no-untyped-call]
        return False
    try:
        facts = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return "AuthenticAMD" in facts and " avx512f" in facts


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
        return times_transposed(x, right)

    def left(self, z: Tensor, left: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``z left' + bias``."""
        return times_transposed(z, left, bias)

    def left_adjoint(self, dy: Tensor, left: Tensor) -> Tensor:
        """Return ``dy left``."""
        return times(dy, left)

    def right_adjoint(self, g: Tensor, right: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return ``g right``."""
        return times(g, right)

    def whole(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x weight' + bias``."""
        return times_transposed(x, weight, bias)

    def whole_adjoint(self, dy: Tensor, weight: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return ``dy weight``."""
        return times(dy, weight)


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
