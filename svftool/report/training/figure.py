"""A comparison of regimes as one figure: training curves, and the metric of every regime."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from svftool.report.drawing import PLAIN_AXES, plain, require_matplotlib, save
from svftool.report.finetune import FRACTIONS, value
from svftool.report.text import seconds as duration
from svftool.report.training.rows import RunGroup, grouped
from svftool.training import Run, Summary
from svftool.training.results import FinetuneResult

INK, QUIET, LINE = "#1d2127", "#6c7480", "#e3e1dc"
COLOURS = (
    *("#2b5fb8", "#c4551d", "#1b8a8f", "#9a4fb3"),
    *("#cf8a1b", "#c2588f", "#7d8b2e", "#8d6e63"),
)
"""One a regime; a ninth regime has the first one's, with dashes."""

STYLE = {
    **PLAIN_AXES,
    "text.color": INK,
    "axes.facecolor": "none",
    "axes.edgecolor": QUIET,
    "axes.labelcolor": QUIET,
    "axes.titlecolor": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
}
_REGIMES = "regimes"
_PANEL = 1.35
_FEWEST_ROWS = 3

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Form:
    """How large a figure is drawn, and whether the names of its rows stand above them.

    Beside their rows they take half of a narrow figure.
    """

    width: float
    row: float
    above: bool
    style: Mapping[str, Any]


_PAPER = _Form(9.6, 0.4, above=False, style=STYLE)
_PAGE = _Form(4.6, 0.62, above=True, style={**STYLE, "font.size": 10, "axes.titlesize": 11})
"""For screens of any width: words of 10 points on 330 are read on a telephone."""


def save_figure(result: FinetuneResult, path: Path | IO[bytes], *, kind: str) -> None:
    """Draw loss, held-out metric and learning rate over the steps, and the regimes side by side.

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
    _draw(result, path, _PAPER, [*_panels(result), _REGIMES], kind=kind, facecolor="white")


def svgs(result: FinetuneResult) -> dict[str, str]:
    """Return the two halves as ``<svg>`` elements for a page, by what they show.

    They have no background, and are narrow enough to stand below each other on a telephone.
    """
    halves = {"Training curves": [*_panels(result)], f"{result.metric} of the regimes": [_REGIMES]}
    return {label: _svg(result, panels) for label, panels in halves.items() if panels}


def _svg(result: FinetuneResult, panels: Sequence[str]) -> str:
    stream = io.BytesIO()
    _draw(result, stream, _PAGE, panels, kind="svg", facecolor="none")
    text = stream.getvalue().decode("utf-8")
    return text[text.index("<svg") :]


def _draw(
    result: FinetuneResult,
    path: Path | IO[bytes],
    form: _Form,
    shown: Sequence[str],
    *,
    kind: str,
    facecolor: str,
) -> None:
    """Draw some of the panels: curves on the left where there are any, regimes on the right."""
    mpl = require_matplotlib()
    from matplotlib.figure import Figure

    groups, looks = grouped(result), looks_of(result.runs)
    panels = {name: facts for name, facts in _panels(result).items() if name in shown}
    heights = [ratio for _, ratio in panels.values()]
    rows = sum(len(group.summaries) + (len(groups) > 1) for group in groups)
    right = [_REGIMES] if _REGIMES in shown else []
    tall = 0.9 + form.row * max(rows, _FEWEST_ROWS) if right else 0.0
    height = max(tall, 0.4 + _PANEL * sum(heights))
    width = form.width if form.above or panels else form.width / 2
    with mpl.rc_context(form.style):
        figure = Figure(figsize=(width, height), layout="constrained")
        mosaic: Any = [[name, *right] for name in panels] or [right]
        grid = figure.subplot_mosaic(mosaic, height_ratios=heights or [1.0])
        for name, (title, _) in panels.items():
            grid[name].set_title(title)
            if name == "rate":
                _rates(grid[name], result.runs, looks)
            else:
                _curves(grid[name], result, name, looks)
        _share_steps([grid[name] for name in panels])
        if panels and len(looks) > 1:
            columns = 1 + (len(looks) > 4)
            grid[next(iter(panels))].legend(fontsize="small", ncols=columns, loc="upper right")
        if right:
            _regimes(grid[_REGIMES], result, groups, looks, above=form.above)
        save(figure, path, kind=kind, facecolor=facecolor, bbox_inches="tight", pad_inches=0.1)


def looks_of(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Return each regime its colour, in the order in which they were asked for."""
    names = dict.fromkeys(run.regime for run in runs)
    return {
        name: {
            "color": COLOURS[index % len(COLOURS)],
            "linestyle": "--" if index // len(COLOURS) % 2 else "-",
        }
        for index, name in enumerate(names)
    }


def _panels(result: FinetuneResult) -> dict[str, tuple[str, float]]:
    """Title and relative height of every kind of curve that was measured, the loss first."""
    held_out = f"held_out/{result.metric}"
    titles = {
        "loss": ("training loss", 1.5),
        held_out: (f"{_axis(result.metric)} of held-out examples", 1.2),
        "rate": ("learning rate", 0.8),
    }
    found = {name for run in result.runs for name, curve in run.outcome.curves.items() if curve}
    return {name: facts for name, facts in titles.items() if name in found}


def _share_steps(panels: Sequence[Any]) -> None:
    """Let the panels of curves share the axis of steps, written below the last."""
    for axes in panels[:-1]:
        axes.sharex(panels[-1])
        axes.tick_params(labelbottom=False)
    for axes in panels[-1:]:
        axes.set_xlabel("step")


def _axis(metric: str) -> str:
    return f"{plain(metric)}, %" if metric in FRACTIONS else plain(metric)


def _scale(result: FinetuneResult, name: str) -> float:
    return 100.0 if name != "loss" and result.metric in FRACTIONS else 1.0


def _curves(axes: Any, result: FinetuneResult, name: str, looks: dict[str, dict[str, Any]]) -> None:
    """Draw every run thinly, and the mean of each regime on top."""
    scale = _scale(result, name)
    for regime, look in looks.items():
        runs = [run for run in result.runs if run.regime == regime and run.outcome.curves.get(name)]
        lines = [np.array(run.outcome.curves[name], dtype=np.float64) for run in runs]
        if not lines:
            continue
        if len(lines) > 1:
            for line in lines:
                axes.plot(line[:, 0], scale * line[:, 1], lw=0.6, alpha=0.4, **look)
        whole = [
            line
            for run, line in zip(runs, lines, strict=True)
            if run.outcome.ending in ("finished", "stopped")
        ]
        mean = _mean(whole or lines)
        dot = {"marker": "o", "ms": 3} if len(mean) < 3 else {}
        axes.plot(mean[:, 0], scale * mean[:, 1], lw=1.9, label=plain(regime), **look, **dot)
        for run, line in zip(runs, lines, strict=True):
            if run.outcome.ending == "diverged" and name == "loss":
                axes.plot(*line[-1], marker="x", ms=6, mew=1.6, color=look["color"])
                axes.annotate(
                    "diverged", line[-1], (6, 0), textcoords="offset points", size="small"
                )


def _mean(lines: Sequence[Array]) -> Array:
    """Average curves at the steps of the first, as far as all of them go."""
    steps = lines[0][:, 0]
    steps = steps[steps <= min(float(line[-1, 0]) for line in lines)]
    values = [np.interp(steps, line[:, 0], line[:, 1]) for line in lines]
    return np.column_stack([steps, np.mean(values, axis=0)])


def _rates(axes: Any, runs: Sequence[Run], looks: dict[str, dict[str, Any]]) -> None:
    """Draw the learning rate of what each regime trains besides the head."""
    drawn, peaks = set(), set()
    for run in runs:
        curve, peak = run.outcome.curves.get("rate", ()), peak_rate(run)
        if not curve or (run.regime, peak, curve) in drawn:
            continue
        drawn.add((run.regime, peak, curve))
        peaks.add(peak)
        line = np.array(curve, dtype=np.float64)
        axes.plot(line[:, 0], peak * line[:, 1], lw=1.4, **looks[run.regime])
    low, high = min(peaks), max(peaks)
    if 0.0 < 4.0 * low < high:
        axes.set_yscale("log")
        axes.set_ylim(low / 20.0, 2.0 * high)
    else:
        axes.set_ylim(bottom=0.0)
        axes.ticklabel_format(axis="y", scilimits=(-2, 3))


def peak_rate(run: Run) -> float:
    """Return the largest peak learning rate outside the head, or the head's where it is alone."""
    others = [rate for kind, rate in run.learning_rates.items() if kind != "head"]
    return max(others or run.learning_rates.values(), default=1.0)


def _regimes(
    axes: Any,
    result: FinetuneResult,
    groups: Sequence[RunGroup],
    looks: dict[str, dict[str, Any]],
    *,
    above: bool,
) -> None:
    """Draw a row a regime: its mean and interval, every seed, and the value before training.

    Words stand beside the rows, or above them.
    """
    scale = 100.0 if result.metric in FRACTIONS else 1.0
    beside, place = axes.get_yaxis_transform(), 0
    for group in groups:
        if len(groups) > 1:
            text = {"ha": "left" if above else "right", "style": "italic", "color": QUIET}
            x = 0.0 if above else -0.03
            axes.text(x, place, plain(group.title), transform=beside, va="center", **text)
            place += 1
        for start, end, before in _stretches(group.summaries, place):
            first = group is groups[0] and start == place
            if above:  # not through the words
                for row in range(start, end + 1):
                    _before(axes, row - 0.12, row + 0.36, scale * before, named=False)
            else:
                _before(axes, start - 0.42, end + 0.45, scale * before, named=first)
        for summary in group.summaries:
            _row(axes, place, summary, scale, looks[summary.regime]["color"], above=above)
            place += 1
    # A single regime stands in the middle instead of filling the height.
    spare = max(0, _FEWEST_ROWS - place) / 2
    axes.set_ylim(place - 0.4 + spare, -0.7 - spare)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=LINE, lw=0.7)
    axes.set_axisbelow(True)
    axes.margins(x=0.08)
    several = any(len(one.values) > 1 for group in groups for one in group.summaries)
    what = ": mean and 95 % interval, dots are seeds" if several else ""
    if above:  # in words of the page's width
        what = (": mean, 95 % interval, seeds" if several else "") + "\ndashed: before training"
    axes.set_title(_axis(result.metric) + what)


def _before(axes: Any, start: float, end: float, value: float, *, named: bool) -> None:
    """Draw the value before training from one height to another."""
    if not math.isfinite(value):
        return
    look = {"colors": QUIET, "lw": 1.1, "linestyles": (0, (4, 2)), "zorder": 1}
    axes.vlines(value, start, end, **look)
    if named:
        text = {"ha": "center", "va": "bottom", "size": "small", "color": QUIET}
        axes.text(value, start - 0.03, "before", **text)


def _stretches(summaries: Iterable[Summary], first: int) -> list[tuple[int, int, float]]:
    """Rows from where to where that share their value before training."""
    found: list[tuple[int, int, float]] = []
    for row, summary in enumerate(summaries, first):
        if found and math.isclose(found[-1][2], summary.before, rel_tol=1e-9):
            found[-1] = (found[-1][0], row, found[-1][2])
        else:
            found.append((row, row, summary.before))
    return found


def _row(axes: Any, row: int, summary: Summary, scale: float, colour: str, *, above: bool) -> None:
    mean = scale * summary.mean
    if summary.ci95 is not None:
        low, high = (scale * end for end in summary.ci95)
        axes.plot([low, high], [row, row], color=colour, lw=2.2, solid_capstyle="butt")
    if len(summary.values) > 1:
        values = [scale * one for one in summary.values]
        dots = {"s": 13, "color": colour, "alpha": 0.55, "linewidths": 0}
        axes.scatter(values, [row + 0.19] * len(values), **dots)
    axes.scatter([mean], [row], s=42, color=colour, marker="D", zorder=3, linewidths=0)
    words = _words_above if above else _words_beside
    words(axes, row, summary, colour)


def _words_beside(axes: Any, row: int, summary: Summary, colour: str) -> None:
    """Write name and cost on the left of a row, the mean on its right."""
    beside = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
    left = {"ha": "right", "xy": (-0.03, row)}
    name = plain(summary.regime)
    axes.annotate(name, xytext=(0, 1), weight="bold", color=colour, va="bottom", **left, **beside)
    facts = {"va": "top", "size": "small", "color": QUIET}
    axes.annotate(cost(summary), xytext=(0, -1), **facts, **left, **beside)
    right = {"xy": (1.02, row), "xytext": (0, 0), "va": "center"}
    axes.annotate(mean_text(summary), **right, **beside)


def _words_above(axes: Any, row: int, summary: Summary, colour: str) -> None:
    """Write name and mean above a row; what it costs stands in the page's table."""
    look = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "va": "bottom"}
    name, place = plain(summary.regime), row - 0.16
    axes.annotate(name, (0.0, place), (0, 0), weight="bold", color=colour, **look)
    axes.annotate(mean_text(summary), (1.0, place), (0, 0), ha="right", **look)


def cost(summary: Summary) -> str:
    """Say how much a regime trains, and how long a step takes."""
    step = summary.step_seconds
    parts = [f"{summary.trainable_parameters:,} trained"]
    return ", ".join(parts if step is None else [*parts, f"{duration(step)} a step"])


def mean_text(summary: Summary) -> str:
    """Write the mean with half its interval."""
    mean = value(summary.metric, summary.mean) if summary.measured else "not measured"
    if summary.ci95 is None:
        return mean
    return f"{mean} ± {value(summary.metric, (summary.ci95[1] - summary.ci95[0]) / 2)}"
