"""Thresholds on metrics, for continuous integration."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from svftool.auditing.drift import LayerDrift
from svftool.errors import UsageError

METRICS = (
    "weight_drift",
    "relative_drift",
    "delta_norm",
    "max_log_ratio",
    "spectrum_share",
    "svf_share",
    "off_diagonal_share",
    "out_of_span_share",
    "rounding_floor",
    "intruders",
    "cosine",
)
"""Metrics with one number a layer, by which rows can be sorted and gated."""

assert {field.name for field in fields(LayerDrift)} >= set(METRICS)


@dataclass(frozen=True)
class Gate:
    """A metric and the value that no layer may exceed."""

    metric: str
    value: float

    def __str__(self) -> str:
        return f"{self.metric} > {self.value:g}"


def parse_gate(text: str) -> Gate:
    """Read ``METRIC=VALUE``.

    Raises
    ------
    UsageError
        If the metric is unknown or the value is no number.

    Examples
    --------
    >>> str(parse_gate("weight_drift=0.1"))
    'weight_drift > 0.1'
    """
    metric, separator, value = text.partition("=")
    check_metric(metric)
    try:
        return Gate(metric, float(value if separator else ""))
    except ValueError:
        raise UsageError(f"{text!r}: no number after the metric, expected METRIC=VALUE") from None


def check_metric(name: str) -> None:
    """Refuse the name of a metric that does not exist.

    Raises
    ------
    UsageError
        With the names that do.
    """
    if name not in METRICS:
        raise UsageError(f"metric {name!r}, expected one of {', '.join(METRICS)}")


def tripped(rows: Iterable[LayerDrift], gate: Gate) -> list[LayerDrift]:
    """List the rows whose metric exceeds the gate."""
    found = []
    for row in rows:
        value = getattr(row, gate.metric)
        if value is not None and value > gate.value:
            found.append(row)
    return found
