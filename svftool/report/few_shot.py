"""Results of few-shot segmentation in the form of the papers' tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from svftool.report.published import PublishedRow, published_rows
from svftool.report.text import plain_table
from svftool.training import Run, Summary
from svftool.training.results import FinetuneResult

CHOSEN_BY = {
    "base": "weights chosen on held-out images of base classes",
    "novel": "weights chosen on NOVEL classes, as the papers' code does",
    "last": "last weights taken",
}


def tables(result: FinetuneResult) -> RenderableType:
    """Return one table for each number of shots, and the rules that all runs share."""
    shots = dict.fromkeys(run.shots for run in result.runs)
    parts: list[RenderableType] = [_table(result, count) for count in shots]
    return Group(*parts, Text(rules(result), "dim"))


def rules(result: FinetuneResult) -> str:
    """Say in one line by which rules the numbers came about."""
    setting = result.setting
    inner, own = setting.get("inner_fold"), setting.get("base_network_fold")
    classes = "" if inner is None else f", on the classes of inner fold {inner} in place of its own"
    weights = "" if own is None else f"; weights taken to be those of fold {own}'s base network"
    start = " from the nearest prototype" if setting.get("start") == "nearest" else ""
    return (
        f"{setting.get('dataset')}, {setting.get('host')} host{start}, "
        f"{setting.get('image_size')} px; "
        f"{setting.get('test_episodes')} test episodes a fold and seed{classes}; "
        f"{CHOSEN_BY.get(str(setting.get('select_on')), '')}; {_novel_images(setting)}{weights}"
    )


def _novel_images(setting: Mapping[str, Any]) -> str:
    if setting.get("images_with_novel_classes") == 0:
        return "none of the training images holds novel classes"
    removed = setting.get("removed_images_with_novel_classes")
    return f"training images that hold novel classes {'removed' if removed else 'kept'}"


def _table(result: FinetuneResult, shots: int | None) -> Table:
    runs = [run for run in result.runs if run.shots == shots]
    folds = sorted({run.facts["fold"] for run in runs})
    seeds = len({run.seed for run in runs})
    table = plain_table()
    table.title = f"{shots}-shot mIoU, % ({seeds} seed{'s' * (seeds > 1)})"
    table.add_column("method")
    for fold in folds:
        table.add_column(f"fold {fold}", justify="right")
    for column in ("mean", "± 95 %", "FB-IoU", "base mIoU", "trained"):
        table.add_column(column, justify="right")
    before = [run.before for run in runs]
    untrained = {
        fold: [r.before["miou"] for r in runs if r.facts["fold"] == fold] for fold in folds
    }
    cells = [_percent(untrained[fold]) for fold in folds]
    rest = [_percent([b[name] for b in before if name in b]) for name in ("fb_iou", "base_miou")]
    mean = _percent([statistics.fmean(values) for values in untrained.values()])
    table.add_row("nearest prototype", *cells, mean, "", *rest, "0", style="dim")
    for regime in dict.fromkeys(run.regime for run in runs):
        table.add_row(*_row(result, [run for run in runs if run.regime == regime], folds))
    for row in _published(result, shots):
        table.add_row(*_published_row(row, folds), style="italic dim")
    return table


def _row(result: FinetuneResult, runs: Sequence[Run], folds: Sequence[int]) -> list[Text]:
    by_fold = [[r.after["miou"] for r in runs if r.facts["fold"] == fold] for fold in folds]
    whole = _whole(result.summary, runs[0], folds)
    half = None if whole is None or whole.ci95 is None else (whole.ci95[1] - whole.ci95[0]) / 2
    means = [statistics.fmean(values) for values in by_fold if values]
    cells = [
        *(_percent(values) for values in by_fold),
        _percent([statistics.fmean(means)]),
        "" if half is None else f"{100 * half:.2f}",
        _percent([run.after["fb_iou"] for run in runs]),
        _percent([run.after["base_miou"] for run in runs if "base_miou" in run.after]),
        f"{runs[0].trainable_parameters:,}",
    ]
    return [Text(runs[0].regime, "bold"), *(Text(cell) for cell in cells)]


def _whole(summaries: Sequence[Summary], run: Run, folds: Sequence[int]) -> Summary | None:
    """Find the summary over all folds, or that of the only one."""
    wanted = None if len(folds) > 1 else folds[0]
    for summary in summaries:
        same = (summary.regime, summary.shots) == (run.regime, run.shots)
        if same and summary.facts.get("fold") == wanted:
            return summary
    return None


def _published(result: FinetuneResult, shots: int | None) -> tuple[PublishedRow, ...]:
    setting = result.setting
    if setting.get("inner_fold") is not None:
        return ()
    return published_rows(
        str(setting.get("dataset")),
        setting.get("backbone"),
        shots or 0,
        str(setting.get("host")),
        start=setting.get("start"),
    )


def _published_row(row: PublishedRow, folds: Sequence[int]) -> list[str]:
    cells = [f"{100 * row.folds[fold]:.2f}" for fold in folds]
    mean = f"{100 * row.mean:.2f}" if len(folds) == len(row.folds) else ""
    return [f"published: {row.method}", *cells, mean, "", "", "", ""]


def _percent(values: Sequence[float]) -> str:
    return f"{100 * statistics.fmean(values):.2f}" if values else ""
