"""The power law in the tail of a spectrum, fitted as Clauset, Shalizi and Newman do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MIN_VALUES = 20
"""Fewer eigenvalues give no fit that is worth reading."""

_CHUNK = 1 << 20


@dataclass(frozen=True)
class PowerLaw:
    """Density proportional to ``x ** -alpha`` for ``x >= xmin``.

    Attributes
    ----------
    alpha : float
        The exponent.
    xmin : float
        Where the tail begins: the value with the smallest Kolmogorov-Smirnov distance.
    distance : float
        That distance.
    sigma : float
        Standard error of `alpha`, ``(alpha - 1) / sqrt(count)``.
    count : int
        Values in the tail.
    """

    alpha: float
    xmin: float
    distance: float
    sigma: float
    count: int


def fit_power_law(values: npt.NDArray[np.float64]) -> PowerLaw | None:
    """Fit the exponent of a continuous power law, and where it begins.

    For each candidate start the exponent is the maximum-likelihood one,
    ``1 + n / sum ln(x / xmin)``; the start with the smallest Kolmogorov-Smirnov distance wins.

    Parameters
    ----------
    values : (K,) ndarray
        Eigenvalues, any order; those that are not positive are left out.

    Returns
    -------
    PowerLaw or None
        None for fewer than `MIN_VALUES` positive values, or where all are equal.

    References
    ----------
    A. Clauset, C. R. Shalizi and M. E. J. Newman, Power-law distributions in empirical data, SIAM
    Review 51, 2009 (arXiv 0706.1062), equations 3.1, 3.2 and 3.9.
    """
    x = np.sort(np.asarray(values, dtype=np.float64))
    x = x[x > 0.0]
    if x.size < MIN_VALUES or x[0] == x[-1]:
        return None
    logs = np.log(x)
    counts = np.arange(x.size, 0, -1)
    sums = np.cumsum(logs[::-1])[::-1] - counts * logs
    usable = np.flatnonzero(sums[:-1] > 1e-12)
    alphas = 1.0 + counts[usable] / sums[usable]
    distances = _distances(logs, usable, alphas)
    best = int(np.argmin(distances))
    start, alpha = int(usable[best]), float(alphas[best])
    count = x.size - start
    return PowerLaw(
        alpha, float(x[start]), float(distances[best]), (alpha - 1.0) / count**0.5, count
    )


def _distances(
    logs: npt.NDArray[np.float64], starts: npt.NDArray[np.intp], alphas: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Kolmogorov-Smirnov distance of each tail from its own fit, in chunks of candidates."""
    size = logs.size
    index = np.arange(size)
    distances = np.empty(starts.size)
    rows = max(1, _CHUNK // size)
    for first in range(0, starts.size, rows):
        part = slice(first, first + rows)
        start, alpha = starts[part, None], alphas[part, None]
        inside = index >= start
        fitted = -np.expm1(np.where(inside, (logs - logs[start]) * (1.0 - alpha), 0.0))
        empirical = (index - start) / (size - start)
        distances[part] = np.where(inside, np.abs(fitted - empirical), 0.0).max(axis=1)
    return distances
