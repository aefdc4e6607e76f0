"""Formulas of the metrics: numbers of one spectrum, and numbers of a pair of matrices.

docs/metrics.md states each with its source.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from svftool.auditing.pair import Array, norm_ratio
from svftool.auditing.spectral import AnyPair
from svftool.numerics import numerical_rank
from svftool.numerics.power_law import fit_power_law
from svftool.numerics.random_matrix import noise_bulk
from svftool.numerics.subspace import (
    INTRUDER_BELOW,
    INTRUDER_TOP,
    best_matches,
    captured,
    count_intruders,
    subspace_distance,
    subspace_similarity,
)

Value = float | None


def spectral_norm(s: Array, m: int, n: int) -> Value:
    """Return largest singular value."""
    return float(s[0]) if s.size else 0.0


def frobenius_norm(s: Array, m: int, n: int) -> Value:
    """Return root of the sum of squares."""
    return math.sqrt(float(s @ s))


def condition(s: Array, m: int, n: int) -> Value:
    """Return largest over smallest value above rounding."""
    kept = numerical_rank(s, m, n)
    return float(s[0] / s[kept - 1]) if kept else None


def power_law(attribute: str) -> Callable[[Array, int, int], Value]:
    """Return one number of the power law fitted to the eigenvalues."""

    def value(s: Array, m: int, n: int) -> Value:
        fit = fit_power_law(s**2)
        return None if fit is None else float(getattr(fit, attribute))

    return value


def alpha_weighted(s: Array, m: int, n: int) -> Value:
    """Return exponent times the log of the largest eigenvalue."""
    fit = fit_power_law(s**2)
    return None if fit is None else fit.alpha * 2.0 * math.log10(float(s[0]))


def log_alpha_norm(s: Array, m: int, n: int) -> Value:
    """Return log of the sum of eigenvalues to the power of the exponent."""
    fit = fit_power_law(s**2)
    if fit is None:
        return None
    top = float(s[0])
    rest = math.log10(float(((s / top) ** (2.0 * fit.alpha)).sum()))
    return fit.alpha * 2.0 * math.log10(top) + rest


def log_norm(s: Array, m: int, n: int) -> Value:
    """Return log of the squared Frobenius norm."""
    total = float(s @ s)
    return math.log10(total) if total > 0.0 else None


def log_spectral_norm(s: Array, m: int, n: int) -> Value:
    """Return log of the largest eigenvalue."""
    return 2.0 * math.log10(float(s[0])) if s.size and s[0] > 0.0 else None


def mp_softrank(s: Array, m: int, n: int) -> Value:
    """Return edge of the noise bulk over the largest eigenvalue."""
    if not s.size or s[0] <= 0.0:
        return None
    share = noise_bulk(s, m, n).edge / float(s[0])
    return share * share


def matrix_entropy(s: Array, m: int, n: int) -> Value:
    """Return entropy of the eigenvalues over the log of the rank."""
    rank = numerical_rank(s, m, n)
    if rank < 2:
        return None
    p = s[s > 0.0] ** 2 / float(s @ s)
    return float(-(p * np.log(p)).sum() / math.log(rank))


# Metrics of a change.


def relative_drift(pair: AnyPair) -> Value:
    """Return distance of the sorted spectra, relative to the base's."""
    assert pair.tuned is not None
    moved = pair.tuned - pair.base
    return norm_ratio(float(moved @ moved), float(pair.base @ pair.base))


def delta_norm(pair: AnyPair) -> Value:
    """Return distance of the spectra by index."""
    assert pair.index_change is not None
    return math.sqrt(float(pair.index_change @ pair.index_change))


def log_ratios(pair: AnyPair) -> Array:
    """Return logarithms of tuned over base, above the numerical rank of both."""
    assert pair.tuned is not None
    kept = min(numerical_rank(s, pair.m, pair.n) for s in (pair.base, pair.tuned))
    ratios: Array = np.log(pair.tuned[:kept] / pair.base[:kept])
    return ratios


def max_log_ratio(pair: AnyPair) -> Value:
    """Return largest absolute logarithm of a ratio, infinite where only one side is zero."""
    ratios = log_ratios(pair)
    if ratios.size:
        return float(np.abs(ratios).max())
    return None if _from_zero(pair) is None else math.inf


def mean_log_ratio(pair: AnyPair) -> Value:
    """Return mean logarithm of the ratios, signed."""
    ratios = log_ratios(pair)
    return float(ratios.mean()) if ratios.size else _from_zero(pair)


def _from_zero(pair: AnyPair) -> Value:
    """Return the logarithm of something over nothing, or the reverse; None where both are zero."""
    assert pair.tuned is not None
    before, after = bool(pair.base.any()), bool(pair.tuned.any())
    if before == after:
        return None
    return math.inf if after else -math.inf


def ratio(after: float, before: float) -> Value:
    """Return a ratio of two sizes: infinite where only the first is not zero, None for none."""
    if before > 0.0:
        return after / before
    return math.inf if after > 0.0 else None


def nuclear_ratio(pair: AnyPair) -> Value:
    """Return ratio of the sums of singular values."""
    assert pair.tuned is not None
    return ratio(float(pair.tuned.sum()), float(pair.base.sum()))


def spectral_ratio(pair: AnyPair) -> Value:
    """Return ratio of the largest singular values."""
    assert pair.tuned is not None
    return ratio(float(pair.tuned.max(initial=0.0)), float(pair.base.max(initial=0.0)))


def weight_drift(pair: AnyPair) -> Value:
    """Return norm of the change over that of the base."""
    return norm_ratio(pair.change_energy, pair.base_energy)


def frobenius_distance(pair: AnyPair) -> Value:
    """Return norm of the change."""
    return math.sqrt(pair.change_energy)


def cosine(pair: AnyPair) -> Value:
    """Return cosine of the two matrices as vectors."""
    if pair.identical:
        return 1.0 if pair.base_energy > 0.0 else None
    product = pair.base_energy * pair.tuned_energy
    return max(-1.0, min(1.0, pair.inner / math.sqrt(product))) if product > 0.0 else None


def spectrum_share(pair: AnyPair) -> Value:
    """Return part of the change that shows in the spectrum."""
    if pair.change_energy == 0.0:
        return None
    assert pair.tuned is not None
    moved = pair.tuned - pair.base
    return min(float(moved @ moved) / pair.change_energy, 1.0)


def rotation_share(pair: AnyPair) -> Value:
    """Return part of the change that does not show in the spectrum."""
    share = spectrum_share(pair)
    return None if share is None else 1.0 - share


def share(attribute: str) -> Callable[[AnyPair], Value]:
    """Return one of the three shares."""

    def value(pair: AnyPair) -> Value:
        return None if pair.shares is None else float(getattr(pair.shares, attribute))

    return value


def off_diagonal_energy(pair: AnyPair) -> Value:
    """``1 - ||diag(U' W' V)||^2 / ||W'||^2``, the error of the best SVF approximation, squared."""
    if pair.tuned_energy == 0.0:
        return None
    if pair.identical:
        return 0.0
    if pair.along is None:
        return None
    kept = pair.base + pair.along if pair.shares is not None else pair.base
    return max(0.0, 1.0 - float(kept @ kept) / pair.tuned_energy)


def intruders(pair: AnyPair) -> Value:
    """Return number of leading left vectors without a match in the base."""
    if pair.identical:
        return 0.0
    overlaps = pair.left_overlaps
    return None if overlaps is None else float(count_intruders(overlaps))


def intruders_right(pair: AnyPair) -> Value:
    """Return number of leading right vectors without a match in the base."""
    if pair.identical:
        return 0.0
    overlaps = pair.right_overlaps
    return None if overlaps is None else float(count_intruders(overlaps))


def intruders_strict(pair: AnyPair) -> Value:
    """As `intruders` with the threshold 0.8: vectors that turned by more than 37 degrees."""
    if pair.identical:
        return 0.0
    overlaps = pair.left_overlaps
    return None if overlaps is None else float(count_intruders(overlaps, below=0.8))


def intruders_subspace(pair: AnyPair) -> Value:
    """Return number of leading left vectors that lie mostly outside the base's leading subspace."""
    if pair.identical:
        return 0.0
    overlaps = pair.left_overlaps
    if overlaps is None:
        return None
    return float((captured(overlaps, top=INTRUDER_TOP) < INTRUDER_BELOW).sum())


def weakest_match(pair: AnyPair) -> Value:
    """Return lowest best match of the leading left vectors."""
    overlaps = pair.left_overlaps
    return None if overlaps is None or not overlaps.numel() else float(best_matches(overlaps).min())


def similarity(*, left: bool) -> Callable[[AnyPair], Value]:
    """Return similarity of the leading subspaces, left or right."""

    def value(pair: AnyPair) -> Value:
        r = min(INTRUDER_TOP, len(pair.base))
        bases = pair.bases(r, left=left)
        return None if bases is None else float(subspace_similarity(*bases)[-1, -1])

    return value


def distance(attribute: str, *, left: bool = True) -> Callable[[AnyPair], Value]:
    """Return one of the distances of the leading subspaces."""

    def value(pair: AnyPair) -> Value:
        r = min(INTRUDER_TOP, len(pair.base))
        bases = pair.bases(r, left=left)
        return None if bases is None else float(getattr(subspace_distance(*bases), attribute))

    return value


def of_change(function: Callable[[Array, int, int], Value]) -> Callable[[AnyPair], Value]:
    """Return a number of a spectrum, taken of the change's."""

    def value(pair: AnyPair) -> Value:
        if pair.identical or pair.change_values is None:
            return None
        return function(pair.change_values, pair.m, pair.n)

    return value


def cka(pair: AnyPair) -> Value:
    """Return uncentred linear CKA."""
    return pair.cka


def amplification(pair: AnyPair) -> Value:
    """Return how much the change amplifies directions that the base does not."""
    return pair.amplification
