"""What part of a spectrum random matrix theory explains as noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Spectrum = npt.NDArray[np.float64]


@lru_cache(maxsize=4096)
def median_of_law(beta: float) -> float:
    """Median of the Marchenko-Pastur law of unit variance.

    Parameters
    ----------
    beta : float
        Ratio of the short to the long side, in (0, 1].

    Returns
    -------
    float
        Of the eigenvalues of ``X X' / n`` for an m x n matrix X of unit variance, ``beta = m / n``.

    References
    ----------
    V. A. Marchenko and L. A. Pastur, Distribution of eigenvalues for some sets of random matrices,
    Math. USSR Sbornik 1, 1967.

    Examples
    --------
    >>> round(median_of_law(1.0), 4)
    0.6528
    """
    # Imported where it is needed: it takes as long as a small merge.
    from scipy.integrate import quad
    from scipy.optimize import brentq

    low, high = (1.0 - math.sqrt(beta)) ** 2, (1.0 + math.sqrt(beta)) ** 2
    middle, half = (low + high) / 2.0, (high - low) / 2.0

    def below(x: float) -> float:
        # With t = middle - half cos(a) the square-root edges of the density vanish.
        def density(a: float) -> float:
            t = middle - half * math.cos(a)
            return (half * math.sin(a)) ** 2 / (2.0 * math.pi * beta * t) if t > 0.0 else 0.0

        end = math.acos(max(-1.0, min(1.0, (middle - x) / half)))
        return float(quad(density, 0.0, end, epsabs=1e-12, epsrel=1e-12)[0])

    return float(brentq(lambda x: below(x) - 0.5, low, high, xtol=1e-12))


@dataclass(frozen=True)
class NoiseBulk:
    """The Marchenko-Pastur bulk that fits a spectrum's median.

    Attributes
    ----------
    sigma : float
        Standard deviation of the entries of the noise.
    edge : float
        Upper edge of the bulk, as a singular value: ``sigma (sqrt(m) + sqrt(n))``.
    spikes : int
        Singular values above the edge.
    """

    sigma: float
    edge: float
    spikes: int


def noise_bulk(s: Spectrum, m: int, n: int) -> NoiseBulk:
    """Fit the Marchenko-Pastur law to the median of a spectrum, which few spikes do not move.

    Parameters
    ----------
    s : (K,) ndarray
        All ``min(m, n)`` singular values.
    m, n : int
        Sides of the matrix.

    Returns
    -------
    NoiseBulk
    """
    long = max(m, n)
    sigma = float(np.median(s)) / math.sqrt(long * median_of_law(min(m, n) / long))
    edge = sigma * (math.sqrt(m) + math.sqrt(n))
    return NoiseBulk(sigma, edge, int((s > edge).sum()))


def optimal_hard_threshold(s: Spectrum, m: int, n: int) -> float:
    """Singular value below which truncation removes more noise than signal, noise level unknown.

    Parameters
    ----------
    s : (K,) ndarray
        All ``min(m, n)`` singular values.
    m, n : int
        Sides of the matrix.

    Returns
    -------
    float
        ``2.858 median(s)`` for a square matrix.

    References
    ----------
    M. Gavish and D. L. Donoho, The optimal hard threshold for singular values is 4/sqrt(3),
    IEEE Transactions on Information Theory 60, 2014 (arXiv 1305.5870), equations 3 and 11.

    Examples
    --------
    >>> round(optimal_hard_threshold(np.ones(3), 3, 3), 3)
    2.858
    """
    beta = min(m, n) / max(m, n)
    root = math.sqrt(beta**2 + 14.0 * beta + 1.0)
    known = math.sqrt(2.0 * (beta + 1.0) + 8.0 * beta / (beta + 1.0 + root))
    return known / math.sqrt(median_of_law(beta)) * float(np.median(s))


def spectrum_snr(s: Spectrum, m: int, n: int) -> float | None:
    """Signal-to-noise ratio by which the tool ``spectrum`` ranks layers for training.

    A heuristic: its threshold leaves the factor ``sqrt(max(m, n))`` out, so it is no
    Marchenko-Pastur edge; `noise_bulk` has that.

    Parameters
    ----------
    s : (K,) ndarray
        Singular values, any order.
    m, n : int
        Sides of the matrix.

    Returns
    -------
    float or None
        Sum of the values above ``IQR(s) / 1.349 * (1 + sqrt(min/max))`` over the sum of the others,
        over the largest value; None where no value is below.

    References
    ----------
    E. Hartford et al., Spectrum: targeted training on signal to noise ratio, arXiv 2406.06623.
    """
    low, high = np.quantile(s, [0.25, 0.75])
    threshold = (high - low) / 1.349 * (1.0 + math.sqrt(min(m, n) / max(m, n)))
    signal, noise = float(s[s > threshold].sum()), float(s[s <= threshold].sum())
    top = float(s.max(initial=0.0))
    return signal / noise / top if noise > 0.0 and top > 0.0 else None
