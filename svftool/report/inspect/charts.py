"""Curves of an audit's page as SVG, drawn here so that they print and need no script."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from svftool.auditing import Curves, Trajectory
from svftool.report.inspect.marks import largest_of, number, part_of
from svftool.report.inspect.svg import WIDTH, line, svg, text
from svftool.report.text import safe

_POINTS = 160

Array = npt.NDArray[np.float64]


def spectra(curves: Curves) -> str:
    """Draw the spectrum before and after on a logarithmic scale, and the change by index below."""
    width, upper, lower, gap, left = 340, 120, 56, 14, 44
    base = curves.base
    tuned = curves.tuned if curves.tuned is not None else base
    top = max(float(base.max(initial=0.0)), float(tuned.max(initial=0.0)))
    if top == 0.0:
        return ""
    floor = max(min(_low(base), _low(tuned)), 1e-4 * top)
    x = _positions(len(base), left, width)

    def y(value: float) -> float:
        share = math.log(max(value, floor) / floor) / max(math.log(top / floor), 1e-9)
        return 6 + (upper - 6) * (1.0 - share)

    keep = _kept(len(base))
    parts = list(_decades(floor, top, y, left, width))
    parts.append(line(((x[i], y(base[i])) for i in keep), "before"))
    if curves.tuned is not None:
        parts.append(line(((x[i], y(tuned[i])) for i in keep), "after"))
        moved = tuned - base if curves.along is None else curves.along
        parts += _change_bars(moved, base, x, upper + gap, lower, left, width)
    parts.append(text(width, upper + gap + lower + 12, f"index 1 … {len(base)}", anchor="end"))
    height = upper + gap + lower + 16
    return svg(height, parts, "Singular values before and after", width=width, kind="small")


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
    yield text(left - 6, middle - scale + 8, f"+{largest:.1%}", anchor="end")
    yield text(left - 6, middle + scale, f"\N{MINUS SIGN}{largest:.1%}", anchor="end")


def trajectory(one: Trajectory) -> str:
    """Draw the weight drift of every layer over a series, and the median on top."""
    left, height, right = 60, 240, 190
    count = len(one.checkpoints)
    drifts = [values for values in one.layers.values() if any(v is not None for v in values)]
    largest = largest_of(v for values in drifts for v in values)
    if largest == 0.0 or count < 2:
        return ""

    def place(index: int, value: float) -> tuple[float, float]:
        x = left + (WIDTH - left - right) * index / (count - 1)
        return x, 8 + (height - 8) * (1.0 - part_of(value, largest))

    parts = []
    for tick in _ticks(largest):
        y = place(0, tick)[1]
        parts.append(
            f'<line class="axis" x1="{left}" x2="{WIDTH - right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(text(left - 8, y + 4, number(tick), anchor="end"))
    for values in drifts:
        points = [place(i, v) for i, v in enumerate(values) if v is not None]
        parts.append(line(points, "thin"))
    median = one.metrics["weight_drift"]
    points = [place(i, v) for i, v in enumerate(median) if v is not None]
    parts.append(line(points, "after bold"))
    for x, y in points:
        parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>')
    if points:
        x, y = points[-1]
        parts.append(text(x + 12, y + 4, f"median {number(median[-1])}", kind="strong"))
    for index, path in enumerate(one.checkpoints):
        anchor = "start" if index == 0 else "middle"
        name = path.name.removesuffix(path.suffix)
        parts.append(text(place(index, 0.0)[0], height + 18, safe(name)[:22], anchor=anchor))
    return svg(height + 28, parts, "Weight drift over the series")


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
                yield text(left - 6, at + 4, number(value), anchor="end")


def _ticks(largest: float) -> list[float]:
    """Return three to six round numbers from 0 to the largest."""
    step = 10.0 ** math.floor(math.log10(largest))
    while largest / step < 3:
        step /= 2.0
    return [step * i for i in range(int(largest / step) + 1)]
