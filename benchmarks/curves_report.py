"""Tables and pictures of quality against trained numbers, from the journal of runs."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from curves_sets import REFERENCE, SPECTRAL, Set, units_of
from units import Line

from svftool.report.training.curve import save_curve
from svftool.tasks.base import TaskMetric
from svftool.training import Run, summarise
from svftool.training.plan import run_from_plain
from svftool.training.results import FinetuneResult, differences


def tables(one: Set, lines: Sequence[Line], picture: Path | None) -> str:
    """Write a table for every number of shots and metric; draw the first metric, if asked for."""
    known = {tuple(line["key"]) for line in lines}
    mine = [line for line in lines if line["key"][0] == one.name and line["key"][1] in one.regimes]
    if not mine:
        return f"## {one.title}\n\nNothing was run."
    runs = _complete(one, [run_from_plain(line["run"]) for line in mine])
    missing = sum(unit.key not in known for unit in units_of(one))
    metric = TaskMetric(mine[0]["metric"], higher_is_better=mine[0]["metric"] != "perplexity")
    factors = {line["key"][1]: line["factor"] for line in mine}
    heads = [each["run"]["trainable_parameters"] for each in mine if each["key"][1] == "head"]
    parts = [f"## {one.title}"]
    if missing:
        parts.append(f"{missing} of {len(units_of(one))} runs are missing.")
    for shots in dict.fromkeys(each.shots for each in runs):
        some = [each for each in runs if each.shots == shots]
        for name in (metric.name, *one.further):
            parts.append(_caption(one, shots, name))
            parts.append(_table(one, some, replace(metric, name=name), factors, *heads[:1]))
    compared = [each for each in runs if _seeds(runs, each) == one.seeds]
    if picture is not None and compared:
        _draw(one, compared, metric, picture)
    return "\n\n".join(parts)


def _caption(one: Set, shots: int | None, metric: str) -> str:
    """Say of how many examples a table is; in few-shot segmentation, of how many supports."""
    if not one.folds:
        return f"{shots} examples:"
    return "Five supports:" if metric.endswith("_5shot") else "One support:"


_TABLES = re.compile(
    r"(\d+ of \d+ runs are missing\.\n\n)?"
    r"((\d+ examples|One support|Five supports):\n\n(\|.*\n)+\n?)+"
)


def write(sets: Sequence[Set], lines: Sequence[Line], docs: Path) -> None:
    """Put the tables, the pictures and the log in the places that the documentation has for them.

    Parameters
    ----------
    sets : sequence of Set
    lines : sequence of dict
        The journal.
    docs : Path
        Has ``results.md`` and ``experiments/curves.md`` with a heading for every set.
    """
    pages = {docs / "results.md": "### ", docs / "experiments" / "curves.md": "## "}
    for page, mark in pages.items():
        text = page.read_text(encoding="utf-8")
        for one in sets:
            begin = text.index(f"{mark}{one.title}\n")
            end = re.compile(rf"^#{{1,{len(mark) - 1}}} ", re.M).search(text, begin + len(mark))
            section = text[begin : end.start() if end else len(text)]
            if mark == "## ":
                new = log(one, lines) + "\n\n"
            else:
                made = tables(one, lines, docs / f"curve-{one.name}.svg").split("\n\n", 1)[1]
                new = _TABLES.sub(lambda _, made=made: f"{made}\n\n", section, count=1)
            text = text.replace(section, new)
        page.write_text(text, encoding="utf-8")


def _draw(one: Set, runs: Sequence[Run], metric: TaskMetric, picture: Path) -> None:
    order = {name: place for place, name in enumerate(one.regimes)}
    runs = sorted(runs, key=lambda each: (each.shots or 0, order[each.regime]))
    summary = summarise(runs, metric)
    whole = [each for each in summary if None in each.facts.values()] or summary
    task = str(one.options.get("task", "classification"))
    result = FinetuneResult(picture, task, metric.name, tuple(runs), tuple(whole))
    save_curve(result, picture, kind="svg")


def _table(
    one: Set, runs: Sequence[Run], metric: TaskMetric, factors: Mapping[str, float], head: int = 0
) -> str:
    """Write a row for every regime; bold is one of the singular basis that reaches the reference.

    It trains at most a quarter of the reference's numbers beside the head, and its mean over all
    seeds is in the reference's interval or better.
    """
    scale, sign = (100, 1) if metric.higher_is_better else (1, -1)
    summary = {each.regime: each for each in summarise(runs, metric)}  # the last: of all folds
    reference, first = summary.get(REFERENCE), next(iter(summary.values()))
    name = "perplexity" if sign < 0 else f"{metric.name.split('_')[0]}, %"
    rows = [
        f"| regime | numbers | {name} | better than {REFERENCE} | wins | rates | seeds |",
        "|---|---|---|---|---|---|---|",
        f"| before | | {scale * first.before:.1f} | | | | |",
    ]
    for regime in (each for each in one.regimes if each in summary):
        found, against, wins = summary[regime], "", ""
        pairs = differences(runs, metric.name, regime, REFERENCE)
        if pairs is not None and regime != REFERENCE:
            against = _with_half(sign * scale * pairs.mean, pairs.half, scale, "+")
            wins = f"{pairs.wins(higher_is_better=sign > 0)} of {len(pairs.values)}"
        ends = found.ci95
        value = _with_half(scale * found.mean, ends and (ends[1] - ends[0]) / 2, scale)
        reached = (
            regime in SPECTRAL
            and reference is not None
            and found.seeds == one.seeds
            and 4 * (found.trainable_parameters - head) <= reference.trainable_parameters - head
            and sign * found.mean >= min(sign * end for end in reference.ci95 or (math.inf,))
        )
        rows.append(
            f"| {f'**{regime}**' if reached else regime} | {found.trainable_parameters - head:,} | "
            f"{value} | {against} | {wins} | {factors[regime]:.2g} | {found.seeds} |"
        )
    return "\n".join(rows)


def _with_half(value: float, half: float | None, scale: float, sign: str = "") -> str:
    number = f"{value:{sign}.1f}".replace("-", "\N{MINUS SIGN}")
    return number + ("" if half is None else f" ± {scale * half:.1f}")


def log(one: Set, lines: Sequence[Line]) -> str:
    """Write what each rate scored on what was left out of the support set, and every seed."""
    mine = [line for line in lines if line["key"][0] == one.name]
    runs = [run_from_plain(line["run"]) for line in mine]
    if not runs:
        return f"## {one.title}\n\nNothing was run."
    scale, digits = (1, 1) if mine[0]["metric"] == "perplexity" else (100, 1)

    def shown(value: float | None) -> str:
        return "diverged" if value is None else f"{scale * value:.{digits}f}"

    tried = {each.regime: each.tuning for each in runs if each.tuning is not None}
    factors = sorted({trial.factor for one in tried.values() for trial in one.trials})
    rows = ["| regime | " + " | ".join(f"x {factor:.2g}" for factor in factors) + " |"]
    rows.append("|---" * (1 + len(factors)) + "|")
    for regime in (name for name in one.regimes if name in tried):
        scores = {trial.factor: shown(trial.score) for trial in tried[regime].trials}
        chosen_one = tried[regime].factor
        scores[chosen_one] = f"**{scores.get(chosen_one, '')}**"
        rows.append(f"| {regime} | " + " | ".join(scores.get(each, "") for each in factors) + " |")
    ends = [f"| regime | {mine[0]['metric']}, by seed |", "|---|---|"]
    for shots in dict.fromkeys(each.shots for each in runs):
        for regime in one.regimes:
            found = [each for each in runs if (each.regime, each.shots) == (regime, shots)]
            values = (shown(each.after[mine[0]["metric"]]) + _place(each) for each in found)
            label = regime if len(one.shots) == 1 else f"{regime}, {shots} shots"
            ends += [f"| {label} | {'; '.join(values)} |"] if found else []
    return "\n".join([f"## {one.title}", "", *rows, "", *ends])


def _place(run: Run) -> str:
    fold = "".join(f", fold {value}" for name, value in run.facts.items() if name == "fold")
    return f" ({run.seed}{fold})"


def _seeds(runs: Sequence[Run], run: Run) -> int:
    """Count the seeds of a run's regime: means over others are not to be compared."""
    return len({each.seed for each in runs if (each.regime, each.shots) == (run.regime, run.shots)})


def _complete(one: Set, runs: Sequence[Run]) -> list[Run]:
    """Leave out seeds of a regime that lack a fold."""
    count = Counter((each.regime, each.seed, each.shots) for each in runs)
    folds = len(one.folds) or 1
    return [each for each in runs if count[each.regime, each.seed, each.shots] == folds]
