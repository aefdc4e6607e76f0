"""An audit as one self-contained page: no network, light and dark, made for print as well."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import Any

from svftool.auditing import (
    METRICS,
    VERDICTS,
    AuditResult,
    Comparison,
    Held,
    Row,
    Verdict,
    metric_name,
)
from svftool.report.drawing import require_jinja
from svftool.report.inspect import charts, directions, maps
from svftool.report.inspect.headline import headline
from svftool.report.inspect.marks import largest_of, number, part_of
from svftool.report.inspect.unread import unread
from svftool.report.text import safe, shape

HEAT = (
    "weight_drift",
    "relative_drift",
    "svf_share",
    "off_diagonal_share",
    "out_of_span_share",
    "intruders",
    "effective_rank.change",
    "stable_rank.change",
    "spectral_norm.change",
)
"""Lines of the heat map."""

EXAMPLES = 6
"""Layers whose spectra are drawn."""

LINES = 1000
"""Lines of the table; the spreadsheet has them all."""

_SHARED = 4
"""With so many comparisons on a page, or more, each has this part of its lines and columns."""

KINDS = {name: name.translate(str.maketrans(" ", "-", "()")) for name in VERDICTS}


def page(result: AuditResult, *, held: Sequence[Held] = ()) -> str:
    """Return the page.

    Parameters
    ----------
    result : AuditResult
    held : sequence of Held
        What gates and a policy held.

    Raises
    ------
    MissingDependencyError
        If jinja2 is not installed.
    """
    from svftool.version import __version__

    jinja2 = require_jinja()
    markup = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    files = resources.files("svftool.report.inspect").joinpath("assets")
    texts = {name: files.joinpath(name).read_text("utf-8") for name in _ASSETS}
    line = result.trajectory
    rendered: str = markup.from_string(texts["page.html"]).render(
        style=texts["page.css"],
        script=texts["page.js"],
        version=__version__,
        title=_title(result),
        sections=[
            _section(one, index, len(result.comparisons))
            for index, one in enumerate(result.comparisons, 1)
        ],
        trajectory="" if line is None else charts.trajectory(line),
        monotone=line is not None and line.monotone,
        meanings=VERDICTS,
        kinds=KINDS,
        metrics={metric_name(name): METRICS[name].what for name in result.metrics},
        gates=_gates(held),
        failed=sum(not one.passed for one in held),
    )
    return rendered


_ASSETS = ("page.html", "page.css", "page.js")


def _title(result: AuditResult) -> str:
    first = result.comparisons[0]
    if first.tuned is None:
        return safe(first.base.name)
    others = [safe(one.tuned.name) for one in result.comparisons if one.tuned is not None]
    listed = others[0] if len(others) == 1 else f"{len(others)} fine-tunes"
    return f"{safe(first.base.name)} → {listed}"


def _gates(held: Sequence[Held]) -> list[dict[str, Any]]:
    """Return what each rule held, an offender under the first rule that it breaks."""
    seen: set[tuple[str, str]] = set()
    lines = []
    for one in held:
        fresh = [item for item in one.offenders if (one.place, item.name) not in seen]
        seen |= {(one.place, item.name) for item in one.offenders}
        lines.append(
            {
                "rule": safe(one.rule),
                "place": safe(one.place),
                "matched": one.matched,
                "passed": one.passed,
                "missed": safe(one.missed),
                "offenders": [(safe(x.name), safe(x.found), safe(x.reason)) for x in fresh],
            }
        )
    return lines


def _section(one: Comparison, index: int, count: int) -> dict[str, Any]:
    rows = one.matrices
    columns, lines = maps.COLUMNS // min(count, _SHARED), LINES // min(count, _SHARED)
    by_drift = sorted(rows, key=lambda row: -(row.value("weight_drift") or 0.0))
    compared, parts = one.tuned is not None, one.parts()
    drawn = [row for row in one.by_part() if row.curves is not None][:EXAMPLES]
    largest = largest_of(row.value("weight_drift") for row in rows)
    return {
        "index": index,
        "base": safe(one.base.name),
        "tuned": safe(one.tuned.name) if one.tuned is not None else None,
        "kinds": one.kinds,
        "verdict": one.verdict,
        "headline": "" if one.verdict is None else _headline(one, one.verdict),
        "kind": "" if one.verdict is None else KINDS[one.verdict.name],
        "tiles": _tiles(one),
        "counts": _counted(one),
        "heat": maps.heat_map(rows, _heat_lines(one), most=columns),
        "directions": maps.direction_map(rows, most=columns) if compared else "",
        "leading": directions.section(one.directions),
        "spectra": [
            (safe(row.name), _facts(row, parts.get(row.name)), charts.spectra(row.curves))
            for row in drawn
            if row.curves is not None
        ],
        "rows": [
            _line(row, largest, parts.get(row.name))
            for row in (by_drift if compared else rows)[:lines]
        ],
        "hidden": max(len(rows) - lines, 0),
        "vectors": _vectors(one),
        "missing": _missing(one),
        "totals": one.totals,
        "compared": one.coverage.compared,
        "notes": [safe(note) for note in one.notes],
    }


def _headline(one: Comparison, verdict: Verdict) -> str:
    return safe(verdict.evidence if one.tuned is None else headline(one))


def _heat_lines(one: Comparison) -> tuple[str, ...]:
    if one.tuned is None:
        return tuple(f"{name}.base" for name in ("spectral_norm", "effective_rank", "stable_rank"))
    known = {
        name for row in one.matrices for name, v in row.measured.change.items() if v is not None
    }
    return tuple(name for name in HEAT if "." in name or name in known)


def _tiles(one: Comparison) -> list[tuple[str, str, str]]:
    """Return the numbers at the top: what, value, explanation."""
    matrices = f"{len(one.matrices)} of {one.totals[0]}"
    if one.tuned is None:
        return [("matrices", matrices, "tensors of the checkpoint")]
    share = one.total("svf_share")
    moved = sum(row.changed for row in one.matrices)
    intruders = [row.value("intruders") for row in one.matrices]
    found = [value for value in intruders if value is not None]
    return [
        ("matrices changed", f"{moved} of {len(one.matrices)}", "beyond rounding"),
        ("weight drift", number(one.total("weight_drift")), "‖∆W‖ / ‖W‖, all matrices"),
        ("spectral drift", number(one.median("relative_drift")), "‖∆S‖ / ‖S‖, median"),
        ("svf share", "–" if share is None else f"{share:.0%}", "of the change is in S alone"),
        ("intruders", number(sum(found)) if found else "–", "new leading directions in all"),
    ]


def _counted(one: Comparison) -> list[tuple[str, str, int, float]]:
    counts = one.counts()
    whole = sum(counts.values())
    return [(name, KINDS[name], count, 100.0 * count / whole) for name, count in counts.items()]


def _facts(row: Row, part: float | None) -> str:
    facts = [shape(row.matrix or ())]
    drift = row.value("weight_drift")
    if drift is not None:
        facts.append(f"weight drift {number(drift)}")
    if part is not None:
        facts.append(f"{_percent(part)} of the change")
    return " · ".join(facts)


def _percent(part: float | None) -> str:
    return "–" if part is None else f"{number(100.0 * part)} %"


def _line(row: Row, largest: float, part: float | None) -> dict[str, Any]:
    drift = row.value("weight_drift")
    verdict = row.verdict
    return {
        "name": safe(row.name),
        "renamed": safe(row.tuned_name or ""),
        "matrix": shape(row.matrix or ()),
        "size": row.matrix[-1] * row.matrix[-2] if row.matrix else 0,
        "verdict": "" if verdict is None else verdict.text,
        "kind": "" if verdict is None else KINDS[verdict.name],
        "confidence": "" if verdict is None else verdict.confidence,
        "evidence": "" if verdict is None else safe(verdict.evidence),
        "drift": drift,
        "bar": 100.0 * part_of(drift, largest),
        "part": part,
        "part_text": _percent(part),
        "spectral": row.value("relative_drift"),
        "shares": [
            row.value(name) for name in ("svf_share", "off_diagonal_share", "out_of_span_share")
        ],
        "intruders": row.value("intruders"),
        "rank": (row.measured.base.get("effective_rank"), row.measured.tuned.get("effective_rank")),
        "norm": (row.measured.base.get("spectral_norm"), row.measured.tuned.get("spectral_norm")),
        "number": number,
    }


def _vectors(one: Comparison) -> tuple[int, int, list[tuple[str, str]]]:
    vectors = [row for row in one.rows if not row.is_matrix]
    moved = [row for row in vectors if row.value("weight_drift")]
    moved.sort(key=lambda row: -(row.value("weight_drift") or 0.0))
    listed = [(safe(row.name), number(row.value("weight_drift"))) for row in moved]
    return len(moved), len(vectors), listed


def _missing(one: Comparison) -> list[tuple[str, list[tuple[str, str]]]]:
    return [
        (what.capitalize(), [(safe(item.name), safe(item.reason)) for item in items])
        for what, items in unread(one)
    ]
