"""A matrix seen with its long side first, scaled, and cut into blocks of rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from svftool.errors import NumericalError

Rank = int | Callable[[Tensor], int]

_ROWS, _ROWS_OF_A_DEVICE = 1024, 16384

# Matrices whose largest entry is within 2**-24 and 2**24 square without loss: they are not scaled.
_MODEST = 24
_WIDE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Choose:
    """Tells how many singular values to keep: all, a number, or what a function makes of them."""

    rank: Rank | None = None

    def __call__(self, S: Tensor) -> int:
        """Return a number between 1 and ``len(S)``; S is float64 and non-increasing."""
        if self.rank is None:
            return len(S)
        kept = self.rank(S) if callable(self.rank) else self.rank
        return max(min(kept, len(S)), min(len(S), 1))


ALL = Choose()


@dataclass(frozen=True)
class Tall:
    """The matrix ``A = W 2^-exponent`` (or its transpose), never wider than tall.

    Attributes
    ----------
    matrix : (rows, n) Tensor
        W or W', as it came; ``n <= rows``.
    transposed : bool
        Whether it is W'.
    exponent : int
        Power of two that was divided out. Where the entries are of modest size it is 0 and single
        precision blocks are the matrix itself; else the largest entry is brought into [0.5, 1).
    top : float
        Largest absolute entry of W.
    """

    matrix: Tensor
    transposed: bool
    exponent: int
    top: float

    @property
    def n(self) -> int:
        """Length of the short side."""
        return self.matrix.shape[1]

    @property
    def on_cpu(self) -> bool:
        """Whether blocks are to fit into a core's cache; other devices want them large."""
        return self.matrix.device.type == "cpu"

    def slices(self, rows: int | None = None) -> list[slice]:
        """Cut the long side; the cuts depend on the shape alone."""
        usual = _ROWS if self.on_cpu else _ROWS_OF_A_DEVICE
        return cuts(self.matrix.shape[0], rows or usual)

    def double(self, rows: slice, columns: slice = slice(None)) -> Tensor:
        """Return a block in float64."""
        block = self.matrix[rows, columns].double()
        return block * 2.0**-self.exponent if self.exponent else block

    def single(self, rows: slice) -> Tensor:
        """Return a block of rows in float32."""
        if self.exponent:
            return self.double(rows).float()
        return self.matrix[rows].float()


@dataclass(frozen=True)
class Thin:
    """Factors of a tall matrix, ``A ~ U diag(S) V'``, not yet checked.

    Attributes
    ----------
    U : (rows, k) Tensor
        float32 or float64; of a transposed matrix, columns are contiguous.
    S : (k,) Tensor
        float64, non-increasing.
    V : (k, n) Tensor
        In the dtype of U; its rows are the right singular vectors.
    squares : float
        Sum of squares of all singular values of A, those beyond k included.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    squares: float


def cuts(total: int, size: int) -> list[slice]:
    """Cut a range into slices of one size, the last one shorter."""
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def tall(matrix: Tensor) -> Tall:
    """Look at a matrix with its long side first.

    Parameters
    ----------
    matrix : (m, n) Tensor
        Any floating dtype; shared, not copied.

    Raises
    ------
    NumericalError
        If it holds NaN or infinity.
    """
    W = matrix.detach()
    W = W if W.dtype in _WIDE else W.float()
    top = largest(W)
    exponent = math.frexp(top)[1]
    if abs(exponent) <= _MODEST:
        exponent = 0
    transposed = W.shape[0] < W.shape[1]
    return Tall(W.mT if transposed else W, transposed, exponent, top)


def largest(matrix: Tensor) -> float:
    """Return the largest absolute entry; 0 for an empty matrix.

    Raises
    ------
    NumericalError
        If the matrix holds NaN or infinity.
    """
    if matrix.numel() == 0:
        return 0.0
    low, high = torch.aminmax(matrix)
    top = max(-float(low), float(high))
    if not math.isfinite(top):
        bad = matrix.numel() - int(matrix.isfinite().sum())
        raise NumericalError(
            f"{bad} of {matrix.numel()} entries are NaN or infinite, expected finite weights"
        )
    return top
