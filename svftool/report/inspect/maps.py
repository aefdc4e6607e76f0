"""Maps of an audit's page as SVG: layers from left to right, metrics or singular values down."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, groupby, pairwise

import numpy as np
import numpy.typing as npt

from svftool.auditing import Curves, Row, metric_name
from svftool.report.inspect.marks import block_of, in_order, largest_of, number, part_of
from svftool.report.inspect.svg import LINE, WIDTH, cell, svg, text, under
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
    layout = _Layout.of(rows, most)
    columns, step = layout.columns, layout.step
    parts = []
    for line, metric in enumerate(metrics):
        top = line * (_CELL + 3)
        label = _label(metric)
        parts.append(text(_LABEL - 10, top + _CELL - 4, label, anchor="end"))
        values = [_largest([row.value(metric) for row in column]) for column in columns]
        largest = largest_of(None if value is None else abs(value) for value in values)
        for index, (column, value) in enumerate(zip(columns, values, strict=True)):
            shade = part_of(value, largest)
            title = f"{_named(column)}: {label} {number(value)}"
            kind = "cell none" if value is None else "cell"
            parts.append(cell(_LABEL + index * step, top, step, _CELL, shade, title, kind))
    height = len(metrics) * (_CELL + 3)
    names, below = layout.names(height)
    width = layout.width
    return svg(height + below, [*parts, *names], "Heat map of layers against metrics", width=width)


def _label(metric: str) -> str:
    """Return the name of a line: the word that all other places have for the metric."""
    name, _, side = metric_name(metric).partition(".")
    plain = name.replace("_", " ")
    return f"{plain}, change" if side == "change" else plain


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
    layout = _Layout.of(drawn, most)
    columns, step = layout.columns, layout.step
    changes = [_change_of(column) for column in columns]
    # A few tiny singular values may have doubled: they are not to pale all others.
    largest = float(np.quantile(np.concatenate(changes), 0.98))
    largest = largest or max(float(one.max(initial=0.0)) for one in changes)
    top, bottom = 4, 4 + _BINS * _BIN
    parts = [
        text(_LABEL - 10, top + 9, "largest", anchor="end"),
        text(_LABEL - 10, bottom - 1, "smallest", anchor="end"),
        text(_LABEL - 10, (top + bottom) / 2 + 4, "singular value", anchor="end"),
    ]
    for index, (column, change) in enumerate(zip(columns, changes, strict=True)):
        height = (bottom - top) / len(change)
        for line, value in enumerate(change):
            shade = min(1.0, float(value) / largest) if largest > 0.0 else 0.0
            title = f"{_named(column)}: {float(value):.2%} at {line + 1} of {len(change)}"
            x, y = _LABEL + index * step, top + line * height
            parts.append(cell(x, y, step, height, shade, title, "cell warm"))
    names, below = layout.names(bottom + 4)
    strongest = f"darkest: {number(100.0 * largest)}%"
    parts.append(text(_LABEL - 10, bottom + 18, strongest, anchor="end"))
    return svg(
        bottom + 4 + below,
        [*parts, *names],
        "Change of singular values by layer and index",
        width=layout.width,
    )


@dataclass(frozen=True)
class _Layout:
    """Columns of a map, and the first of each block; wide enough for every block's name.

    Attributes
    ----------
    columns : list of list of Row
        Neighbours of one block that share a column; of several blocks where there are too many.
    blocks : list of (int, str)
        The column at which each block begins, and its name.
    """

    columns: Columns
    blocks: list[tuple[int, str]]

    @classmethod
    def of(cls, rows: Sequence[Row], most: int) -> _Layout:
        """Gather rows into about `most` columns at most."""
        ordered = in_order(rows)
        groups = [list(inside) for _, inside in groupby(ordered, lambda row: block_of(row.name))]
        names = [_short_block(block_of(group[0].name)) for group in groups]
        if len(groups) > most:
            size = math.ceil(len(groups) / most)
            merged = range(0, len(groups), size)
            ends = [min(start + size, len(groups)) - 1 for start in merged]
            names = [
                names[start] + (f" – {names[end]}" if end > start else "")
                for start, end in zip(merged, ends, strict=True)
            ]
            columns = [list(chain(*groups[start : start + size])) for start in merged]
            return cls(columns, list(enumerate(names)))
        found = cls([], [])
        size = math.ceil(len(rows) / most)
        while sum(math.ceil(len(group) / size) for group in groups) > most:
            size += 1
        for group, name in zip(groups, names, strict=True):
            found.blocks.append((len(found.columns), name))
            found.columns.extend(group[at : at + size] for at in range(0, len(group), size))
        return found

    @property
    def step(self) -> float:
        """Width of a column."""
        starts = [index for index, _ in self.blocks]
        narrowest = min((b - a for a, b in pairwise(starts)), default=1)
        return max((WIDTH - _LABEL) / len(self.columns), LINE / narrowest)

    @property
    def width(self) -> float:
        """Width of the map with its labels."""
        return _LABEL + self.step * len(self.columns)

    def names(self, y: float) -> tuple[list[str], float]:
        """Draw the names of all blocks under the map; return their height too."""
        places = [_LABEL + index * self.step for index, _ in self.blocks]
        return under(places, [safe(name) for _, name in self.blocks], y, self.width)


def _short_block(block: str) -> str:
    return ".".join(block.split(".")[-2:])


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
