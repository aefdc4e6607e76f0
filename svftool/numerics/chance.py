"""How likely random directions agree so well: exact tails, as logarithms where they are tiny."""

from __future__ import annotations

import math

_UNDERFLOW = 1e-290
_NEAREST = 1e-12
"""Part of a unit vector's square outside of a subspace below which float64 tells nothing."""


def log_aligned(square: float, d: int, k: int = 1) -> float:
    """Return the chance that a random direction lies so near to a given subspace.

    Parameters
    ----------
    square : float
        Squared length of the unit vector's projection; for k = 1 a squared cosine.
    d : int
        Dimensions of the space.
    k : int
        Dimensions of the subspace.

    Returns
    -------
    float
        Natural logarithm of the probability that a unit vector drawn uniformly from the sphere in
        ``R^d`` has a projection as long or longer.

    Notes
    -----
    The square is Beta(k/2, (d - k)/2) distributed: a uniform direction is a normal vector over its
    length, and the squares of its parts are independent chi-squares.
    """
    from scipy.special import betainc, betaln

    if k >= d or square <= 0.0:
        return 0.0
    a, b = (d - k) / 2.0, k / 2.0
    rest = min(1.0, max(1.0 - square, _NEAREST))
    chance = float(betainc(a, b, rest))
    if chance > _UNDERFLOW:
        return math.log(chance)
    # int_0^y t^(a-1) (1-t)^(b-1) dt is at most y^a / a times the larger end of (1-t)^(b-1).
    ends = max(0.0, (b - 1.0) * math.log1p(-rest)) if rest < 1.0 else 0.0
    return min(0.0, a * math.log(rest) - math.log(a) - float(betaln(a, b)) + ends)


def log_product(total: float, count: int) -> float:
    """Return the chance that a product of uniform numbers is so small.

    Parameters
    ----------
    total : float
        Sum of the natural logarithms of `count` independent p-values.
    count : int
        At least 1.

    Returns
    -------
    float
        Natural logarithm of the combined p-value, uniform where each of them is (R. A. Fisher,
        Statistical Methods for Research Workers, 4th edition, 1932, section 21.1): with x the
        negative sum, ``exp(-x) sum_{j < count} x^j / j!``.
    """
    x = -total
    if x <= 0.0:
        return 0.0
    terms = [j * math.log(x) - math.lgamma(j + 1.0) for j in range(count)]
    top = max(terms)
    return min(0.0, top - x + math.log(math.fsum(math.exp(one - top) for one in terms)))


def holm(logs: list[float]) -> list[float]:
    """Correct p-values for being several, as logarithms.

    Parameters
    ----------
    logs : list of float
        Natural logarithms of p-values.

    Returns
    -------
    list of float
        In the same order, such that the chance of calling any true null false at a level is no
        more than the level (S. Holm, Scandinavian Journal of Statistics 6, 1979).
    """
    order = sorted(range(len(logs)), key=logs.__getitem__)
    found, largest = [0.0] * len(logs), -math.inf
    for place, index in enumerate(order):
        largest = max(largest, min(0.0, logs[index] + math.log(len(logs) - place)))
        found[index] = largest
    return found
