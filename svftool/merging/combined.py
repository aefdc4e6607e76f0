"""What a method makes of the changes of one tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Triplets:
    """Leading singular values and vectors; what is no more than rounding is left out.

    Attributes
    ----------
    U : (m, r) Tensor
    S : (r,) Tensor
        Non-increasing.
    Vh : (r, n) Tensor
        All float64; ``r`` may be 0.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor

    def first(self, count: int) -> Triplets:
        """Return the leading ones alone."""
        return Triplets(self.U[:, :count], self.S[:count], self.Vh[:count])

    def times(self, number: float) -> Triplets:
        """Return those of the matrix times a number, which is not 0."""
        return Triplets(self.U * math.copysign(1.0, number), self.S * abs(number), self.Vh)


@dataclass(frozen=True)
class Known:
    """Singular triplets that a method has found on its way: nobody need find them again.

    Attributes
    ----------
    inputs : sequence of Triplets
        Leading ones of the changes that were given.
    parts : sequence of Triplets
        All of what each input contributes.
    whole : Triplets
        Leading ones of the merged change.
    """

    inputs: Sequence[Triplets]
    parts: Sequence[Triplets]
    whole: Triplets

    def times(self, scale: float) -> Known:
        """Return what is known where the merged change is multiplied by a number."""
        parts = [one.times(scale) for one in self.parts]
        return Known(self.inputs, parts, self.whole.times(scale))


@dataclass(frozen=True)
class Combined:
    """One change made of many.

    Attributes
    ----------
    delta : (m, n) Tensor
        The merged change.
    part : callable
        Gives what one input, by its number, contributes; the contributions sum to `delta`.
    share : float or None
        Where every contribution is the input's change times one number: that number.
    known : Known or None
        Singular triplets, where the method has them.
    """

    delta: Tensor
    part: Callable[[int], Tensor]
    share: float | None = None
    known: Known | None = None
