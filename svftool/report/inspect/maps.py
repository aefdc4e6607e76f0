"""Maps of an audit's page as SVG: layers from left to right, metrics or singular values down."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from svftool.auditing import Curves, Row, metric_name
from svftool.report.inspect.marks import block_of, in_order, largest_of, number, part_of
from svftool.report.inspect.svg import WIDTH, cell, svg, text
from svftool.report.text import safe

COLUMNS = 400
"""More would be thinner than two pixels and make a large page: neighbours share one."""

_LABEL = 150
_CELL = 15
_BINS = 24
_BIN = 6

Array = npt.NDArray[np.float64]
Columns = list[list[Row]]


def heat_map(rows: Sequence[Row], metrics: Sequence[str], *, most: int = COLUMNS) -> str:
    """Draw metrics against layers, each metric against its largest.

    Parameters
    ----------
    rows : sequence of Row
        Matrices.
    metrics : sequence of str
        One line each; metrics of one spectrum are shown by their relative change.
    most : int
        Columns at most; where neighbours share one, it shows the largest of them.
    """
    if not rows:
        return ""
    columns = _columns(in_order(rows), most)
    step = (WIDTH - _LABEL) / len(columns)
    parts = []
    for line, metric in enumerate(metrics):
        top = line * (_CELL + 3)
        label = metric_name(metric).replace(".change", ", change").replace("_", " ")
        parts.append(text(_LABEL - 10, top + _CELL - 4, label, anchor="end"))
        values = [_largest([row.value(metric) for row in column]) for column in columns]
        largest = largest_of(None if value is None else abs(value) for value in values)
        for index, (column, value) in enumerate(zip(columns, values, strict=True)):
            shade = part_of(value, largest)
            title = f"{_named(column)}: {label} {number(value)}"
            kind = "cell none" if value is None else "cell"
            parts.append(cell(_LABEL + index * step, top, step, _CELL, shade, title, kind))
    height = len(metrics) * (_CELL + 3)
    parts += _block_ticks(columns, step, height)
    return svg(height + 26, parts, "Heat map of layers against metrics")


def direction_map(rows: Sequence[Row], *, most: int = COLUMNS) -> str:
    """Draw where in each spectrum the singular values changed: layers against singular directions.

    Each column is a layer, its largest singular values at the top; a cell's shade is the relative
    change ``|diag(U' D V)| / S`` of that stretch, on one scale for all layers.

    Parameters
    ----------
    rows : sequence of Row
        Matrices.
    most : int
        As of `heat_map`.
    """
    drawn = [row for row in rows if row.curves is not None and row.curves.tuned is not None]
    if not drawn:
        return ""
    columns = _columns(in_order(drawn), most)
    step = (WIDTH - _LABEL) / len(columns)
    changes = [_change_of(column) for column in columns]
    # A few tiny singular values may have doubled: they are not to pale all others.
    largest = float(np.quantile(np.concatenate(changes), 0.98))
    largest = largest or max(float(one.max(initial=0.0)) for one in changes)
    bottom = _BINS * _BIN
    parts = [
        text(_LABEL - 10, 9, "largest", anchor="end"),
        text(_LABEL - 10, bottom - 1, "smallest", anchor="end"),
        text(_LABEL - 10, bottom / 2 + 4, "singular value", anchor="end"),
    ]
    for index, (column, change) in enumerate(zip(columns, changes, strict=True)):
        height = bottom / len(change)
        for line, value in enumerate(change):
            shade = min(1.0, float(value) / largest) if largest > 0.0 else 0.0
            title = f"{_named(column)}: {float(value):.2%} at {line + 1} of {len(change)}"
            x = _LABEL + index * step
            parts.append(cell(x, line * height, step, height, shade, title, "cell warm"))
    parts += _block_ticks(columns, step, bottom + 4)
    parts.append(text(_LABEL - 10, bottom + 21, f"strongest: {largest:.1%}", anchor="end"))
    return svg(bottom + 30, parts, "Change of singular values by layer and index")


def _columns(rows: Sequence[Row], most: int) -> Columns:
    size = math.ceil(len(rows) / most)
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


def _largest(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), key=abs, default=None)


def _named(column: Sequence[Row]) -> str:
    if len(column) == 1:
        return safe(column[0].name)
    return f"{safe(column[0].name)} and the next {len(column) - 1}, the largest"


def _change_of(column: Sequence[Row]) -> Array:
    """Return the larger change of each stretch, of layers that share a column."""
    changes = [_relative_change(row.curves) for row in column if row.curves is not None]
    longest = max(len(one) for one in changes)
    return np.max([one for one in changes if len(one) == longest], axis=0)  # type: ignore[no-any-return]


def _relative_change(curves: Curves) -> Array:
    """Relative change in up to `_BINS` stretches of the spectrum, as root mean squares."""
    assert curves.tuned is not None
    moved = curves.tuned - curves.base if curves.along is None else curves.along
    floor = 1e-6 * float(curves.base.max(initial=0.0))
    relative = np.abs(moved) / np.maximum(curves.base, floor if floor > 0.0 else 1.0)
    relative = np.where(curves.base > floor, relative, 0.0)
    parts = np.array_split(relative, min(_BINS, relative.size)) if relative.size else []
    return np.array([math.sqrt(float((part**2).mean())) for part in parts])


def _block_ticks(columns: Columns, step: float, y: float) -> list[str]:
    """Name the blocks under a map, as many as there is room for."""
    parts: list[str] = []
    free, current = 0.0, ""
    for index, column in enumerate(columns):
        block = block_of(column[0].name)
        if block == current:
            continue
        current = block
        x = _LABEL + index * step
        parts.append(
            f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{y:.0f}" y2="{y + 5:.0f}"/>'
        )
        label = safe(".".join(block.split(".")[-2:]))[:18]
        if x >= free and x + 6.2 * len(label) <= WIDTH:
            parts.append(text(x, y + 17, label))
            free = x + 6.2 * len(label) + 10
    return parts
