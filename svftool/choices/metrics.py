"""Metrics of an audit by name, and limits on them; how they are computed is elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterable

from svftool.errors import UsageError, no_such

SPECTRUM = (
    "effective_rank", "stable_rank", "spectral_norm", "frobenius_norm", "condition_number",
    "nuclear_rank", "participation_ratio", "numerical_rank", "rank90", "mp_sigma", "mp_edge",
    "mp_spikes", "hard_threshold", "hard_threshold_rank", "spectrum_snr", "alpha", "alpha_xmin",
    "alpha_distance", "alpha_sigma", "alpha_weighted", "log_alpha_norm", "log_norm",
    "log_spectral_norm", "mp_softrank", "matrix_entropy",
)  # fmt: skip
"""Metrics that look at the spectrum of one side."""

CHANGE = (
    "relative_drift", "delta_norm", "max_log_ratio", "weight_drift", "spectrum_share", "svf_share",
    "off_diagonal_share", "out_of_span_share", "intruders", "cosine", "frobenius_distance",
    "rotation_share", "mean_log_ratio", "nuclear_ratio", "spectral_ratio", "intruders_strict",
    "intruders_right", "intruders_subspace", "weakest_match", "left_similarity",
    "right_similarity", "angle_max", "angle_mean", "angle_max_right", "chordal_distance",
    "grassmann_distance", "projection_distance", "off_diagonal_energy", "cka", "amplification",
    "change_rank90", "change_rank99", "change_effective_rank", "change_stable_rank",
    "change_spectral_norm",
)  # fmt: skip
"""Metrics that compare both sides."""

FLOOR = "rounding_floor"
CHANGE_RANK = "change_rank"
EXTRA = (FLOOR, CHANGE_RANK)
"""Numbers that verdicts rest on, in every comparison beside the metrics."""

SCREENED = ("weight_drift", "cosine", "frobenius_distance", "frobenius_norm")
"""Metrics that a screen measures, beside `EXTRA`."""

SHOWN = {"relative_drift": "spectral_drift"}
"""Names for people and in options of metrics whose key in documents is older."""

_KEYS = {shown: key for key, shown in SHOWN.items()}
_SIDES = ("base", "tuned", "change")


def metric_key(name: str) -> str:
    """Return the key under which a metric is kept, for any of its names.

    Examples
    --------
    >>> metric_key("spectral_drift"), metric_key("alpha.base")
    ('relative_drift', 'alpha.base')
    """
    metric, dot, side = name.partition(".")
    return f"{_KEYS.get(metric, metric)}{dot}{side}"


def metric_name(key: str) -> str:
    """Return the name of a metric that people read and write, the same everywhere.

    Examples
    --------
    >>> metric_name("relative_drift"), metric_name("weight_drift")
    ('spectral_drift', 'weight_drift')
    """
    metric, dot, side = key.partition(".")
    return f"{SHOWN.get(metric, metric)}{dot}{side}"


def metric_names() -> list[str]:
    """List the names of all metrics, those that compare first."""
    return [*map(metric_name, (*CHANGE, *SPECTRUM)), *EXTRA]


def check_metric(name: str) -> None:
    """Refuse the name of a metric that does not exist.

    Parameters
    ----------
    name : str
        A metric; one of a single spectrum may end in ``.base``, ``.tuned`` or ``.change``, which is
        the relative difference of the two.

    Raises
    ------
    UsageError
        With the name that was probably meant.
    """
    metric, _, side = metric_key(name).partition(".")
    if metric not in (*SPECTRUM, *CHANGE, *EXTRA):
        raise UsageError(no_such("metric", name.partition(".")[0], metric_names()))
    if not side:
        return
    if metric not in SPECTRUM:
        raise UsageError(
            f"metric {name!r}: {metric_name(metric)} compares both sides, expected no side. "
            f"Write {metric_name(metric)!r}."
        )
    if side not in _SIDES:
        raise UsageError(no_such("side of a metric", side, _SIDES))


def check_metrics(names: str) -> tuple[str, ...]:
    """Read names of metrics with commas between them; ``all`` stands for every one.

    Raises
    ------
    UsageError
        If one does not exist, or names a side.

    Examples
    --------
    >>> check_metrics("cosine, alpha")
    ('cosine', 'alpha')
    """
    found = tuple(name.strip() for name in names.split(","))
    known = ("all", *SPECTRUM, *CHANGE)
    for name in found:
        if metric_key(name) not in known:
            raise UsageError(no_such("metric", name, map(metric_name, known)))
    return found


def check_screened(names: Iterable[str]) -> None:
    """Refuse metrics that a screen does not measure.

    Raises
    ------
    UsageError
        Naming those that it does.
    """
    for name in names:
        if metric_key(name).partition(".")[0] not in ("all", *SCREENED, *EXTRA):
            known = ", ".join((*SCREENED, *EXTRA))
            raise UsageError(
                f"metric {name!r} is not measured by --screen, which measures {known}. "
                "Leave out --screen, or name one of these."
            )


def read_limit(text: str) -> tuple[str, float]:
    """Read ``METRIC=VALUE``.

    Returns
    -------
    tuple of str and float
        The key of the metric, and the value that it may not exceed.

    Raises
    ------
    UsageError
        If the metric is unknown or the value is no number.

    Examples
    --------
    >>> read_limit("weight_drift=0.1")
    ('weight_drift', 0.1)
    """
    metric, separator, value = (part.strip() for part in text.partition("="))
    check_metric(metric)
    try:
        number = float(value if separator else "")
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise UsageError(f"{text!r}: no number after the metric, expected METRIC=VALUE")
    return metric_key(metric), number
