"""Sums of products of two large tensors in float64, in parts that stay in a core's cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from svftool.numerics.threads import one_thread

_PART = 1 << 16


@dataclass(frozen=True)
class Products:
    """Sums over all entries; infinite or NaN where an entry is, or a square leaves float64.

    Attributes
    ----------
    inner : float
        ``<A, B>``.
    first, second : float
        ``|A|^2`` and ``|B|^2``.
    apart : float
        ``|B - A|^2``.
    """

    inner: float
    first: float
    second: float
    apart: float


def products(one: Tensor, two: Tensor, *, change: bool = False) -> Products:
    """Sum the products of two tensors of one shape.

    Parameters
    ----------
    one, two : Tensor
        Real.
    change : bool
        `two` is the difference ``B - A``, and not B.

    Examples
    --------
    >>> products(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    Products(inner=9.0, first=5.0, second=17.0, apart=4.0)
    """
    a, b = one.reshape(-1), two.reshape(-1)
    sums = [0.0, 0.0, 0.0, 0.0]
    with one_thread():  # for parts of this size others cost more than they bring
        for at in range(0, a.numel(), _PART):
            A, B = a[at : at + _PART].double(), b[at : at + _PART].double()
            D = B if change else B - A
            B = A + B if change else B
            for index, pair in enumerate(((A, B), (A, A), (B, B), (D, D))):
                sums[index] += float(torch.dot(*pair))
    return Products(*sums)
