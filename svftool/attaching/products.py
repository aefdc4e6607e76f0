"""Products of activations with small matrices, by the public kernel that is fast on this processor.

PyTorch sends a linear layer on the CPU to MKL, which leaves half of the speed of AMD processors
with 512-bit vectors unused, and a pointwise convolution to oneDNN, which does not. The two compute
the same, so on such processors a linear layer runs as the convolution of one row of pixels.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

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
