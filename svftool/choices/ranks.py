"""Rank rules: how many singular values of a layer are kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from svftool.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RankRule:
    """How many singular values of each matrix are kept.

    Attributes
    ----------
    kind : {"full", "count", "fraction", "energy"}
    value : float
        The count, the fraction of the short side, or the share of the energy; 1 for "full".
    """

    kind: Literal["full", "count", "fraction", "energy"] = "full"
    value: float = 1.0

    def fixed(self, m: int, n: int) -> int | None:
        """Return the rank of an m x n matrix, or None where its spectrum decides.

        Examples
        --------
        >>> parse_rank("0.25").fixed(8, 100)
        2
        """
        side = min(m, n)
        if self.kind == "full":
            return side
        if self.kind == "count":
            return min(int(self.value), side)
        if self.kind == "fraction":
            return max(1, min(side, math.ceil(self.value * side)))
        return None

    def rank_of(self, S: Tensor, m: int, n: int) -> int:
        """Return the rank of an m x n matrix, or one for a batch, from all its singular values.

        Parameters
        ----------
        S : (k,) or (E, k) Tensor
            Non-increasing; a batch keeps what its most demanding matrix needs.
        m, n : int
            Sides of one matrix.
        """
        fixed = self.fixed(m, n)
        if fixed is not None:
            return fixed
        from svftool.numerics import energy_rank

        rows = S.double().reshape(-1, S.shape[-1]).cpu().numpy()
        return max((energy_rank(row, self.value) for row in rows), default=1)

    def __str__(self) -> str:
        if self.kind == "full":
            return "full"
        if self.kind == "count":
            return str(int(self.value))
        import numpy as np

        number = np.format_float_positional(self.value, trim="0")
        return f"energy:{number}" if self.kind == "energy" else number


FULL = RankRule()


def parse_rank(text: str) -> RankRule:
    """Read a rank rule: ``full``, a count, a fraction of the short side, or ``energy:SHARE``.

    Parameters
    ----------
    text : str
        Such as ``"full"``, ``"16"``, ``"0.25"`` or ``"energy:0.99"``.

    Returns
    -------
    RankRule

    Raises
    ------
    UsageError
        If the text is none of these, or out of range.

    Examples
    --------
    >>> parse_rank("energy:0.9")
    RankRule(kind='energy', value=0.9)
    """
    plain = text.strip().lower()
    if plain == "full":
        return FULL
    if plain.isdecimal() and int(plain) > 0:
        return RankRule("count", int(plain))
    number = plain.removeprefix("energy:")
    share = _share(number)
    if share is not None and number != plain:
        return RankRule("energy", share)
    if share is not None and "." in plain:
        return RankRule("fraction", share)
    raise UsageError(
        f"rank {text!r}, expected 'full', a count such as 16, a fraction of the short side such "
        "as 0.25, or 'energy:0.99'"
    )


def _share(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0.0 < value <= 1.0 else None
