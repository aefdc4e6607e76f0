"""Tables and the picture of `merging_tasks`, from the lines that it wrote."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svftool.report.drawing import plain, require_matplotlib, save
from svftool.report.training.figure import COLOURS, INK, LINE, QUIET, STYLE
from svftool.training.results import interval

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes
    ----------
    name : str
    accuracy : mapping of str to float
        Of each task, the mean over seeds.
    normalised : tuple of float
        One a seed: the mean over tasks of accuracy over that of the task's own fine-tune.
    """

    name: str
    accuracy: Mapping[str, float]
    normalised: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean of the normalised accuracy."""
        return statistics.fmean(self.normalised)

    @property
    def half(self) -> float | None:
        """Half of the 95 % interval of `mean`."""
        ends = interval(self.normalised)
        return None if ends is None else (ends[1] - ends[0]) / 2


@dataclass(frozen=True)
class Group:
    """The rows of one kind of fine-tunes.

    Attributes
    ----------
    kind : str
    base, own : Row
        The base, and each task's own fine-tune.
    merged, pairs : tuple of Row
        Of all tasks together, the best first; of two at a time.
    """

    kind: str
    base: Row
    own: Row
    merged: tuple[Row, ...]
    pairs: tuple[Row, ...]


def grouped(lines: Sequence[Line], tasks: Sequence[str]) -> list[Group]:
    """Put the lines of each kind together; seeds without all of their fine-tunes are left out."""
    base = {
        task: value
        for line in lines
        if line["row"] == "base"
        for task, value in line["accuracy"].items()
    }
    found = []
    for kind in dict.fromkeys(line["kind"] for line in lines if "kind" in line):
        mine = [line for line in lines if line.get("kind") == kind]
        own: dict[int, dict[str, float]] = {}
        for line in mine:
            if line["row"] == "fine-tune":
                task = line["cell"].rpartition("/")[2]
                own.setdefault(line["seed"], {})[task] = line["accuracy"][task]
        own = {seed: each for seed, each in own.items() if each.keys() == set(tasks)}
        if own and base.keys() == set(tasks):
            found.append(_group(kind, mine, base, own))
    return found


def _group(
    kind: str, lines: Sequence[Line], base: Mapping[str, float], own: Mapping[int, dict[str, float]]
) -> Group:
    merged: dict[tuple[bool, str], dict[int, dict[str, float]]] = {}
    for line in lines:
        if line["row"] != "fine-tune" and line["seed"] in own:
            cell = merged.setdefault((line["pairs"], line["row"]), {})
            cell[line["seed"]] = line["accuracy"]
    rows = {key: _row(key[1], seeds, own) for key, seeds in merged.items()}
    ordered = sorted(rows.items(), key=lambda item: -item[1].mean)
    return Group(
        kind,
        _row("base", dict.fromkeys(own, base), own),
        _row("own fine-tune", own, own),
        tuple(row for (pairs, _), row in ordered if not pairs),
        tuple(row for (pairs, _), row in ordered if pairs),
    )


def _row(
    name: str, seeds: Mapping[int, Mapping[str, float]], own: Mapping[int, Mapping[str, float]]
) -> Row:
    tasks = list(next(iter(own.values())))
    return Row(
        name,
        {task: statistics.fmean(each[task] for each in seeds.values()) for task in tasks},
        tuple(
            statistics.fmean(each[task] / own[seed][task] for task in tasks)
            for seed, each in seeds.items()
        ),
    )


def table(lines: Sequence[Line], tasks: Sequence[str]) -> str:
    """Write the tables of every kind in Markdown, in percent."""
    parts = []
    for group in grouped(lines, tasks):
        seeds = len(group.own.normalised)
        rows = [group.base, group.own, *group.merged]
        parts.append(_markdown(f"{group.kind}, {len(tasks)} in one", rows, tasks, seeds))
        if group.pairs:
            rows = [group.base, group.own, *group.pairs]
            parts.append(_markdown(f"{group.kind}, two at a time", rows, tasks, seeds))
    return "\n\n".join(parts)


def _markdown(title: str, rows: Sequence[Row], tasks: Sequence[str], seeds: int) -> str:
    head = [title, *tasks, "normalised", "±"]
    text = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        name = row.name if len(row.normalised) == seeds else f"{row.name} ({len(row.normalised)})"
        shown = [f"{100 * row.accuracy[task]:.1f}" for task in tasks]
        half = "" if row.half is None else f"{100 * row.half:.1f}"
        text.append(f"| {' | '.join([name, *shown, f'{100 * row.mean:.1f}', half])} |")
    return "\n".join(text)


def draw(lines: Sequence[Line], tasks: Sequence[str], path: Path) -> None:
    """Draw the normalised accuracy of every merge of all tasks, a panel a kind."""
    groups = [one for one in grouped(lines, tasks) if one.merged]
    if not groups:
        return
    mpl = require_matplotlib()
    from matplotlib.figure import Figure

    # One order in all panels, so that a method is found again.
    means: dict[str, list[float]] = {}
    for group in groups:
        for row in group.merged:
            means.setdefault(row.name, []).append(row.mean)
    order = sorted(means, key=lambda name: -statistics.fmean(means[name]))
    with mpl.rc_context({**STYLE, "font.size": 9}):
        size = (2.2 + 3.2 * len(groups), 1.2 + 0.3 * len(order))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
        for index, (axes, group) in enumerate(zip(panels, groups, strict=True)):
            _panel(axes, group, order, COLOURS[index])
        save(figure, path, kind="svg", facecolor="white")


def _panel(axes: Any, group: Group, order: Sequence[str], colour: str) -> None:
    for mark in (100 * group.base.mean, 100.0):
        axes.axvline(mark, color=QUIET, lw=1.0, ls=(0, (4, 2)), zorder=0)
    axes.annotate(
        "base",
        (100 * group.base.mean, 1.0),
        (0, 1),
        xycoords=axes.get_xaxis_transform(),
        textcoords="offset points",
        ha="center",
        va="bottom",
        size="small",
        color=QUIET,
    )
    for row in group.merged:
        place = order.index(row.name)
        if row.half is not None:
            ends = [100 * (row.mean - row.half), 100 * (row.mean + row.half)]
            axes.plot(ends, [place, place], color=colour, lw=2.0, solid_capstyle="butt")
        if len(row.normalised) > 1:
            dots = [100 * one for one in row.normalised]
            axes.scatter(
                dots, [place + 0.22] * len(dots), s=9, color=colour, alpha=0.5, linewidths=0
            )
        axes.scatter([100 * row.mean], [place], s=30, color=colour, marker="D", linewidths=0)
    axes.set_yticks(range(len(order)), [plain(name) for name in order], color=INK)
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=LINE, lw=0.7)
    axes.set_axisbelow(True)
    axes.set_title(plain(group.kind), pad=14)
    axes.set_xlabel("accuracy, % of each task's own fine-tune")
