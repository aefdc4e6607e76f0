"""An audit as one figure for papers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from svftool.auditing import AuditResult, Comparison, Row
from svftool.report.drawing import PLAIN_AXES, plain, require_matplotlib, save
from svftool.report.inspect.marks import largest_of
from svftool.report.names import display_names

_GREY, _BLUE, _ORANGE = "#8a919c", "#2b5fb8", "#c4551d"
_SVF, _INSIDE, _OUTSIDE = "#1b8a8f", "#4264c9", "#9a4fb3"
_MOST_LAYERS = 30


def save_figure(result: AuditResult, path: Path, *, kind: str) -> None:
    """Draw drift, shares and spectra of the last comparison, and the trajectory of a series.

    Parameters
    ----------
    result : AuditResult
    path : Path
        Where to write.
    kind : {"png", "svg", "pdf"}

    Raises
    ------
    MissingDependencyError
        If matplotlib is not installed.
    """
    mpl = require_matplotlib()
    from matplotlib.figure import Figure

    one = result.comparisons[-1]
    rows = [row for row in one.matrices if row.curves is not None]
    with mpl.rc_context(PLAIN_AXES):
        height = 1.4 + 0.13 * min(_MOST_LAYERS, max(8, len(rows)))
        figure = Figure(figsize=(7.2, height + (1.9 if result.trajectory else 0.0)))
        grid = figure.subplot_mosaic(
            "AB;AC;DD" if result.trajectory else "AB;AC",
            width_ratios=(1.15, 1.0),
            height_ratios=(1.0, 0.8, 0.75) if result.trajectory else (1.0, 0.8),
        )
        _drift(grid["A"], one, rows)
        most = next((row for row in one.by_part() if row.curves is not None), None)
        _spectrum(grid["B"], most)
        _change(grid["C"], most)
        if result.trajectory:
            _trajectory(grid["D"], result)
        figure.set_layout_engine("constrained")
        save(figure, path, kind=kind)


def _drift(axes: Any, one: Comparison, rows: Sequence[Row]) -> None:
    """Draw bars of weight drift, split by the shares of the change where they are known."""
    metric = "weight_drift" if one.tuned is not None else "effective_rank.base"
    top = sorted(rows, key=lambda row: -(row.value(metric) or 0.0))[:_MOST_LAYERS]
    names = display_names((row.name for row in top), 26)
    largest = largest_of(row.value(metric) for row in top)
    # What is infinite is drawn a little longer than the longest.
    values = np.minimum([row.value(metric) or 0.0 for row in top], 1.1 * (largest or 1.0))
    places = np.arange(len(top))
    shares = [[row.value(name) for row in top] for name in ("svf_share", "off_diagonal_share")]
    if one.tuned is not None and all(v is not None for line in shares for v in line):
        svf, off = (np.array(line, dtype=float) for line in shares)
        edges = (svf * values, off * values, (1.0 - svf - off) * values)
        labels = ("in the singular values", "turned inside", "outside")
        left = np.zeros(len(top))
        for width, label, colour in zip(edges, labels, (_SVF, _INSIDE, _OUTSIDE), strict=True):
            axes.barh(places, width, left=left, color=colour, label=label, height=0.75)
            left = left + width
        axes.legend(
            loc="upper left", bbox_to_anchor=(-0.3, -0.06), ncols=3, fontsize=6.5,
            columnspacing=1.0, handlelength=1.2,
        )  # fmt: skip
    else:
        axes.barh(places, values, color=_BLUE, height=0.75)
    axes.set_yticks(places, [plain(names[row.name]) for row in top])
    axes.set_ylim(len(top) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, labelsize=6.5)
    axes.set_title("weight drift" if one.tuned is not None else "effective rank")


def _spectrum(axes: Any, row: Row | None) -> None:
    if row is None or row.curves is None:
        axes.set_axis_off()
        return
    index = np.arange(1, len(row.curves.base) + 1)
    # A broad pale band below a thin line: both are seen where they coincide.
    base = np.maximum(row.curves.base, 1e-12)
    axes.semilogy(index, base, color=_GREY, alpha=0.45, label="before", lw=4.5)
    if row.curves.tuned is not None:
        tuned = np.maximum(row.curves.tuned, 1e-12)
        axes.semilogy(index, tuned, color=_BLUE, label="after", lw=1.2)
    floor = 1e-4 * float(row.curves.base.max(initial=1e-8))
    axes.set_ylim(bottom=max(floor, 0.7 * float(row.curves.base.min())))
    axes.legend(fontsize=7)
    axes.set_title("singular values")
    axes.set_xlabel(plain(display_names([row.name], 44)[row.name]), fontsize=6.5)


def _change(axes: Any, row: Row | None) -> None:
    curves = None if row is None else row.curves
    if curves is None or curves.tuned is None:
        axes.set_axis_off()
        return
    moved = curves.tuned - curves.base if curves.along is None else curves.along
    keep = curves.base > 1e-6 * curves.base.max(initial=0.0)
    relative = np.where(keep, moved / np.where(keep, curves.base, 1.0), 0.0)
    index = np.arange(1, len(relative) + 1)
    axes.bar(index, 100 * relative, width=0.9, color=np.where(relative > 0, _ORANGE, _BLUE))
    axes.axhline(0.0, color=_GREY, lw=0.6)
    # The last few singular values may change many times over: they are cut off at the edge.
    edge = 130.0 * float(np.quantile(np.abs(relative), 0.97))
    if edge > 0.0:
        axes.set_ylim(max(axes.get_ylim()[0], -edge), min(axes.get_ylim()[1], edge))
    axes.set_title("change along each direction, %")
    axes.set_xlabel("index")


def _trajectory(axes: Any, result: AuditResult) -> None:
    assert result.trajectory is not None
    places = np.arange(len(result.trajectory.checkpoints))
    for values in result.trajectory.layers.values():
        drift = np.array([np.nan if value is None else value for value in values], dtype=float)
        axes.plot(places, drift, color=_GREY, lw=0.6, alpha=0.5)
    median = result.trajectory.metrics["weight_drift"]
    line = np.array([np.nan if value is None else value for value in median], dtype=float)
    axes.plot(places, line, color=_BLUE, lw=2.0, marker="o", ms=3.5, label="median")
    names = [plain(path.name.removesuffix(path.suffix)) for path in result.trajectory.checkpoints]
    axes.set_xticks(places, names)
    axes.set_ylim(bottom=0.0)
    axes.legend(fontsize=7)
    axes.set_title("weight drift over the series")
