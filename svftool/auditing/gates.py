"""Thresholds on metrics, for continuous integration."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from svftool.auditing.results import Row
from svftool.auditing.verdicts import BROKEN, CHANGED, UNTOUCHED
from svftool.choices.metrics import CHANGE, CHANGE_RANK, EXTRA, metric_name, read_limit


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
        if row.value(self.metric) is not None or _trips_all(row) or _not_told(row, self.metric):
            return True
        of_change = self.metric in (*EXTRA, *CHANGE)
        still = row.verdict is not None and row.verdict.name == UNTOUCHED
        return still and of_change and (row.is_matrix or row.by_bytes)

    def found(self, row: Row) -> str:
        """Say what a row that trips has."""
        value = row.value(self.metric)
        if value is not None:
            return f"{metric_name(self.metric)} {value:.4g}"
        if _not_told(row, self.metric):
            return f"{metric_name(self.metric)} that a screen cannot tell"
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
    return Gate(*read_limit(text))


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
    if _trips_all(row) or _not_told(row, gate.metric):
        return True
    value = row.value(gate.metric)
    return value is not None and value > gate.value


def _not_told(row: Row, metric: str) -> bool:
    """Whether a screen could not tell a rank, which may then be above any limit."""
    screened = row.evidence is not None and row.evidence.screened is not None
    return metric == CHANGE_RANK and screened and row.changed and row.change_rank is None


def _trips_all(row: Row) -> bool:
    verdict = "" if row.verdict is None else row.verdict.name
    return verdict == BROKEN or (row.by_bytes and verdict == CHANGED)
