"""Thresholds on metrics, for continuous integration."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from svftool.auditing.metrics import EXTRA, METRICS
from svftool.auditing.results import Row
from svftool.auditing.verdicts import BROKEN, CHANGED
from svftool.errors import UsageError

_SIDES = ("base", "tuned", "change")


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
        number = float(value if separator else "")
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise UsageError(f"{text!r}: no number after the metric, expected METRIC=VALUE")
    return Gate(metric, number)


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
        With the names that do.
    """
    metric, _, side = name.partition(".")
    if metric in METRICS or metric in EXTRA:
        one_spectrum = metric in METRICS and METRICS[metric].of_spectrum is not None
        if not side or (one_spectrum and side in _SIDES):
            return
    raise UsageError(f"metric {name!r}, expected one of {', '.join((*METRICS, *EXTRA))}")


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
    verdict = "" if row.verdict is None else row.verdict.name
    if verdict == BROKEN or (row.by_bytes and verdict == CHANGED):
        return True
    value = row.value(gate.metric)
    return value is not None and value > gate.value
