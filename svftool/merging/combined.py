"""What a method makes of the changes of one tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Combined:
    """One change made of many.

    Attributes
    ----------
    delta : (m, n) Tensor
        The merged change.
    part : callable
        Gives what one input, by its number, contributes; the contributions sum to `delta`.
    """

    delta: Tensor
    part: Callable[[int], Tensor]
