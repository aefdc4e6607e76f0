"""The metrics of an audit by name: what each one is, where it comes from, how a batch adds up.

A metric of kind ``spectrum`` looks at one side, of kind ``change`` at both. Those that need
singular vectors are left out when only values are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from svftool.auditing import formulas as f
from svftool.auditing.formulas import Value
from svftool.auditing.pair import Array, norm_ratio
from svftool.auditing.spectral import AnyPair
from svftool.choices.metrics import SCREENED, check_screened, metric_key, metric_name
from svftool.errors import UsageError, no_such
from svftool.numerics import (
    effective_rank,
    energy_rank,
    nuclear_rank,
    numerical_rank,
    participation_ratio,
    stable_rank,
)
from svftool.numerics.random_matrix import noise_bulk, optimal_hard_threshold, spectrum_snr

Combine = Literal["mean", "sum", "max", "min", "root", "norm", "change"]


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
    of_pair: Callable[[AnyPair], Value] | None = None
    combine: Combine = "mean"
    vectors: bool = False
    default: bool = False


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
        "spectral_norm", "spectrum", "largest singular value", f.spectral_norm,
        combine="max", default=True,
    ),
    Metric("frobenius_norm", "spectrum", "||W||_F", f.frobenius_norm, combine="norm"),
    Metric("condition_number", "spectrum", "largest over smallest value above rounding",
           f.condition, combine="max"),
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
    Metric("alpha", "spectrum", "power-law exponent of the tail of s^2", f.power_law("alpha")),
    Metric("alpha_xmin", "spectrum", "where that tail begins", f.power_law("xmin")),
    Metric("alpha_distance", "spectrum", "Kolmogorov-Smirnov distance of the fit",
           f.power_law("distance")),
    Metric("alpha_sigma", "spectrum", "standard error of alpha", f.power_law("sigma")),
    Metric("alpha_weighted", "spectrum", "alpha log10 s_1^2", f.alpha_weighted),
    Metric("log_alpha_norm", "spectrum", "log10 sum s^(2 alpha)", f.log_alpha_norm),
    Metric("log_norm", "spectrum", "log10 ||W||_F^2", f.log_norm),
    Metric("log_spectral_norm", "spectrum", "log10 s_1^2", f.log_spectral_norm),
    Metric("mp_softrank", "spectrum", "edge of the noise bulk over s_1, squared", f.mp_softrank),
    Metric("matrix_entropy", "spectrum", "entropy of s^2 over the log of the rank",
           f.matrix_entropy),
)  # fmt: skip

_CHANGE: tuple[Metric, ...] = (
    Metric("relative_drift", "change", "||S' - S|| / ||S||, sorted", None, f.relative_drift, "root",
           default=True),
    Metric("delta_norm", "change", "||S' - S|| by index", None, f.delta_norm, "norm", default=True),
    Metric("max_log_ratio", "change", "largest |ln(S'_i / S_i)|", None, f.max_log_ratio, "max",
           default=True),
    Metric("weight_drift", "change", "||W' - W||_F / ||W||_F", None, f.weight_drift, "root",
           default=True),
    Metric("spectrum_share", "change", "||S' - S||^2 / ||D||_F^2", None, f.spectrum_share, "change",
           default=True),
    Metric("svf_share", "change", "part of D that a change of S can make", None, f.share("svf"),
           "change", vectors=True, default=True),
    Metric("off_diagonal_share", "change", "part of D inside the subspaces, off the diagonal", None,
           f.share("off_diagonal"), "change", vectors=True, default=True),
    Metric("out_of_span_share", "change", "part of D outside the base's subspaces", None,
           f.share("out_of_span"), "change", vectors=True, default=True),
    Metric("intruders", "change", "of the top 10 left vectors, those with no match above 0.5", None,
           f.intruders, "sum", vectors=True, default=True),
    Metric("cosine", "change", "<W, W'> / (||W|| ||W'||)", None, f.cosine, default=True),
    Metric("frobenius_distance", "change", "||W' - W||_F", None, f.frobenius_distance, "norm"),
    Metric("rotation_share", "change", "1 - spectrum_share", None, f.rotation_share, "change"),
    Metric("mean_log_ratio", "change", "mean ln(S'_i / S_i), signed", None, f.mean_log_ratio),
    Metric("nuclear_ratio", "change", "sum S' / sum S", None, f.nuclear_ratio),
    Metric("spectral_ratio", "change", "S'_1 / S_1", None, f.spectral_ratio),
    Metric("intruders_strict", "change", "intruders with the threshold 0.8", None,
           f.intruders_strict, "sum", vectors=True),
    Metric("intruders_right", "change", "intruders among right vectors", None, f.intruders_right,
           "sum", vectors=True),
    Metric("intruders_subspace", "change", "of the top 10, those half outside the base's top 10",
           None, f.intruders_subspace, "sum", vectors=True),
    Metric("weakest_match", "change", "lowest best match among the top 10 left vectors", None,
           f.weakest_match, "min", vectors=True),
    Metric("left_similarity", "change", "similarity of the top 10 left subspaces", None,
           f.similarity(left=True), vectors=True),
    Metric("right_similarity", "change", "similarity of the top 10 right subspaces", None,
           f.similarity(left=False), vectors=True),
    Metric("angle_max", "change", "largest principal angle of the top 10 left subspaces", None,
           f.distance("largest"), "max", vectors=True),
    Metric("angle_mean", "change", "mean principal angle, left", None, f.distance("mean"),
           vectors=True),
    Metric("angle_max_right", "change", "largest principal angle, right", None,
           f.distance("largest", left=False), "max", vectors=True),
    Metric("chordal_distance", "change", "sqrt(sum sin^2) of those angles, left", None,
           f.distance("chordal"), vectors=True),
    Metric("grassmann_distance", "change", "sqrt(sum theta^2), left", None,
           f.distance("grassmann"), vectors=True),
    Metric("projection_distance", "change", "largest sine, left", None, f.distance("projection"),
           vectors=True),
    Metric("off_diagonal_energy", "change", "1 - ||diag U'W'V||^2 / ||W'||^2", None,
           f.off_diagonal_energy, vectors=True),
    Metric("cka", "change", "uncentred linear CKA of W and W'", None, f.cka, vectors=True),
    Metric("amplification", "change", "||D||_F / ||U_D' W V_D||_F, top 10 of D", None,
           f.amplification, vectors=True),
    Metric("change_rank90", "change", "rank of D at 90 % of its energy", None,
           f.of_change(lambda s, m, n: float(energy_rank(s, 0.9)))),
    Metric("change_rank99", "change", "rank of D at 99 % of its energy", None,
           f.of_change(lambda s, m, n: float(energy_rank(s, 0.99)))),
    Metric("change_effective_rank", "change", "effective rank of D", None,
           f.of_change(lambda s, m, n: effective_rank(s))),
    Metric("change_stable_rank", "change", "stable rank of D", None,
           f.of_change(lambda s, m, n: stable_rank(s))),
    Metric("change_spectral_norm", "change", "||W' - W||_2", None,
           f.of_change(f.spectral_norm), "max"),
)  # fmt: skip

METRICS: Mapping[str, Metric] = {metric.name: metric for metric in (*_CHANGE, *_SPECTRUM)}
"""Every metric by its name."""


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


class Energies(Protocol):
    """What the parts of a batch are weighted by."""

    @property
    def base_energy(self) -> float:
        """``||W||_F^2``."""

    @property
    def change_energy(self) -> float:
        """``||D||_F^2``."""


class EnergiesOfBoth(Energies, Protocol):
    """What sums of squares of both sides give."""

    @property
    def identical(self) -> bool:
        """Whether nothing changed."""

    @property
    def tuned_energy(self) -> float:
        """``||W'||_F^2``."""

    @property
    def weight_drift(self) -> float:
        """``||D|| / ||W||``."""

    @property
    def cosine(self) -> float | None:
        """Cosine of the two as vectors."""


def choose_metrics(
    names: Sequence[str] | None, *, fast: bool = False, screen: bool = False
) -> tuple[Metric, ...]:
    """Look up the metrics to compute.

    Parameters
    ----------
    names : sequence of str or None
        Names, beside which the default ones are computed too; ``all`` stands for every metric.
    fast : bool
        Leave out what needs singular vectors.
    screen : bool
        Leave out what needs singular values.

    Raises
    ------
    UsageError
        For a name that does not exist, or that `fast` or `screen` leaves out.
    """
    asked = tuple(map(metric_key, names or ()))
    if screen:
        check_screened(asked)
    for name in asked:
        if name != "all" and name not in METRICS:
            raise UsageError(no_such("metric", name, ["all", *map(metric_name, METRICS)]))
        if fast and name != "all" and METRICS[name].vectors:
            raise UsageError(f"metric {name!r} needs singular vectors, which --fast leaves out")
    return tuple(
        metric
        for metric in METRICS.values()
        if (metric.default or metric.name in asked or "all" in asked)
        and not (fast and metric.vectors)
        and not (screen and metric.name not in SCREENED)
    )


def measure_energies(evidence: EnergiesOfBoth, metrics: Iterable[Metric]) -> Measured:
    """Return those metrics of one matrix that sums of squares give."""
    change: dict[str, Value] = {
        "weight_drift": evidence.weight_drift,
        "cosine": evidence.cosine,
        "frobenius_distance": math.sqrt(evidence.change_energy),
    }
    if evidence.identical:
        change["cosine"] = 1.0 if evidence.base_energy > 0.0 else None
    asked = {metric.name for metric in metrics}
    sides = [
        {"frobenius_norm": math.sqrt(energy)} if "frobenius_norm" in asked else {}
        for energy in (evidence.base_energy, evidence.tuned_energy)
    ]
    return Measured({name: value for name, value in change.items() if name in asked}, *sides)


def measure(pair: AnyPair, metrics: Iterable[Metric]) -> Measured:
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


def combine(parts: Sequence[Measured], pairs: Sequence[Energies]) -> Measured:
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
        # What was zero moved by all of its change, whatever the other matrices hold.
        moved = sum(v * v * e if math.isfinite(v) else c for v, e, c in known)
        return norm_ratio(moved, sum(energy))
    if rule == "change":
        return _weighted(numbers, [c for _, _, c in known])
    return sum(numbers) / len(numbers)


def _weighted(values: Sequence[float], weights: Sequence[float]) -> Value:
    total = sum(weights)
    return sum(v * w for v, w in zip(values, weights, strict=True)) / total if total > 0.0 else None
