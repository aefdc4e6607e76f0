"""Charts of an audit's page as SVG, drawn here so that they print and need no script.

Colours are CSS variables of the page, so that one drawing serves the light and the dark scheme.
Names are escaped wherever they enter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape

import numpy as np
import numpy.typing as npt

from svftool.auditing import Curves, Row, Trajectory
from svftool.report.inspect.marks import block_of, number
from svftool.report.text import safe

WIDTH = 1080
_LABEL = 150
_CELL = 15
_BINS = 24
_POINTS = 160

Array = npt.NDArray[np.float64]


def heat_map(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """Draw metrics against layers in the network's order, each metric against its largest.

    Parameters
    ----------
    rows : sequence of Row
        Matrices.
    metrics : sequence of str
        One line each; metrics of one spectrum are shown by their relative change.
    """
    if not rows:
        return ""
    step = (WIDTH - _LABEL) / len(rows)
    height = len(metrics) * (_CELL + 3)
    parts = []
    for line, metric in enumerate(metrics):
        name = metric if metric.count(".") else metric.replace("_", " ")
        top = line * (_CELL + 3)
        label = name.replace(".change", ", change").replace("_", " ")
        parts.append(_text(_LABEL - 10, top + _CELL - 4, label, anchor="end"))
        values = [row.value(metric) for row in rows]
        largest = max((abs(value) for value in values if value is not None), default=0.0)
        for index, (row, value) in enumerate(zip(rows, values, strict=True)):
            shade = 0.0 if value is None or largest == 0.0 else abs(value) / largest
            title = f"{safe(row.name)}: {label} {number(value)}"
            kind = "cell none" if value is None else "cell"
            parts.append(_cell(_LABEL + index * step, top, step, _CELL, shade, title, kind))
    parts += _block_ticks(rows, step, height)
    return _svg(height + 26, parts, "Heat map of layers against metrics")


def direction_map(rows: Sequence[Row]) -> str:
    """Draw where in each spectrum the singular values changed: layers against singular directions.

    Each column is a layer, its largest singular values at the top; a cell's shade is the relative
    change ``|diag(U' D V)| / S`` of that stretch, on one scale for all layers.
    """
    drawn = [row for row in rows if row.curves is not None and row.curves.tuned is not None]
    if not drawn:
        return ""
    step = (WIDTH - _LABEL) / len(drawn)
    cell = 6
    columns = [_relative_change(row.curves) for row in drawn if row.curves is not None]
    # A few tiny singular values may have doubled: they are not to pale all others.
    largest = float(np.quantile(np.concatenate(columns), 0.98))
    largest = largest or max(float(column.max(initial=0.0)) for column in columns)
    parts = [
        _text(_LABEL - 10, 9, "largest", anchor="end"),
        _text(_LABEL - 10, _BINS * cell - 1, "smallest", anchor="end"),
        _text(_LABEL - 10, _BINS * cell / 2 + 4, "singular value", anchor="end"),
    ]
    for index, (row, column) in enumerate(zip(drawn, columns, strict=True)):
        for line, value in enumerate(column):
            shade = min(1.0, float(value) / largest) if largest > 0.0 else 0.0
            height = _BINS * cell / len(column)
            title = f"{safe(row.name)}: {float(value):.2%} at {line + 1} of {len(column)}"
            x = _LABEL + index * step
            parts.append(_cell(x, line * height, step, height, shade, title, "cell warm"))
    parts += _block_ticks(drawn, step, _BINS * cell + 4)
    parts.append(_text(_LABEL - 10, _BINS * cell + 21, f"darkest: {largest:.1%}", anchor="end"))
    return _svg(_BINS * cell + 30, parts, "Change of singular values by layer and index")


def _relative_change(curves: Curves) -> Array:
    """Relative change in up to `_BINS` stretches of the spectrum, as root mean squares."""
    assert curves.tuned is not None
    moved = curves.tuned - curves.base if curves.along is None else curves.along
    floor = 1e-6 * float(curves.base.max(initial=0.0))
    relative = np.abs(moved) / np.maximum(curves.base, floor if floor > 0.0 else 1.0)
    relative = np.where(curves.base > floor, relative, 0.0)
    parts = np.array_split(relative, min(_BINS, relative.size)) if relative.size else []
    return np.array([math.sqrt(float((part**2).mean())) for part in parts])


def spectra(curves: Curves) -> str:
    """Draw the spectrum before and after on a logarithmic scale, and the change by index below."""
    width, upper, lower, gap, left = 340, 120, 56, 14, 44
    base = curves.base
    tuned = curves.tuned if curves.tuned is not None else base
    top = max(float(base.max(initial=0.0)), float(tuned.max(initial=0.0)))
    if top == 0.0:
        return ""
    floor = max(_low(base), _low(tuned), 1e-4 * top)
    x = _positions(len(base), left, width)

    def y(value: float) -> float:
        share = math.log(max(value, floor) / floor) / max(math.log(top / floor), 1e-9)
        return 6 + (upper - 6) * (1.0 - share)

    keep = _kept(len(base))
    parts = list(_decades(floor, top, y, left, width))
    parts.append(_line(((x[i], y(base[i])) for i in keep), "before"))
    if curves.tuned is not None:
        parts.append(_line(((x[i], y(tuned[i])) for i in keep), "after"))
        moved = tuned - base if curves.along is None else curves.along
        parts += _change_bars(moved, base, x, upper + gap, lower, left, width)
    parts.append(_text(width, upper + gap + lower + 12, f"index 1 … {len(base)}", anchor="end"))
    height = upper + gap + lower + 16
    return _svg(height, parts, "Singular values before and after", width=width, kind="small")


def _change_bars(
    moved: Array,
    base: Array,
    x: Sequence[float],
    top: float,
    height: float,
    left: float,
    width: float,
) -> Iterator[str]:
    floor = 1e-6 * float(base.max(initial=0.0))
    relative = np.where(base > floor, moved / np.maximum(base, max(floor, 1e-300)), 0.0)
    bins = np.array_split(relative, min(80, relative.size))
    values = [float(part[np.abs(part).argmax()]) for part in bins]
    # The last few singular values may change many times over: they are cut off at the edge.
    largest = 1.2 * float(np.quantile(np.abs(values), 0.97)) if values else 0.0
    largest = min(largest, max(map(abs, values), default=0.0)) or max(map(abs, values), default=0.0)
    if largest == 0.0:
        return
    middle, scale, step = top + height / 2, height / 2 - 2, (width - left) / len(values)
    yield f'<line class="axis" x1="{left}" x2="{width}" y1="{middle:.1f}" y2="{middle:.1f}"/>'
    for index, value in enumerate(values):
        size = min(abs(value) / largest, 1.0) * scale
        y = middle - size if value > 0.0 else middle
        kind = "up" if value > 0.0 else "down"
        yield (
            f'<rect class="{kind}" x="{left + index * step:.1f}" y="{y:.1f}" '
            f'width="{max(step - 0.6, 0.6):.1f}" height="{size:.1f}"/>'
        )
    yield _text(left - 6, middle - scale + 8, f"+{largest:.1%}", anchor="end")
    yield _text(left - 6, middle + scale, f"\N{MINUS SIGN}{largest:.1%}", anchor="end")


def trajectory(one: Trajectory) -> str:
    """Draw the weight drift of every layer over a series, and the median on top."""
    left, height, right = 60, 240, 190
    count = len(one.checkpoints)
    drifts = [values for values in one.layers.values() if any(v is not None for v in values)]
    largest = max((v for values in drifts for v in values if v is not None), default=0.0)
    if largest == 0.0 or count < 2:
        return ""

    def place(index: int, value: float) -> tuple[float, float]:
        x = left + (WIDTH - left - right) * index / (count - 1)
        return x, 8 + (height - 8) * (1.0 - value / largest)

    parts = []
    for tick in _ticks(largest):
        y = place(0, tick)[1]
        parts.append(
            f'<line class="axis" x1="{left}" x2="{WIDTH - right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(_text(left - 8, y + 4, number(tick), anchor="end"))
    for values in drifts:
        points = [place(i, v) for i, v in enumerate(values) if v is not None]
        parts.append(_line(points, "thin"))
    median = one.metrics["weight_drift"]
    points = [place(i, v) for i, v in enumerate(median) if v is not None]
    parts.append(_line(points, "after bold"))
    for x, y in points:
        parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>')
    if points:
        x, y = points[-1]
        parts.append(_text(x + 12, y + 4, f"median {number(median[-1])}", kind="strong"))
    for index, path in enumerate(one.checkpoints):
        anchor = "start" if index == 0 else "middle"
        name = path.name.removesuffix(path.suffix)
        parts.append(_text(place(index, 0.0)[0], height + 18, safe(name)[:22], anchor=anchor))
    return _svg(height + 28, parts, "Weight drift over the series")


def _svg(
    height: float, parts: Iterable[str], label: str, *, width: int = WIDTH, kind: str = "wide"
) -> str:
    return (
        f'<svg class="{kind}" viewBox="0 0 {width} {height:.0f}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start", kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text{style} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _cell(
    x: float, y: float, width: float, height: float, shade: float, title: str, kind: str
) -> str:
    gap = 1.0 if width > 5 else 0.2
    return (
        f'<rect class="{kind}" x="{x:.2f}" y="{y:.1f}" width="{max(width - gap, 0.4):.2f}" '
        f'height="{height:.1f}" style="--v:{shade:.3f}"><title>{escape(title)}</title></rect>'
    )


def _line(points: Iterable[tuple[float, float]], kind: str) -> str:
    text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{kind}" points="{text}"/>'


def _block_ticks(rows: Sequence[Row], step: float, y: float) -> list[str]:
    """Name the blocks under a map, as many as there is room for."""
    parts: list[str] = []
    free, start, current = 0.0, 0, ""
    for index, row in enumerate(rows):
        block = block_of(row.name)
        if block == current:
            continue
        current, start = block, index
        x = _LABEL + start * step
        parts.append(
            f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{y:.0f}" y2="{y + 5:.0f}"/>'
        )
        label = safe(".".join(block.split(".")[-2:]))[:18]
        if x >= free and x + 6.2 * len(label) <= WIDTH:
            parts.append(_text(x, y + 17, label))
            free = x + 6.2 * len(label) + 10
    return parts


def _positions(count: int, left: float, width: float) -> list[float]:
    return [left + (width - left) * (i + 0.5) / count for i in range(count)]


def _kept(count: int) -> list[int]:
    """Indexes that are drawn: all of the first, and evenly spread ones after."""
    if count <= _POINTS:
        return list(range(count))
    return sorted({round(i * (count - 1) / (_POINTS - 1)) for i in range(_POINTS)})


def _low(values: Array) -> float:
    positive = values[values > 0.0]
    return float(positive.min()) if positive.size else 0.0


def _decades(
    floor: float, top: float, y: Callable[[float], float], left: float, width: float
) -> Iterator[str]:
    """Mark round values of a logarithmic axis."""
    first, last = math.floor(math.log10(floor)), math.floor(math.log10(top))
    wide = last - first > 1
    for power in range(first, last + 1):
        for digit in (1.0,) if wide else (1.0, 2.0, 5.0):
            value = digit * 10.0**power
            if floor <= value <= top:
                at = y(value)
                yield f'<line class="axis" x1="{left}" x2="{width}" y1="{at:.1f}" y2="{at:.1f}"/>'
                yield _text(left - 6, at + 4, number(value), anchor="end")


def _ticks(largest: float) -> list[float]:
    """Return three to six round numbers from 0 to the largest."""
    step = 10.0 ** math.floor(math.log10(largest))
    while largest / step < 3:
        step /= 2.0
    return [step * i for i in range(int(largest / step) + 1)]
