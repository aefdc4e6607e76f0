"""Quality against the numbers that are trained, as a figure: regimes, intervals and the front."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from svftool.report.drawing import plain, require_matplotlib, save
from svftool.report.finetune import FRACTIONS
from svftool.report.training.figure import INK, LINE, QUIET, STYLE, looks_of
from svftool.report.training.rows import RunGroup, grouped
from svftool.training import Summary
from svftool.training.results import FinetuneResult, front

PAPER = "#fefefe"
"""What hollow marks are filled with; a page puts its own colour in its place."""
_ON_PAGE, _ALONE = (4.4, 3.2), (7.0, 4.6)
"""Inches: a page is read on a telephone, a picture alone has room for more names."""
_STYLE: Mapping[str, Any] = {**STYLE, "font.size": 10, "axes.titlesize": 10}
_DECADES = 2.0
_GAP = 7.0
"""Points between a mark and its name."""
_HEIGHT = 10.0
"""Of a name, in points."""
_STEP = 4.0
"""Points between the places where a name must not cover a line."""


def has_curve(result: FinetuneResult) -> bool:
    """Whether there are regimes of different sizes that were measured."""
    return len({one.trainable_parameters for one in result.summary if one.measured}) > 1


def save_curve(result: FinetuneResult, path: Path | IO[bytes], *, kind: str) -> None:
    """Draw the metric of every regime over the logarithm of its trained numbers.

    Where the head alone is one of the regimes, it is a line, and the others stand over the numbers
    that they train beside it: a large head would press them together.

    The front are the regimes that none with as few numbers beats, see
    `svftool.training.results.front`.

    Parameters
    ----------
    result : FinetuneResult
    path : Path or binary stream
        Where to write.
    kind : {"png", "svg", "pdf"}

    Raises
    ------
    MissingDependencyError
        If matplotlib is not installed.
    """
    _draw(result, path, kind=kind, facecolor="white", size=_ALONE)


def curve_svg(result: FinetuneResult) -> str:
    """Return the figure as an ``<svg>`` element for a page, without a background."""
    stream = io.BytesIO()
    _draw(result, stream, kind="svg", facecolor="none", size=_ON_PAGE)
    text = stream.getvalue().decode("utf-8")
    return text[text.index("<svg") :]


def _draw(
    result: FinetuneResult,
    path: Path | IO[bytes],
    *,
    kind: str,
    facecolor: str,
    size: tuple[float, float],
) -> None:
    mpl = require_matplotlib()
    from matplotlib.figure import Figure

    groups = [one for one in grouped(result) if any(row.measured for row in one.summaries)]
    looks = looks_of(result.runs)
    with mpl.rc_context(dict(_STYLE)):
        count = max(1, len(groups))
        figure = Figure(figsize=(size[0], size[1] * count), layout="constrained")
        panels = figure.subplots(count, squeeze=False)[:, 0]
        for axes, group in zip(panels, groups, strict=False):
            _panel(axes, result, group, looks)
        figure.draw_without_rendering()
        for axes, group in zip(panels, groups, strict=False):
            _name(axes, group, _scale(result), looks)
        save(figure, path, kind=kind, facecolor=facecolor, bbox_inches="tight", pad_inches=0.1)


def _panel(
    axes: Any, result: FinetuneResult, group: RunGroup, looks: Mapping[str, Mapping[str, Any]]
) -> None:
    scale, marks = _scale(result), _marks(group)
    axes.set_xscale("log")
    points = [(marks[one.regime], scale * one.mean) for one in _leading(group)]
    if points:
        axes.plot(*zip(*points, strict=True), color=QUIET, lw=1.0, zorder=1)
    leading = {one.regime for one in _leading(group)}
    for one in (each for each in group.summaries if each.regime in marks):
        colour, place = looks[one.regime]["color"], marks[one.regime]
        if one.ci95 is not None:
            ends = [scale * end for end in one.ci95]
            axes.plot([place, place], ends, color=colour, lw=1.6, solid_capstyle="butt", zorder=2)
        # A hollow mark would show the bar behind it.
        front_one = one.regime in leading
        fill = {"color": colour} if front_one else {"facecolor": PAPER, "edgecolor": colour}
        axes.scatter([place], [scale * one.mean], s=38, zorder=3, linewidths=1.4, **fill)
    head, start = _head(group), _start(group)
    if head is not None:
        line = {"color": looks[head.regime]["color"], "lw": 1.0, "ls": ":", "zorder": 0}
        axes.axhline(scale * head.mean, **line)
    if start is not None and not _is_far(group, start):
        axes.axhline(scale * start, color=QUIET, lw=1.0, ls=(0, (4, 2)), zorder=0)
    _tick(axes)
    axes.grid(axis="y", color=LINE, lw=0.7)
    axes.set_axisbelow(True)
    axes.margins(x=0.14, y=0.16)
    unit = ", %" if result.metric in FRACTIONS else ""
    task = f" ({plain(group.title)})" if group.title else ""
    axes.set_title(f"{plain(result.metric)}{unit} against trained numbers{task}", color=INK)
    axes.set_xlabel("\n".join(_notes(group, scale)), size="small")


def _head(group: RunGroup) -> Summary | None:
    """Return the head alone, where all other regimes train it along."""
    head = next((one for one in group.summaries if one.regime == "head"), None)
    if head is None or not math.isfinite(head.mean):
        return None
    others = [one for one in group.summaries if one is not head]
    along = all(one.trainable_parameters > head.trainable_parameters for one in others)
    return head if others and along else None


def _marks(group: RunGroup) -> dict[str, int]:
    """Return how many numbers each regime with a mark stands over."""
    head = _head(group)
    less = 0 if head is None else head.trainable_parameters
    return {
        one.regime: one.trainable_parameters - less
        for one in group.summaries
        if one is not head and math.isfinite(one.mean)
    }


def _leading(group: RunGroup) -> list[Summary]:
    """Return the marks of the front, by size."""
    marks = _marks(group)
    found = [one for one in front(group.summaries) if one.regime in marks]
    return sorted(found, key=lambda one: one.trainable_parameters)


def _tick(axes: Any) -> None:
    """Write numbers at the decades, and at 2 and 5 times as much where few of them are seen."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    left, right = axes.get_xlim()
    few = math.log10(right / left) < _DECADES
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: _count(count)))
    axes.xaxis.set_minor_locator(NullLocator())


def _count(number: float) -> str:
    """Write how many, shortly.

    Examples
    --------
    >>> [_count(one) for one in (500, 2e4, 1e6, 5e9)]
    ['500', '20k', '1M', '5G']
    """
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:g}{letter}"
    return f"{number:g}"


def _start(group: RunGroup) -> float | None:
    """Return the value before training, where all regimes have the same."""
    found = {round(one.before, 8) for one in group.summaries if math.isfinite(one.before)}
    return found.pop() if len(found) == 1 else None


def _is_far(group: RunGroup, start: float) -> bool:
    """Whether a line at the start would leave the regimes less than half of the height."""
    ends = [end for one in group.summaries for end in (one.ci95 or (one.mean,))]
    known = [one for one in ends if math.isfinite(one)]
    if not known:
        return False
    low, high = min(known), max(known)
    return max(low - start, start - high) > high - low > 0


def _notes(group: RunGroup, scale: float) -> Iterator[str]:
    yield "trained numbers" + " beside the head" * (_head(group) is not None)
    several = any(one.ci95 is not None for one in group.summaries)
    spread = "bars: 95 % interval" if several else "one seed: no intervals"
    lower = all(not one.higher_is_better for one in group.summaries)
    less = "; less is better" if lower else ""
    start = _start(group)
    before = "" if start is None else "; dashed: before training"
    if start is not None and _is_far(group, start):
        before = f"; before training: {scale * start:.3g}"
    yield f"{spread}; filled marks, line: the front{before}{less}"


def _scale(result: FinetuneResult) -> float:
    return 100.0 if result.metric in FRACTIONS else 1.0


@dataclass(frozen=True)
class _Box:
    """What a name or a mark covers, in points."""

    left: float
    bottom: float
    right: float
    top: float

    def meets(self, other: _Box) -> bool:
        apart = self.right < other.left or other.right < self.left
        return not (apart or self.top < other.bottom or other.top < self.bottom)

    def meets_any(self, others: Iterable[_Box]) -> bool:
        return any(self.meets(other) for other in others)

    def within(self, other: _Box) -> bool:
        across = other.left <= self.left and self.right <= other.right
        return across and other.bottom <= self.bottom and self.top <= other.top


def _name(axes: Any, group: RunGroup, scale: float, looks: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the names near their marks, where they cover as little as can be."""
    marks, head = _marks(group), _head(group)
    covered = _Covered(list(_drawn(axes, group, scale)))
    if head is not None:
        end = axes.get_xlim()[1], scale * head.mean
        x, y = _points(axes, *end)
        covered.names.append(_Box(x - _width(head.regime), y, x, y + _HEIGHT))
        _write(axes, head.regime, end, (-2, 1), looks[head.regime]["color"], ha="right")
    low, high = (
        _points(axes, *corner) for corner in zip(axes.get_xlim(), axes.get_ylim(), strict=True)
    )
    for one in (each for each in group.summaries if each.regime in marks):
        mark = marks[one.regime], scale * one.mean
        offers = list(_offers(_points(axes, *mark), _width(one.regime)))
        inside = [offer for offer in offers if offer.box.within(_Box(*low, *high))]
        chosen = min(inside or offers, key=covered.cost)
        covered.names.append(chosen.box)
        covered.leaders.extend(chosen.leader)
        colour = looks[one.regime]["color"]
        _write(axes, one.regime, mark, chosen.offset, colour, led=bool(chosen.leader))


def _drawn(axes: Any, group: RunGroup, scale: float) -> Iterator[_Box]:
    """Yield what the marks, their intervals and the lines cover."""
    marks, head = _marks(group), _head(group)
    for one in (each for each in group.summaries if each.regime in marks):
        x, y = _points(axes, marks[one.regime], scale * one.mean)
        yield _Box(x - 4, y - 4, x + 4, y + 4)
        if one.ci95 is not None:
            low, high = (_points(axes, 1.0, scale * end)[1] for end in one.ci95)
            yield _Box(x - 1, low, x + 1, high)
    yield from _along(
        [_points(axes, marks[one.regime], scale * one.mean) for one in _leading(group)]
    )
    if head is not None:
        yield from _along([_points(axes, end, scale * head.mean) for end in axes.get_xlim()])


def _write(
    axes: Any,
    name: str,
    place: tuple[float, float],
    offset: tuple[float, float],
    colour: str,
    *,
    ha: str = "left",
    led: bool = False,
) -> None:
    """Write a name; a thin line leads to one that is not beside its mark."""
    line = {"arrowstyle": "-", "color": colour, "lw": 0.6, "shrinkA": 0.0, "shrinkB": 4.0}
    axes.annotate(
        plain(name),
        place,
        offset,
        textcoords="offset points",
        ha=ha,
        va="bottom",
        size="small",
        color=colour,
        arrowprops={**line, "relpos": (0.5, 0.5)} if led else None,
    )


def _along(points: Sequence[tuple[float, float]]) -> Iterator[_Box]:
    """Yield small boxes on the lines between points, in points."""
    for (x, y), (to_x, to_y) in itertools.pairwise(points):
        count = max(1, math.ceil(math.hypot(to_x - x, to_y - y) / _STEP))
        for step in range(count + 1):
            at_x, at_y = (a + (b - a) * step / count for a, b in ((x, to_x), (y, to_y)))
            yield _Box(at_x - 1, at_y - 1, at_x + 1, at_y + 1)


def _width(name: str) -> float:
    """Estimate how wide a name is, in points."""
    return 5.6 * len(name) + 2.0


def _points(axes: Any, x: float, y: float) -> tuple[float, float]:
    """Return where a value stands in the figure, in points."""
    across, up = axes.transData.transform((x, y)) * 72.0 / axes.figure.dpi
    return float(across), float(up)


@dataclass(frozen=True)
class _Offer:
    """Where a name may stand.

    Attributes
    ----------
    offset : (float, float)
        Its lower left corner from its mark.
    box : _Box
    leader : tuple of _Box
        Along the line that leads to a name far from its mark.
    far : float
        How far, in gaps.
    """

    offset: tuple[float, float]
    box: _Box
    leader: tuple[_Box, ...]
    far: float


@dataclass(frozen=True)
class _Covered:
    """What stands in a picture already."""

    drawn: Sequence[_Box]
    names: list[_Box] = field(default_factory=list)
    leaders: list[_Box] = field(default_factory=list)

    def cost(self, offer: _Offer) -> float:
        """Weigh what a name there would hide; a name on a name is the worst."""
        crossed = any(step.meets(name) for step in offer.leader for name in self.names)
        return (
            8.0 * offer.box.meets_any(self.names)
            + 3.0 * sum(map(offer.box.meets, self.drawn))
            + 4.0 * crossed
            + 2.0 * offer.box.meets_any(self.leaders)
            + 0.5 * offer.far
        )


def _offers(mark: tuple[float, float], width: float) -> Iterator[_Offer]:
    """Yield places for a name that is so wide, the best one first."""
    x, y = mark
    for far in (1.0, 2.2, 3.6, 5.0, 7.0):
        gap = far * _GAP
        places = [(gap, -_HEIGHT / 2), (-width / 2, gap), (-width / 2, -gap - _HEIGHT)]
        places += [(-gap - width, -_HEIGHT / 2)]
        places += [(left, low) for left in (gap, -gap - width) for low in (gap, -gap - _HEIGHT)]
        for left, low in places:
            box = _Box(x + left, y + low, x + left + width, y + low + _HEIGHT)
            middle = (box.left + box.right) / 2, (box.bottom + box.top) / 2
            yield _Offer((left, low), box, tuple(_along([mark, middle])) if far > 1.0 else (), far)
