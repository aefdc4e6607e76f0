"""Thresholds on metrics, for continuous integration."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from svftool.auditing.metrics import EXTRA, METRICS, metric_key, metric_name, metric_names
from svftool.auditing.results import Row
from svftool.auditing.verdicts import BROKEN, CHANGED, UNTOUCHED
from svftool.errors import UsageError, no_such

_SIDES = ("base", "tuned", "change")


@dataclass(frozen=True)
class Gate:
    """A metric and the value that no layer may exceed."""

    metric: str
    value: float

    def __str__(self) -> str:
        return f"{metric_name(self.metric)} ≤ {self.value:g}"

    def holds(self, row: Row) -> bool:
        """Whether there is anything about a row that the gate could pass or refuse.

        A metric of the change may have no number where nothing changed: such a row is held.
        """
        if row.value(self.metric) is not None or _trips_all(row):
            return True
        of_change = self.metric in EXTRA or METRICS[self.metric.partition(".")[0]].kind == "change"
        still = row.verdict is not None and row.verdict.name == UNTOUCHED
        return still and of_change and (row.is_matrix or row.by_bytes)

    def found(self, row: Row) -> str:
        """Say what a row that trips has."""
        value = row.value(self.metric)
        if value is not None:
            return f"{metric_name(self.metric)} {value:.4g}"
        return "broken" if row.verdict is None else row.verdict.text


def parse_gate(text: str) -> Gate:
    """Read ``METRIC=VALUE``.

    Raises
    ------
    UsageError
        If the metric is unknown or the value is no number.

    Examples
    --------
    >>> str(parse_gate("weight_drift=0.1"))
    'weight_drift ≤ 0.1'
    """
    metric, separator, value = (part.strip() for part in text.partition("="))
    check_metric(metric)
    try:
        number = float(value if separator else "")
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise UsageError(f"{text!r}: no number after the metric, expected METRIC=VALUE")
    return Gate(metric_key(metric), number)


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
    if metric not in METRICS and metric not in EXTRA:
        raise UsageError(no_such("metric", name.partition(".")[0], metric_names()))
    if not side:
        return
    if metric not in METRICS or METRICS[metric].of_spectrum is None:
        raise UsageError(
            f"metric {name!r}: {metric_name(metric)} compares both sides, expected no side. "
            f"Write {metric_name(metric)!r}."
        )
    if side not in _SIDES:
        raise UsageError(no_such("side of a metric", side, _SIDES))


def tripped(rows: Iterable[Row], gate: Gate) -> list[Row]:
    """List the rows whose metric exceeds the gate, the worst first.

    A tensor that is broken trips every gate: it has no number that could be below. So does one
    of codes whose bytes changed.
    """
    found = [row for row in rows if _exceeds(row, gate)]
    return sorted(found, key=lambda row: _worst_first(row.value(gate.metric)))


def _worst_first(value: float | None) -> float:
    return -math.inf if value is None else -value


def _exceeds(row: Row, gate: Gate) -> bool:
    if _trips_all(row):
        return True
    value = row.value(gate.metric)
    return value is not None and value > gate.value


def _trips_all(row: Row) -> bool:
    verdict = "" if row.verdict is None else row.verdict.name
    return verdict == BROKEN or (row.by_bytes and verdict == CHANGED)
