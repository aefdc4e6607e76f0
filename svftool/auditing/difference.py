"""The change of a matrix, computed a block at a time from both sides and never stored whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from svftool.numerics.tall import Tall


@dataclass(frozen=True)
class Difference(Tall):
    """``D = W' - W`` with its long side first.

    Attributes
    ----------
    before : (rows, n) Tensor or None
        W as `matrix` is W'; None where `matrix` is the change itself.
    """

    before: Tensor | None = None

    def double(self, rows: slice, columns: slice = slice(None)) -> Tensor:
        """Return a block in float64."""
        block = super().double(rows, columns)
        if self.before is None:
            return block
        return block - self.before[rows, columns]

    def energy(self) -> float:
        """Return the sum of squares."""
        norms = [torch.linalg.vector_norm(self.double(rows)) for rows in self.slices(_ROWS)]
        return sum(float(norm) ** 2 for norm in norms)

    def any(self) -> bool:
        """Whether an entry is not zero."""
        return any(bool(self.double(rows).any()) for rows in self.slices(_ROWS))


def difference(base: Tensor, tuned: Tensor | None, change: Tensor | None) -> Difference:
    """Look at a change with its long side first.

    Parameters
    ----------
    base : (m, n) Tensor
    tuned, change : (m, n) Tensor or None
        One of the two; nothing is copied.
    """
    after = tuned if change is None else change
    if after is None:
        raise ValueError("either a weight or a change is needed")
    before = base if change is None else None
    transposed = base.shape[0] < base.shape[1]
    if transposed:
        after, before = after.mT, None if before is None else before.mT
    return Difference(after, transposed, exponent=0, top=0.0, before=before)
