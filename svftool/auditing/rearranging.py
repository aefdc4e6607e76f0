"""Whether the entries of a matrix were moved or flipped, shown entry by entry.

Lengths of rows and columns propose an order; all entries decide.
"""

from __future__ import annotations

import torch
from torch import Tensor

CLOSE = 1e-6
"""Relative difference of entries that count as the same."""


def proven_rearrangement(base: Tensor, tuned: Tensor) -> str:
    """Say how entries were rearranged; empty where that cannot be shown.

    Parameters
    ----------
    base, tuned : (m, n) Tensor

    Returns
    -------
    str
        As the end of a sentence.
    """
    if base.shape[0] == base.shape[1] and _same(base.mT, tuned):
        return "the matrix is transposed"
    if _same_up_to_signs(base, tuned):
        share = float((base.double() != tuned.double()).float().mean())
        return f"the signs of {share:.0%} of the entries are flipped, their sizes are the same"
    lengths = [_lengths(base), _lengths(tuned)]
    rows, columns = zip(*lengths, strict=True)
    if not all(_same(before.values, after.values) for before, after in (rows, columns)):
        return ""
    before, after = (
        matrix[order[0].indices][:, order[1].indices]
        for matrix, order in zip((base, tuned), lengths, strict=True)
    )
    if _same_up_to_signs(before, after):
        return "its rows or columns are permuted or sign-flipped"
    return ""


def _lengths(matrix: Tensor) -> tuple[torch.return_types.sort, torch.return_types.sort]:
    rows, columns = (
        torch.linalg.vector_norm(matrix, dim=dim, dtype=torch.float64).sort() for dim in (1, 0)
    )
    return rows, columns


def _wide(matrix: Tensor) -> torch.dtype:
    return torch.float64 if matrix.dtype == torch.float64 else torch.float32


def _same(before: Tensor, after: Tensor) -> bool:
    wide = _wide(before)
    close = 10.0 * CLOSE if before.ndim == 1 else CLOSE
    return torch.allclose(before.to(wide), after.to(wide), rtol=close, atol=0.0)


def _same_up_to_signs(before: Tensor, after: Tensor) -> bool:
    """Tell whether flipping whole rows and columns makes one of the other.

    Only such flips keep the singular values; flipping entries one by one does not.
    """
    wide = _wide(before)
    W, T = before.to(wide), after.to(wide)
    if not torch.allclose(W.abs(), T.abs(), rtol=CLOSE, atol=0.0):
        return False
    signs = W.sign() * T.sign()
    fullest = signs[signs.abs().sum(dim=1).argmax()]
    columns = torch.where(fullest == 0.0, 1.0, fullest)
    rows = torch.where(signs @ columns < 0.0, -1.0, 1.0)
    return not bool(((signs * rows[:, None] * columns) < 0.0).any())
