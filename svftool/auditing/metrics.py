"""The metrics of an audit by name: what each one is, where it comes from, how a batch adds up.

A metric of kind ``spectrum`` looks at one side, of kind ``change`` at both. Those that need
singular vectors are left out when only values are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from svftool.auditing.pair import Array, Pair, norm_ratio
from svftool.errors import UsageError
from svftool.numerics import (
    effective_rank,
    energy_rank,
    nuclear_rank,
    numerical_rank,
    participation_ratio,
    stable_rank,
)
from svftool.numerics.power_law import fit_power_law
from svftool.numerics.random_matrix import noise_bulk, optimal_hard_threshold, spectrum_snr
from svftool.numerics.subspace import (
    INTRUDER_BELOW,
    INTRUDER_TOP,
    best_matches,
    captured,
    count_intruders,
    subspace_distance,
    subspace_similarity,
)

Combine = Literal["mean", "sum", "max", "min", "root", "norm", "change"]
Value = float | None


@dataclass(frozen=True)
class Metric:
    """One number of a layer.

    Attributes
    ----------
    name : str
        As in JSON, ``--metrics`` and ``--fail-above``.
    kind : {"spectrum", "change"}
        Whether it looks at one side or compares two.
    what : str
        One line for people.
    of_spectrum : callable or None
        ``(s, m, n)`` to the number, of kind ``spectrum``.
    of_pair : callable or None
        The pair to the number, of kind ``change``.
    combine : str
        How the matrices of a batch add up: mean, sum, max, min; ``root`` and ``norm`` are root sums
        of squares (``root`` weighted by the base's energy, so that a ratio of norms stays one);
        ``change`` is the mean weighted by the energy of the change.
    vectors : bool
        Whether singular vectors are needed.
    default : bool
        Whether it is computed unless others are asked for.
    """

    name: str
    kind: Literal["spectrum", "change"]
    what: str
    of_spectrum: Callable[[Array, int, int], Value] | None = None
    of_pair: Callable[[Pair], Value] | None = None
    combine: Combine = "mean"
    vectors: bool = False
    default: bool = False


# Metrics of one spectrum.


def _spectral_norm(s: Array, m: int, n: int) -> Value:
    return float(s[0]) if s.size else 0.0


def _frobenius_norm(s: Array, m: int, n: int) -> Value:
    return math.sqrt(float(s @ s))


def _condition(s: Array, m: int, n: int) -> Value:
    kept = numerical_rank(s, m, n)
    return float(s[0] / s[kept - 1]) if kept else None


def _power_law(attribute: str) -> Callable[[Array, int, int], Value]:
    def value(s: Array, m: int, n: int) -> Value:
        fit = fit_power_law(s**2)
        return None if fit is None else float(getattr(fit, attribute))

    return value


def _alpha_weighted(s: Array, m: int, n: int) -> Value:
    fit = fit_power_law(s**2)
    return None if fit is None else fit.alpha * math.log10(float(s[0]) ** 2)


def _log_alpha_norm(s: Array, m: int, n: int) -> Value:
    fit = fit_power_law(s**2)
    if fit is None:
        return None
    top = float(s[0]) ** 2
    return fit.alpha * math.log10(top) + math.log10(float(((s**2 / top) ** fit.alpha).sum()))


def _log_norm(s: Array, m: int, n: int) -> Value:
    total = float(s @ s)
    return math.log10(total) if total > 0.0 else None


def _log_spectral_norm(s: Array, m: int, n: int) -> Value:
    return 2.0 * math.log10(float(s[0])) if s.size and s[0] > 0.0 else None


def _mp_softrank(s: Array, m: int, n: int) -> Value:
    return (noise_bulk(s, m, n).edge / float(s[0])) ** 2 if s.size and s[0] > 0.0 else None


def _matrix_entropy(s: Array, m: int, n: int) -> Value:
    rank = numerical_rank(s, m, n)
    if rank < 2:
        return None
    p = s[s > 0.0] ** 2 / float(s @ s)
    return float(-(p * np.log(p)).sum() / math.log(rank))


# Metrics of a change.


def _relative_drift(pair: Pair) -> Value:
    assert pair.tuned is not None
    moved = pair.tuned - pair.base
    return norm_ratio(float(moved @ moved), float(pair.base @ pair.base))


def _delta_norm(pair: Pair) -> Value:
    assert pair.index_change is not None
    return math.sqrt(float(pair.index_change @ pair.index_change))


def _log_ratios(pair: Pair) -> Array:
    assert pair.tuned is not None
    kept = min(numerical_rank(s, pair.m, pair.n) for s in (pair.base, pair.tuned))
    ratios: Array = np.log(pair.tuned[:kept] / pair.base[:kept])
    return ratios


def _max_log_ratio(pair: Pair) -> Value:
    ratios = _log_ratios(pair)
    return float(np.abs(ratios).max()) if ratios.size else None


def _mean_log_ratio(pair: Pair) -> Value:
    ratios = _log_ratios(pair)
    return float(ratios.mean()) if ratios.size else None


def _nuclear_ratio(pair: Pair) -> Value:
    assert pair.tuned is not None
    before = float(pair.base.sum())
    return float(pair.tuned.sum()) / before if before > 0.0 else None


def _spectral_ratio(pair: Pair) -> Value:
    assert pair.tuned is not None
    before = float(pair.base[0]) if pair.base.size else 0.0
    return float(pair.tuned[0]) / before if before > 0.0 else None


def _weight_drift(pair: Pair) -> Value:
    return norm_ratio(pair.change_energy, pair.base_energy)


def _frobenius_distance(pair: Pair) -> Value:
    return math.sqrt(pair.change_energy)


def _cosine(pair: Pair) -> Value:
    if pair.identical:
        return 1.0 if pair.base_energy > 0.0 else None
    product = pair.base_energy * pair.tuned_energy
    return max(-1.0, min(1.0, pair.inner / math.sqrt(product))) if product > 0.0 else None


def _spectrum_share(pair: Pair) -> Value:
    if pair.change_energy == 0.0:
        return None
    assert pair.tuned is not None
    moved = pair.tuned - pair.base
    return min(float(moved @ moved) / pair.change_energy, 1.0)


def _rotation_share(pair: Pair) -> Value:
    share = _spectrum_share(pair)
    return None if share is None else 1.0 - share


def _share(attribute: str) -> Callable[[Pair], Value]:
    def value(pair: Pair) -> Value:
        return None if pair.shares is None else float(getattr(pair.shares, attribute))

    return value


def _off_diagonal_energy(pair: Pair) -> Value:
    """``1 - ||diag(U' W' V)||^2 / ||W'||^2``, the error of the best SVF approximation, squared."""
    if pair.tuned_energy == 0.0:
        return None
    if pair.identical:
        return 0.0
    if pair.along is None:
        return None
    kept = pair.base + pair.along if pair.shares is not None else pair.base
    return max(0.0, 1.0 - float(kept @ kept) / pair.tuned_energy)


def _intruders(pair: Pair) -> Value:
    if pair.identical:
        return 0.0
    overlaps = pair.left_overlaps
    return None if overlaps is None else float(count_intruders(overlaps))


def _intruders_right(pair: Pair) -> Value:
    if pair.identical:
        return 0.0
    overlaps = pair.right_overlaps
    return None if overlaps is None else float(count_intruders(overlaps))


def _intruders_strict(pair: Pair) -> Value:
    """As `intruders` with the threshold 0.8: vectors that turned by more than 37 degrees."""
    if pair.identical:
        return 0.0
    overlaps = pair.left_overlaps
    return None if overlaps is None else float(count_intruders(overlaps, below=0.8))


def _intruders_subspace(pair: Pair) -> Value:
    if pair.identical:
        return 0.0
    overlaps = pair.left_overlaps
    if overlaps is None:
        return None
    return float((captured(overlaps, top=INTRUDER_TOP) < INTRUDER_BELOW).sum())


def _weakest_match(pair: Pair) -> Value:
    overlaps = pair.left_overlaps
    return None if overlaps is None or not overlaps.numel() else float(best_matches(overlaps).min())


def _similarity(*, left: bool) -> Callable[[Pair], Value]:
    def value(pair: Pair) -> Value:
        r = min(INTRUDER_TOP, len(pair.base))
        bases = pair.bases(r, left=left)
        return None if bases is None else float(subspace_similarity(*bases)[-1, -1])

    return value


def _distance(attribute: str, *, left: bool = True) -> Callable[[Pair], Value]:
    def value(pair: Pair) -> Value:
        r = min(INTRUDER_TOP, len(pair.base))
        bases = pair.bases(r, left=left)
        return None if bases is None else float(getattr(subspace_distance(*bases), attribute))

    return value


def _of_change(function: Callable[[Array, int, int], Value]) -> Callable[[Pair], Value]:
    def value(pair: Pair) -> Value:
        if pair.identical or pair.change_values is None:
            return None
        return function(pair.change_values, pair.m, pair.n)

    return value


def _cka(pair: Pair) -> Value:
    return pair.cka


def _amplification(pair: Pair) -> Value:
    return pair.amplification


_SPECTRUM: tuple[Metric, ...] = (
    Metric(
        "effective_rank", "spectrum", "exponential of the spectrum's entropy",
        lambda s, m, n: effective_rank(s), default=True,
    ),
    Metric(
        "stable_rank", "spectrum", "||W||_F^2 / ||W||_2^2",
        lambda s, m, n: stable_rank(s), default=True,
    ),
    Metric(
        "spectral_norm", "spectrum", "largest singular value", _spectral_norm,
        combine="max", default=True,
    ),
    Metric("frobenius_norm", "spectrum", "||W||_F", _frobenius_norm, combine="norm"),
    Metric("condition_number", "spectrum", "largest over smallest value above rounding", _condition,
           combine="max"),
    Metric("nuclear_rank", "spectrum", "(sum s)^2 / sum s^2", lambda s, m, n: nuclear_rank(s)),
    Metric("participation_ratio", "spectrum", "(sum s^2)^2 / sum s^4",
           lambda s, m, n: participation_ratio(s)),
    Metric("numerical_rank", "spectrum", "values above max(m, n) eps s_1",
           lambda s, m, n: float(numerical_rank(s, m, n))),
    Metric("rank90", "spectrum", "values that hold 90 % of the energy",
           lambda s, m, n: float(energy_rank(s, 0.9))),
    Metric("mp_sigma", "spectrum", "noise level fitted to the spectrum's median",
           lambda s, m, n: noise_bulk(s, m, n).sigma),
    Metric("mp_edge", "spectrum", "upper edge of the noise bulk",
           lambda s, m, n: noise_bulk(s, m, n).edge),
    Metric("mp_spikes", "spectrum", "singular values above the noise bulk",
           lambda s, m, n: float(noise_bulk(s, m, n).spikes)),
    Metric("hard_threshold", "spectrum", "Gavish and Donoho's optimal threshold",
           optimal_hard_threshold),
    Metric("hard_threshold_rank", "spectrum", "singular values above that threshold",
           lambda s, m, n: float((s > optimal_hard_threshold(s, m, n)).sum())),
    Metric("spectrum_snr", "spectrum", "signal-to-noise ratio of the tool 'spectrum'",
           spectrum_snr),
    Metric("alpha", "spectrum", "power-law exponent of the tail of s^2", _power_law("alpha")),
    Metric("alpha_xmin", "spectrum", "where that tail begins", _power_law("xmin")),
    Metric("alpha_distance", "spectrum", "Kolmogorov-Smirnov distance of the fit",
           _power_law("distance")),
    Metric("alpha_sigma", "spectrum", "standard error of alpha", _power_law("sigma")),
    Metric("alpha_weighted", "spectrum", "alpha log10 s_1^2", _alpha_weighted),
    Metric("log_alpha_norm", "spectrum", "log10 sum s^(2 alpha)", _log_alpha_norm),
    Metric("log_norm", "spectrum", "log10 ||W||_F^2", _log_norm),
    Metric("log_spectral_norm", "spectrum", "log10 s_1^2", _log_spectral_norm),
    Metric("mp_softrank", "spectrum", "edge of the noise bulk over s_1, squared", _mp_softrank),
    Metric("matrix_entropy", "spectrum", "entropy of s^2 over the log of the rank",
           _matrix_entropy),
)  # fmt: skip

_CHANGE: tuple[Metric, ...] = (
    Metric("relative_drift", "change", "||S' - S|| / ||S||, sorted", None, _relative_drift, "root",
           default=True),
    Metric("delta_norm", "change", "||S' - S|| by index", None, _delta_norm, "norm", default=True),
    Metric("max_log_ratio", "change", "largest |ln(S'_i / S_i)|", None, _max_log_ratio, "max",
           default=True),
    Metric("weight_drift", "change", "||W' - W||_F / ||W||_F", None, _weight_drift, "root",
           default=True),
    Metric("spectrum_share", "change", "||S' - S||^2 / ||D||_F^2", None, _spectrum_share, "change",
           default=True),
    Metric("svf_share", "change", "part of D that a change of S can make", None, _share("svf"),
           "change", vectors=True, default=True),
    Metric("off_diagonal_share", "change", "part of D inside the subspaces, off the diagonal", None,
           _share("off_diagonal"), "change", vectors=True, default=True),
    Metric("out_of_span_share", "change", "part of D outside the base's subspaces", None,
           _share("out_of_span"), "change", vectors=True, default=True),
    Metric("intruders", "change", "of the top 10 left vectors, those with no match above 0.5", None,
           _intruders, "sum", vectors=True, default=True),
    Metric("cosine", "change", "<W, W'> / (||W|| ||W'||)", None, _cosine, default=True),
    Metric("frobenius_distance", "change", "||W' - W||_F", None, _frobenius_distance, "norm"),
    Metric("rotation_share", "change", "1 - spectrum_share", None, _rotation_share, "change"),
    Metric("mean_log_ratio", "change", "mean ln(S'_i / S_i), signed", None, _mean_log_ratio),
    Metric("nuclear_ratio", "change", "sum S' / sum S", None, _nuclear_ratio),
    Metric("spectral_ratio", "change", "S'_1 / S_1", None, _spectral_ratio),
    Metric("intruders_strict", "change", "intruders with the threshold 0.8", None,
           _intruders_strict, "sum", vectors=True),
    Metric("intruders_right", "change", "intruders among right vectors", None, _intruders_right,
           "sum", vectors=True),
    Metric("intruders_subspace", "change", "of the top 10, those half outside the base's top 10",
           None, _intruders_subspace, "sum", vectors=True),
    Metric("weakest_match", "change", "lowest best match among the top 10 left vectors", None,
           _weakest_match, "min", vectors=True),
    Metric("left_similarity", "change", "similarity of the top 10 left subspaces", None,
           _similarity(left=True), vectors=True),
    Metric("right_similarity", "change", "similarity of the top 10 right subspaces", None,
           _similarity(left=False), vectors=True),
    Metric("angle_max", "change", "largest principal angle of the top 10 left subspaces", None,
           _distance("largest"), "max", vectors=True),
    Metric("angle_mean", "change", "mean principal angle, left", None, _distance("mean"),
           vectors=True),
    Metric("angle_max_right", "change", "largest principal angle, right", None,
           _distance("largest", left=False), "max", vectors=True),
    Metric("chordal_distance", "change", "sqrt(sum sin^2) of those angles, left", None,
           _distance("chordal"), vectors=True),
    Metric("grassmann_distance", "change", "sqrt(sum theta^2), left", None,
           _distance("grassmann"), vectors=True),
    Metric("projection_distance", "change", "largest sine, left", None, _distance("projection"),
           vectors=True),
    Metric("off_diagonal_energy", "change", "1 - ||diag U'W'V||^2 / ||W'||^2", None,
           _off_diagonal_energy, vectors=True),
    Metric("cka", "change", "uncentred linear CKA of W and W'", None, _cka, vectors=True),
    Metric("amplification", "change", "||D||_F / ||U_D' W V_D||_F, top 10 of D", None,
           _amplification, vectors=True),
    Metric("change_rank90", "change", "rank of D at 90 % of its energy", None,
           _of_change(lambda s, m, n: float(energy_rank(s, 0.9)))),
    Metric("change_rank99", "change", "rank of D at 99 % of its energy", None,
           _of_change(lambda s, m, n: float(energy_rank(s, 0.99)))),
    Metric("change_effective_rank", "change", "effective rank of D", None,
           _of_change(lambda s, m, n: effective_rank(s))),
    Metric("change_stable_rank", "change", "stable rank of D", None,
           _of_change(lambda s, m, n: stable_rank(s))),
    Metric("change_spectral_norm", "change", "||W' - W||_2", None,
           _of_change(_spectral_norm), "max"),
)  # fmt: skip

METRICS: Mapping[str, Metric] = {metric.name: metric for metric in (*_CHANGE, *_SPECTRUM)}
"""Every metric by its name."""

FLOOR = "rounding_floor"
CHANGE_RANK = "change_rank"
EXTRA = (FLOOR, CHANGE_RANK)
"""Numbers that verdicts rest on, in every comparison beside the metrics."""


@dataclass(frozen=True)
class Measured:
    """The metrics of one matrix, or of a batch.

    Attributes
    ----------
    change : mapping of str to float or None
        Metrics that compare.
    base, tuned : mapping of str to float or None
        Metrics of one spectrum, of either side.
    """

    change: Mapping[str, Value] = field(default_factory=dict)
    base: Mapping[str, Value] = field(default_factory=dict)
    tuned: Mapping[str, Value] = field(default_factory=dict)


def choose_metrics(names: Sequence[str] | None, *, fast: bool = False) -> tuple[Metric, ...]:
    """Look up the metrics to compute.

    Parameters
    ----------
    names : sequence of str or None
        Names, beside which the default ones are computed too; ``all`` stands for every metric.
    fast : bool
        Leave out what needs singular vectors.

    Raises
    ------
    UsageError
        For a name that does not exist, or that `fast` leaves out.
    """
    asked = tuple(names or ())
    for name in asked:
        if name != "all" and name not in METRICS:
            raise UsageError(f"metric {name!r}, expected 'all' or one of {', '.join(METRICS)}")
        if fast and name != "all" and METRICS[name].vectors:
            raise UsageError(f"metric {name!r} needs singular vectors, which --fast leaves out")
    return tuple(
        metric
        for metric in METRICS.values()
        if (metric.default or metric.name in asked or "all" in asked)
        and not (fast and metric.vectors)
    )


def measure(pair: Pair, metrics: Iterable[Metric]) -> Measured:
    """Compute metrics of one matrix."""
    change: dict[str, Value] = {}
    base: dict[str, Value] = {}
    tuned: dict[str, Value] = {}
    for metric in metrics:
        if metric.of_spectrum is not None:
            base[metric.name] = metric.of_spectrum(pair.base, pair.m, pair.n)
            if pair.tuned is not None:
                tuned[metric.name] = metric.of_spectrum(pair.tuned, pair.m, pair.n)
        elif metric.of_pair is not None and pair.paired:
            change[metric.name] = metric.of_pair(pair)
    return Measured(change, base, tuned)


def combine(parts: Sequence[Measured], pairs: Sequence[Pair]) -> Measured:
    """Add up the metrics of the matrices of a batch, each as its definition asks for."""
    if len(parts) == 1:
        return parts[0]
    energy = [pair.base_energy for pair in pairs]
    change = [pair.change_energy for pair in pairs]
    return Measured(
        *(
            {
                name: _combined(
                    METRICS[name].combine, [side[name] for side in sides], energy, change
                )
                for name in sides[0]
            }
            for sides in (
                [part.change for part in parts],
                [part.base for part in parts],
                [part.tuned for part in parts],
            )
        )
    )


_PLAIN: Mapping[str, Callable[[list[float]], float]] = {"sum": sum, "max": max, "min": min}


def _combined(
    rule: Combine, values: Sequence[Value], energy: Sequence[float], change: Sequence[float]
) -> Value:
    known = [(v, e, c) for v, e, c in zip(values, energy, change, strict=True) if v is not None]
    if not known:
        return None
    numbers = [v for v, _, _ in known]
    if rule in _PLAIN:
        return float(_PLAIN[rule](numbers))
    if rule == "norm":
        return math.sqrt(sum(v * v for v in numbers))
    if rule == "root":
        whole = sum(energy)
        return math.sqrt(sum(v * v * e for v, e, _ in known) / whole) if whole > 0.0 else 0.0
    if rule == "change":
        return _weighted(numbers, [c for _, _, c in known])
    return sum(numbers) / len(numbers)


def _weighted(values: Sequence[float], weights: Sequence[float]) -> Value:
    total = sum(weights)
    return sum(v * w for v, w in zip(values, weights, strict=True)) / total if total > 0.0 else None
