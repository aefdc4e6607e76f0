"""Numbers that describe a spectrum: vectors of singular values in, one number out."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from svftool.errors import NumericalError

FloatArray = npt.NDArray[np.floating]


def _checked(s: FloatArray) -> npt.NDArray[np.float64]:
    values = np.asarray(s, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"s has shape {values.shape}, expected one dimension")
    if not np.isfinite(values).all():
        raise NumericalError("the spectrum holds NaN or infinity, expected finite singular values")
    return values


def _shares(s: FloatArray) -> npt.NDArray[np.float64]:
    """Values divided by the largest one; empty where all are zero."""
    values = _checked(s)
    top = values.max(initial=0.0)
    return values / top if top > 0 else values[:0]


def energy(s: FloatArray) -> float:
    """Sum of squares of the singular values, which is the squared Frobenius norm.

    Parameters
    ----------
    s : (K,) ndarray
        Singular values, any order.

    Returns
    -------
    float

    Raises
    ------
    NumericalError
        If `s` holds NaN or infinity.

    Examples
    --------
    >>> energy(np.array([2.0, 1.0]))
    5.0
    """
    values = _checked(s)
    return float(values @ values)


def energy_rank(s: FloatArray, share: float) -> int:
    """Smallest rank whose singular values keep at least `share` of the energy.

    Parameters
    ----------
    s : (K,) ndarray
        Singular values, non-increasing.
    share : float
        In (0, 1].

    Returns
    -------
    int
        At least 1; K where all values are zero or `share` is 1.

    Raises
    ------
    NumericalError
        If `s` holds NaN or infinity.

    Examples
    --------
    >>> energy_rank(np.array([3.0, 1.0, 0.0]), 0.9)
    1
    """
    shares = _shares(s)
    if shares.size == 0 or share >= 1.0:
        return len(s)
    kept = np.cumsum(shares**2)
    return min(int(np.searchsorted(kept, share * kept[-1])) + 1, len(s))


def effective_rank(s: FloatArray) -> float:
    """Exponential of the entropy of the normalised singular values.

    Parameters
    ----------
    s : (K,) ndarray
        Singular values, non-negative, any order.

    Returns
    -------
    float
        Between 1 (one direction carries everything) and K (all equal); 0 for an all-zero spectrum.

    Raises
    ------
    NumericalError
        If `s` holds NaN or infinity.

    References
    ----------
    Roy and Vetterli, The effective rank, EUSIPCO 2007.

    Examples
    --------
    >>> round(effective_rank(np.ones(4)), 12)
    4.0
    """
    shares = _shares(s)
    if shares.size == 0:
        return 0.0
    p = shares[shares > 0] / shares.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def stable_rank(s: FloatArray) -> float:
    """Squared Frobenius norm over squared spectral norm.

    Parameters
    ----------
    s : (K,) ndarray
        Singular values, any order.

    Returns
    -------
    float
        Between 1 and K; 0 for an all-zero spectrum.

    Raises
    ------
    NumericalError
        If `s` holds NaN or infinity.

    Examples
    --------
    >>> stable_rank(np.array([2.0, 2.0, 1.0]))
    2.25
    """
    return float((_shares(s) ** 2).sum())


def nuclear_rank(s: FloatArray) -> float:
    """Squared nuclear norm over squared Frobenius norm, which is at most the rank.

    Parameters
    ----------
    s : (K,) ndarray
        Singular values, any order.

    Returns
    -------
    float
        Between 1 and K; 0 for an all-zero spectrum.

    Raises
    ------
    NumericalError
        If `s` holds NaN or infinity.

    Examples
    --------
    >>> nuclear_rank(np.array([1.0, 1.0, 0.0]))
    2.0
    """
    shares = _shares(s)
    return float(shares.sum() ** 2 / (shares**2).sum()) if shares.size else 0.0


def participation_ratio(s: FloatArray) -> float:
    """Count the directions that share the energy: ``(sum s^2)^2 / sum s^4``.

    Parameters
    ----------
    s : (K,) ndarray
        Singular values, any order.

    Returns
    -------
    float
        Between 1 and K; 0 for an all-zero spectrum.

    Raises
    ------
    NumericalError
        If `s` holds NaN or infinity.

    Examples
    --------
    >>> participation_ratio(np.array([1.0, 1.0]))
    2.0
    """
    squares = _shares(s) ** 2
    return float(squares.sum() ** 2 / (squares**2).sum()) if squares.size else 0.0


def numerical_rank(s: FloatArray, m: int, n: int, *, dtype: npt.DTypeLike = np.float32) -> int:
    """Count the singular values above the rounding level of an m x n matrix.

    Parameters
    ----------
    s : (K,) ndarray
        Singular values, any order.
    m, n : int
        Sides of the matrix.
    dtype : dtype, default float32
        The level is ``max(m, n) * eps(dtype) * max(s)``.

    Returns
    -------
    int
        0 for an all-zero spectrum.

    Raises
    ------
    NumericalError
        If `s` holds NaN or infinity.

    Examples
    --------
    >>> numerical_rank(np.array([1.0, 1e-9]), 2, 2)
    1
    """
    return int((_shares(s) > max(m, n) * np.finfo(dtype).eps).sum())
