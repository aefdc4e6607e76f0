"""Quality against the numbers that are trained, as a figure: regimes, intervals and the front."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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


def has_curve(result: FinetuneResult) -> bool:
    """Whether there are regimes of different sizes that were measured."""
    return len({one.trainable_parameters for one in result.summary if one.measured}) > 1


def save_curve(result: FinetuneResult, path: Path | IO[bytes], *, kind: str) -> None:
    """Draw the metric of every regime over the logarithm of its trained numbers.

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
            _name(axes, result, group.summaries, looks)
        save(figure, path, kind=kind, facecolor=facecolor, bbox_inches="tight", pad_inches=0.1)


def _panel(
    axes: Any, result: FinetuneResult, group: RunGroup, looks: Mapping[str, Mapping[str, Any]]
) -> None:
    scale = _scale(result)
    shown = [one for one in group.summaries if math.isfinite(one.mean)]
    leading = sorted(front(group.summaries), key=lambda one: one.trainable_parameters)
    points = [(one.trainable_parameters, scale * one.mean) for one in leading]
    axes.set_xscale("log")
    if points:
        axes.plot(*zip(*points, strict=True), color=QUIET, lw=1.0, zorder=1)
    for one in shown:
        colour, place = looks[one.regime]["color"], one.trainable_parameters
        if one.ci95 is not None:
            ends = [scale * end for end in one.ci95]
            axes.plot([place, place], ends, color=colour, lw=1.6, solid_capstyle="butt", zorder=2)
        # A hollow mark would show the bar behind it.
        fill = {"color": colour} if one in leading else {"facecolor": PAPER, "edgecolor": colour}
        axes.scatter([place], [scale * one.mean], s=38, zorder=3, linewidths=1.4, **fill)
    start = _start(group)
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
    yield "trained numbers"
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


def _name(
    axes: Any,
    result: FinetuneResult,
    summaries: Sequence[Summary],
    looks: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write the names beside their marks, where they meet nothing that stands there already."""
    shown = [one for one in summaries if math.isfinite(one.mean)]
    data = [(one.trainable_parameters, _scale(result) * one.mean) for one in shown]
    places = [_points(axes, x, y) for x, y in data]
    taken = [_Box(x - 4, y - 4, x + 4, y + 4) for x, y in places]
    for one, (x, _) in zip(shown, places, strict=True):
        if one.ci95 is not None:
            low, high = (_points(axes, 1.0, _scale(result) * end)[1] for end in one.ci95)
            taken.append(_Box(x - 1, low, x + 1, high))
    for one, (x, y) in zip(shown, places, strict=True):
        width, height = 5.6 * len(one.regime), 10.0
        boxes = [
            (across, up, _Box(x + across, y + up, x + across + width, y + up + height))
            for across, up in _offsets(width, height)
        ]
        free = [box for box in boxes if not any(box[2].meets(other) for other in taken)]
        across, up, box = (free or boxes)[0]
        taken.append(box)
        axes.annotate(
            plain(one.regime),
            (one.trainable_parameters, _scale(result) * one.mean),
            (across, up),
            textcoords="offset points",
            va="bottom",
            size="small",
            color=looks[one.regime]["color"],
        )


def _points(axes: Any, x: float, y: float) -> tuple[float, float]:
    """Return where a value stands in the figure, in points."""
    across, up = axes.transData.transform((x, y)) * 72.0 / axes.figure.dpi
    return float(across), float(up)


def _offsets(width: float, height: float) -> Iterator[tuple[float, float]]:
    """Yield where a name may stand, the lower left corner from its mark, the best place first."""
    for far in (1.0, 2.2, 3.6, 5.0):
        gap = far * _GAP
        yield gap, -height / 2
        yield -width / 2, gap
        yield -width / 2, -gap - height
        yield -gap - width, -height / 2
        yield gap, gap
        yield gap, -gap - height
