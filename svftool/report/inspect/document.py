"""An audit for scripts: the JSON document, and one line a tensor for spreadsheets."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from svftool.auditing import (
    METRICS,
    AuditResult,
    Comparison,
    Held,
    Row,
    Trajectory,
    Unread,
    Verdict,
    metric_name,
    violations,
)
from svftool.report import json
from svftool.report.inspect import directions
from svftool.report.inspect.gates import gates_document
from svftool.report.inspect.headline import headline
from svftool.report.text import safe

_FORMULA = tuple("=+-@\uff1d\uff0b\uff0d\uff20")
"""What a spreadsheet takes for the start of a formula, in wide letters too."""

SUMMARISED = ("weight_drift", "relative_drift", "svf_share", "intruders")


def document(
    result: AuditResult, *, held: Sequence[Held] = (), curves: bool = False
) -> dict[str, Any]:
    """Return the result for scripts.

    Parameters
    ----------
    result : AuditResult
    held : sequence of Held
        What gates and a policy held.
    curves : bool
        Whether the singular values themselves are put in.
    """
    return json.document(
        "inspect",
        metrics=result.metrics,
        comparisons=[_comparison(one, result.metrics, curves) for one in result.comparisons],
        trajectory=None if result.trajectory is None else _trajectory(result.trajectory),
        gates=gates_document(held),
        failed=[
            {"name": one.name, "found": one.found, "reason": one.reason} for one in violations(held)
        ],
        seconds=result.seconds,
    )


def _comparison(one: Comparison, metrics: Sequence[str], curves: bool) -> dict[str, Any]:
    return {
        "base": str(one.base),
        "tuned": None if one.tuned is None else str(one.tuned),
        "kinds": one.kinds,
        "verdict": None if one.verdict is None else one.verdict.name,
        "confidence": None if one.verdict is None else one.verdict.confidence,
        "evidence": None if one.verdict is None else one.verdict.evidence,
        "headline": None if one.tuned is None else headline(one),
        "rank": None if one.verdict is None else one.verdict.rank,
        "screened": one.screened,
        "directions": directions.document(one.directions),
        "summary": summary(one),
        "layers": [_row(row, metrics, curves) for row in one.rows],
        "unmatched": {
            "base": [_unread(item) | _shapes(item) for item in one.unmatched_base],
            "tuned": [_unread(item) | _shapes(item) for item in one.unmatched_tuned],
        },
        "left_out": _left_out(one),
        "coverage": {
            "compared": one.coverage.compared,
            "total": one.coverage.total,
            "not_compared": [_unread(item) for item in one.coverage.not_compared],
        },
        "notes": one.notes,
    }


def summary(one: Comparison) -> dict[str, Any]:
    """Count tensors and verdicts, and give medians and totals over the matrices."""
    return {
        "tensors": {
            "base": one.totals[0],
            "tuned": one.totals[1],
            "compared": len(one.rows),
            "matrices": len(one.matrices),
            "left_out": len(one.left_out),
            "unmatched_base": len(one.unmatched_base),
            "unmatched_tuned": len(one.unmatched_tuned),
        },
        "verdicts": one.counts(),
        "median": _named({name: one.median(name) for name in SUMMARISED}),
        "total": {name: one.total(name) for name in ("weight_drift", "svf_share")},
    }


def _row(row: Row, metrics: Sequence[str], curves: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": row.name,
        "tuned_name": row.tuned_name or row.name,
        "view": row.view,
        "shape": row.shape,
        "matrix": row.matrix,
        "dtype": row.dtype,
    }
    for name in metrics:
        if METRICS[name].of_pair is not None:
            found[name] = row.measured.change.get(name)
        else:
            sides = row.measured.base, row.measured.tuned
            found[name] = dict(zip(("base", "tuned"), (x.get(name) for x in sides), strict=True))
    found = _named(found)
    found |= {"rounding_floor": row.rounding_floor, "change_rank": row.change_rank}
    found["infinite"] = row.infinite
    found |= _verdict(row.verdict)
    if curves and row.curves is not None:
        found["curves"] = {
            side: None if values is None else values.tolist()
            for side, values in vars(row.curves).items()
        }
    return found


def _named(found: Mapping[str, Any]) -> dict[str, Any]:
    """Put a metric under its name beside its older key, which scripts rely on."""
    return {name: value for key, value in found.items() for name in (key, metric_name(key))}


def _verdict(verdict: Verdict | None) -> dict[str, Any]:
    if verdict is None:
        return dict.fromkeys(("verdict", "rank", "confidence", "evidence"))
    return {
        "verdict": verdict.name,
        "rank": verdict.rank,
        "confidence": verdict.confidence,
        "evidence": verdict.evidence,
    }


def _left_out(one: Comparison) -> list[dict[str, Any]]:
    """List what has no metrics; codes that were compared by bytes have a verdict."""
    codes = {row.name: None if row.verdict is None else row.verdict.name for row in one.codes}
    return [_unread(item) | {"verdict": codes.get(item.name)} for item in one.left_out]


def _unread(item: Unread) -> dict[str, str]:
    return {"name": item.name, "reason": item.reason}


def _shapes(item: Unread) -> dict[str, Any]:
    return {"shape": dict(zip(("base", "tuned"), item.shapes, strict=True))}


def _trajectory(one: Trajectory) -> dict[str, Any]:
    return {
        "checkpoints": [str(path) for path in one.checkpoints],
        "median": _named(one.metrics),
        "matrices": len(one.matrices),
        "monotone": one.monotone,
        "layers": [{"name": name, "weight_drift": drift} for name, drift in one.layers.items()],
    }


def csv_text(result: AuditResult) -> str:
    """Return one line a tensor for spreadsheets; what would be taken for a formula is quoted."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_columns(result.metrics))
    for one in result.comparisons:
        for row in one.rows:
            writer.writerow(_cell(value) for value in _values(one, row, result.metrics))
    return out.getvalue()


def _columns(metrics: Sequence[str]) -> list[str]:
    columns = ["base", "tuned", "name", "view", "matrix"]
    for name in metrics:
        two = METRICS[name].of_pair is None
        columns += [f"{name}_base", f"{name}_tuned"] if two else [name]
    return [*columns, "rounding_floor", "change_rank", "verdict", "confidence", "evidence"]


def _values(one: Comparison, row: Row, metrics: Sequence[str]) -> Iterator[Any]:
    yield from (one.base, one.tuned, row.name, row.view, row.matrix)
    for name in metrics:
        if METRICS[name].of_pair is None:
            yield row.measured.base.get(name)
            yield row.measured.tuned.get(name)
        else:
            yield row.measured.change.get(name)
    verdict = row.verdict
    yield from (row.rounding_floor, row.change_rank)
    yield from (
        (None,) * 3
        if verdict is None
        else (
            verdict.text,
            verdict.confidence,
            verdict.evidence,
        )
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    if isinstance(value, float | int):
        return str(value)
    text = safe(str(value))
    return f"'{text}" if text.lstrip()[:1] in _FORMULA else text
