"""Adapters: their layouts, and how the rank of each layer is found."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from svftool.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

Layout = Literal["peft", "kohya", "comfy", "diffusers"]


@dataclass(frozen=True)
class AdapterRank:
    """How the rank of each layer of an adapter is found.

    Attributes
    ----------
    kind : {"count", "energy", "error"}
    value : float
        The rank; the share of the sum of squares to keep; the share of the norm that may be lost.
    most : int or None
        No layer gets a higher one.
    """

    kind: Literal["count", "energy", "error"]
    value: float
    most: int | None = None

    def limit(self, m: int, n: int) -> int:
        """Return the highest rank that an m x n matrix can get."""
        wanted = [m, n]
        if self.kind == "count":
            wanted.append(int(self.value))
        if self.most is not None:
            wanted.append(self.most)
        return min(wanted)

    def of_spectrum(self, S: Tensor) -> int:
        """Return the rank that all singular values of a matrix ask for; at least 1.

        Examples
        --------
        >>> import torch
        >>> parse_adapter_rank("error:0.5").of_spectrum(torch.tensor([4.0, 3.0, 1.0, 1.0]))
        2
        """
        most = self.limit(len(S), len(S))
        if self.kind == "count":
            return most
        squares = S.double().square()
        left = squares.sum() - squares.cumsum(0)
        lost = 1.0 - self.value if self.kind == "energy" else self.value**2
        enough = left <= lost * squares.sum() * (1 + 1e-12)
        needed = int(enough.int().argmax()) + 1 if bool(enough.any()) else len(S)
        return min(most, needed)

    def __str__(self) -> str:
        return f"{int(self.value)}" if self.kind == "count" else f"{self.kind}:{self.value:g}"


def parse_adapter_rank(text: str, most: int | None = None) -> AdapterRank:
    """Read ``64``, ``energy:0.95`` or ``error:0.1``.

    Raises
    ------
    UsageError
        If the text is none of these, or out of range.

    Examples
    --------
    >>> parse_adapter_rank("64").kind
    'count'
    """
    if most is not None and most < 1:
        raise UsageError(f"--max-rank is {most}, expected 1 or more")
    plain = text.strip().lower()
    if plain.isdecimal() and int(plain) > 0:
        return AdapterRank("count", int(plain), most)
    kind, _, number = plain.partition(":")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if kind == "energy" and 0.0 < value <= 1.0:
        return AdapterRank("energy", value, most)
    if kind == "error" and 0.0 < value < 1.0:
        return AdapterRank("error", value, most)
    raise UsageError(
        f"rank {text!r}, expected a count such as 64, 'energy:0.95' (share of the squares to keep) "
        "or 'error:0.1' (share of the norm that may be lost)"
    )
