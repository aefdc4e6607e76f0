"""Curves of an audit's page as SVG, drawn here so that they print and need no script."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from svftool.auditing import Curves, Trajectory
from svftool.report.inspect.marks import largest_of, number, part_of
from svftool.report.inspect.svg import WIDTH, line, room, svg, text, under
from svftool.report.text import safe

_POINTS = 160

Array = npt.NDArray[np.float64]


def spectra(curves: Curves) -> str:
    """Draw the spectrum before and after on a logarithmic scale, and the change by index below.

    The spectrum before is a broad pale band and the one after a thin line on top, so that both are
    seen where they coincide.
    """
    width, upper, lower, gap = 340, 130, 64, 30
    base = curves.base
    tuned = curves.tuned if curves.tuned is not None else base
    top = max(float(base.max(initial=0.0)), float(tuned.max(initial=0.0)))
    if top == 0.0:
        return ""
    floor = max(min(_low(base), _low(tuned)), 1e-4 * top)
    marks = _decades(floor, top)
    change = None if curves.tuned is None else _Change.of(curves)
    labels = [number(value) for value in marks] + ([] if change is None else change.labels)
    left = max(map(room, labels), default=0.0) + 10.0
    x = _positions(len(base), left, width)

    def y(value: float) -> float:
        share = math.log(max(value, floor) / floor) / max(math.log(top / floor), 1e-9)
        return 6 + (upper - 6) * (1.0 - share)

    keep = _kept(len(base))
    parts = [part for value in marks for part in _rule(y(value), left, width, number(value))]
    before = "before" if curves.tuned is not None else "after"
    parts.append(line(((x[i], y(base[i])) for i in keep), before))
    height = upper
    if curves.tuned is not None:
        parts.append(line(((x[i], y(tuned[i])) for i in keep), "after"))
    if change is not None:
        parts.append(text(left, upper + gap - 8, "change along each direction"))
        parts += _change_bars(change, upper + gap, lower, left, width)
        height += gap + lower
    parts.append(text(width, height + 14, f"index 1 … {len(base)}", anchor="end"))
    return svg(height + 18, parts, "Singular values before and after", width=width, kind="small")


@dataclass(frozen=True)
class _Change:
    """Relative changes by index, in stretches, and the value at which bars are cut off."""

    values: list[float]
    largest: float

    @classmethod
    def of(cls, curves: Curves) -> _Change | None:
        """Return the changes of a spectrum; None where nothing changed."""
        assert curves.tuned is not None
        base = curves.base
        moved = curves.tuned - base if curves.along is None else curves.along
        floor = 1e-6 * float(base.max(initial=0.0))
        relative = np.where(base > floor, moved / np.maximum(base, max(floor, 1e-300)), 0.0)
        bins = np.array_split(relative, min(80, relative.size))
        values = [float(part[np.abs(part).argmax()]) for part in bins]
        # The last few singular values may change many times over: they are cut off at the edge.
        most = max(map(abs, values), default=0.0)
        largest = 1.2 * float(np.quantile(np.abs(values), 0.97)) if values else 0.0
        largest = min(largest, most) or most
        return cls(values, largest) if largest > 0.0 else None

    @property
    def labels(self) -> list[str]:
        """Return the ends of the axis, the upper one first."""
        size = f"{number(100.0 * self.largest)}%"
        return [f"+{size}", f"\N{MINUS SIGN}{size}"]


def _change_bars(
    change: _Change, top: float, height: float, left: float, width: float
) -> Iterator[str]:
    middle, scale = top + height / 2, height / 2 - 2
    step = (width - left) / len(change.values)
    yield f'<line class="axis" x1="{left:.1f}" x2="{width}" y1="{middle:.1f}" y2="{middle:.1f}"/>'
    for index, value in enumerate(change.values):
        size = min(abs(value) / change.largest, 1.0) * scale
        y = middle - size if value > 0.0 else middle
        kind = "up" if value > 0.0 else "down"
        yield (
            f'<rect class="{kind}" x="{left + index * step:.1f}" y="{y:.1f}" '
            f'width="{max(step - 0.6, 0.6):.1f}" height="{size:.1f}"/>'
        )
    for label, y in zip(change.labels, (middle - scale + 8, middle + scale), strict=True):
        yield text(left - 6, y, label, anchor="end")


def trajectory(one: Trajectory) -> str:
    """Draw the weight drift of every layer over a series, and the median on top."""
    height = 240
    count = len(one.checkpoints)
    drifts = [values for values in one.layers.values() if any(v is not None for v in values)]
    largest = largest_of(v for values in drifts for v in values)
    if largest == 0.0 or count < 2:
        return ""
    marks, median = _ticks(largest), one.metrics["weight_drift"]
    last = f"median {number(median[-1])}"
    left, right = max(room(number(mark)) for mark in marks) + 12.0, 1.25 * room(last) + 20.0

    def place(index: int, value: float) -> tuple[float, float]:
        x = left + (WIDTH - left - right) * index / (count - 1)
        return x, 8 + (height - 8) * (1.0 - part_of(value, largest))

    parts = [
        part
        for mark in marks
        for part in _rule(place(0, mark)[1], left, WIDTH - right, number(mark))
    ]
    for values in drifts:
        points = [place(i, v) for i, v in enumerate(values) if v is not None]
        parts.append(line(points, "thin"))
    points = [place(i, v) for i, v in enumerate(median) if v is not None]
    parts.append(line(points, "bold"))
    for x, y in points:
        parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>')
    if median[-1] is not None:
        x, y = points[-1]
        parts.append(text(x + 12, y + 4, last, kind="strong"))
    names = [safe(path.name.removesuffix(path.suffix)) for path in one.checkpoints]
    labels, below = under([place(i, 0.0)[0] for i in range(count)], names, height, WIDTH)
    return svg(height + below, [*parts, *labels], "Weight drift over the series")


def _rule(y: float, left: float, right: float, label: str) -> tuple[str, str]:
    """Draw a line across at a round value, with the value beside it."""
    rule = f'<line class="axis" x1="{left:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return rule, text(left - 6, y + 4, label, anchor="end")


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


def _decades(floor: float, top: float) -> list[float]:
    """Return round values of a logarithmic axis; its ends where there is none between them."""
    first, last = math.floor(math.log10(floor)), math.floor(math.log10(top))
    digits = (1.0,) if last - first > 1 else (1.0, 2.0, 5.0)
    values = [digit * 10.0**power for power in range(first, last + 1) for digit in digits]
    return [value for value in values if floor <= value <= top] or [top]


def _ticks(largest: float) -> list[float]:
    """Return three to six round numbers from 0 to the largest."""
    step = 10.0 ** math.floor(math.log10(largest))
    while largest / step < 3:
        step /= 2.0
    return [step * i for i in range(int(largest / step) + 1)]
