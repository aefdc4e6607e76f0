"""Quality against trained numbers: every regime on real models and data, rates by support folds.

The rates of a regime are chosen once: by ``--tune-lr`` on the support set of seed 0 (few-shot
segmentation: on held-out images of fold 0's base classes). The same factor then goes for every
seed, fold and number of shots. Query sets choose nothing. Each run is a line of WORK/curves.jsonl;
what is there is not run again.

    python benchmarks/curves.py DATA WORK                   all that is missing, then the tables
    python benchmarks/curves.py DATA WORK stories dtd10     these sets
    python benchmarks/curves.py DATA WORK --jobs 16 --device cuda --minutes 9
    python benchmarks/curves.py DATA WORK --table           only the tables, and a picture each
    python benchmarks/curves.py DATA WORK --log             what each rate scored, and every seed
    python benchmarks/curves.py DATA WORK --quick           does it run

``docs/experiments/curves.jsonl`` is the journal behind the documentation's tables: a copy of it in
WORK shows them with ``--table``, and is what further runs go on from.

DATA holds ``checkpoints``, ``images`` and ``text``. Models of packages are sought in
``$SVFTOOL_MODELS``, by default ``~/.cache/svftool-models``; sets of absent ones are left out.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from names import chosen
from units import Journal, Line, apart, work_off

from svftool import decompose, finetune
from svftool.choices.training import Settings
from svftool.report.training.curve import save_curve
from svftool.tasks.base import TaskMetric
from svftool.training import Run, summarise
from svftool.training.plan import run_from_plain, run_to_plain
from svftool.training.results import FinetuneResult, differences

HOME = Path(os.environ.get("SVFTOOL_MODELS") or Path.home() / ".cache" / "svftool-models")
REFERENCE = "lora:8"
SPECTRAL = (
    "svf", "svf+scale", "svf+bias", "svf+norm", "entries:4x", "entries:4x:random",
    "entries:4x:band", "core:4x", "salt:1",
)  # fmt: skip
OTHERS = ("norm", "bias", "rows", "lora:1", "lora:2", "lora:8", "full")
HEAD = ("head",)
EARLY = ("head", "svf", "lora:8", "entries:4x", "svf+norm", "norm", "svf+scale", "full", "lora:1")
"""Regimes that are run before the others."""
WITHOUT_BIASES = ("svf+bias", "bias")


@dataclass(frozen=True)
class Set:
    """A model on a data set.

    Attributes
    ----------
    name, title : str
        On the command line, and in the document.
    checkpoint : str
        Below DATA, or below the folder of models if it begins with ``~``.
    data, evaluation : str
        Below DATA; no evaluation measures with what the shots left over.
    options : mapping
        Arguments of `svftool.finetune`.
    settings : Settings
    seeds : int
    shots : tuple of int
        The rates are chosen with the first of them.
    folds : tuple of int
        Of few-shot segmentation.
    left_out : tuple of str
        Regimes that the model has nothing for.
    further : tuple of str
        Metrics that have a table of their own.
    """

    name: str
    title: str
    checkpoint: str
    data: str
    evaluation: str | None
    options: Mapping[str, Any]
    settings: Settings = field(default_factory=Settings)
    seeds: int = 5
    shots: tuple[int, ...] = (10,)
    folds: tuple[int, ...] = ()
    left_out: tuple[str, ...] = ()
    further: tuple[str, ...] = ()

    def checkpoint_in(self, data: Path) -> Path:
        """Where the checkpoint is."""
        inner = self.checkpoint
        return HOME / inner[1:] if inner.startswith("~") else data / inner

    def factors_in(self, work: Path) -> Path:
        """Where its factors are; sets of one checkpoint share them."""
        return work / f"factors-{Path(self.checkpoint).stem.strip('~')}"

    @property
    def regimes(self) -> tuple[str, ...]:
        """Those that are compared on it."""
        return tuple(one for one in HEAD + SPECTRAL + OTHERS if one not in self.left_out)


_SHAKESPEARE = ("text/shakespeare_train.jsonl", "text/shakespeare_eval.jsonl")
_LANGUAGE = {"task": "language", "sequence_length": 128}
_MOBILENET = ("~mobilenet_v2/mobilenet_v2-b0353104.pth", "torchvision:mobilenet_v2")
SETS = (
    Set(
        "stories",
        "Shakespeare, a Llama of 260,000 parameters",
        "checkpoints/stories260K",
        *_SHAKESPEARE,
        _LANGUAGE,
        Settings(steps=60, batch_size=4),
        left_out=HEAD + WITHOUT_BIASES,
    ),
    Set(
        "smollm2",
        "Shakespeare, SmolLM2-135M",
        "~smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        *_SHAKESPEARE,
        _LANGUAGE,
        Settings(steps=40, batch_size=4),
        seeds=3,
        shots=(10, 50),
        left_out=HEAD + WITHOUT_BIASES,
    ),
    Set(
        "banking77",
        "Customer questions (`banking77`), MiniLM",
        "~minilm",
        "text/banking77/train.csv",
        "text/banking77/test.csv",
        {"task": "text-classification"},
        shots=(5,),
    ),
    Set(
        "dtd10",
        "Textures (`dtd10`), torchvision's MobileNetV2",
        _MOBILENET[0],
        "images/dtd10",
        None,
        {"model": _MOBILENET[1], "image_size": 160, "augment": "none"},
    ),
    Set(
        "voc",
        "Few-shot segmentation of VOC, torchvision's MobileNetV2",
        _MOBILENET[0],
        "images/voc20_pairs",
        None,
        {
            "task": "few-shot-segmentation",
            "model": _MOBILENET[1],
            "image_size": 129,
            "output_stride": 16,
            "select_on": "last",
            "test_shots": (5,),
            "test_episodes": 300,
        },
        Settings(steps=150, batch_size=4),
        seeds=3,
        shots=(1,),
        folds=(0, 1, 2, 3),
        further=("miou_5shot",),
    ),
)


@dataclass(frozen=True)
class Unit:
    """A run: one regime with one seed; the first one of a regime chooses its rates, too."""

    where: str
    regime: str
    seed: int
    shots: int
    fold: int | None

    @property
    def key(self) -> tuple[Any, ...]:
        """What a line of the journal is known by."""
        return self.where, self.regime, self.seed, self.shots, self.fold

    @property
    def draw(self) -> tuple[Any, ...]:
        """What it is trained and measured on."""
        return self.where, self.seed, self.shots, self.fold


@dataclass(frozen=True)
class Group:
    """Runs of one draw and one factor of the rates: their start is measured once."""

    units: tuple[Unit, ...]
    factor: float | None = None

    def __str__(self) -> str:
        one = self.units[0]
        fold = "" if one.fold is None else f", fold {one.fold}"
        regimes = " ".join(each.regime for each in self.units)
        return f"{one.where}, {one.shots} shots, seed {one.seed}{fold}: {regimes}"


def units_of(one: Set) -> list[Unit]:
    """Return all runs of a set, one seed after the other."""
    return [
        Unit(one.name, regime, seed, shots, fold)
        for shots in one.shots
        for seed in range(one.seeds)
        for fold in one.folds or (None,)
        for regime in one.regimes
    ]


def first_of(one: Set, regime: str) -> Unit:
    """Return the run that chooses a regime's rates."""
    return Unit(one.name, regime, 0, one.shots[0], one.folds[0] if one.folds else None)


def run(asked: argparse.Namespace, group: Group) -> list[Line]:
    """Train and measure; choose the rates where the group brings no factor."""
    unit, tuned = group.units[0], group.factor is None
    one = next(each for each in SETS if each.name == unit.where)
    one = _quick(one) if asked.quick else one
    data, work = asked.data.resolve(), asked.work.resolve()
    settings = replace(one.settings, safeguard="never", tune_lr=tuned)
    settings = replace(settings, lr_scale=group.factor or 1.0)
    options = dict(one.options)
    if unit.fold is not None:
        options["folds"] = (unit.fold,)
    if one.evaluation is not None:
        options["evaluation"] = data / one.evaluation
    with tempfile.TemporaryDirectory(dir=work) as place:
        result = finetune(
            one.factors_in(work),
            data=data / one.data,
            output=Path(place) / "runs",
            regimes=[each.regime for each in group.units],
            seeds=[unit.seed],
            shots=(unit.shots,) if one.folds else unit.shots,
            settings=settings,
            device="cpu" if one.name == "stories" else asked.device,
            **options,
        )
    if result.interrupted is not None:
        raise KeyboardInterrupt
    facts = {"metric": result.metric}
    return [{**facts, **_line(each, unit, group.factor)} for each in result.runs]


def _line(run: Run, unit: Unit, factor: float | None) -> Line:
    """Leave out the losses of every step, and what is the same for all runs of a set."""
    if factor is None:
        factor = 1.0 if run.tuning is None else run.tuning.factor
    plain = run_to_plain(run)
    outcome = {**plain["outcome"], "curves": {}}
    slim = {**plain, "outcome": outcome, "output": None, "setting": {}, "support": {}}
    return {"key": replace(unit, regime=run.regime).key, "factor": factor, "run": slim}


def go(asked: argparse.Namespace, sets: Sequence[Set], journal: Journal) -> None:
    """Run what is missing: each regime's first run, and then the others with its rates."""
    end = None if asked.minutes is None else time.monotonic() + 60 * asked.minutes
    for groups in (_firsts, _others):
        work_off(
            groups(sets, journal),
            partial(run, asked),
            journal,
            jobs=asked.jobs,
            minutes=None if end is None else (end - time.monotonic()) / 60,
        )


def _firsts(sets: Sequence[Set], journal: Journal) -> list[Group]:
    """Return the runs that choose rates and are missing."""
    known = {tuple(line["key"]) for line in journal.lines}
    units = [first_of(one, regime) for one in sets for regime in one.regimes]
    units.sort(key=lambda unit: EARLY.index(unit.regime) if unit.regime in EARLY else len(EARLY))
    return [Group((unit,)) for unit in units if unit.key not in known]


def _others(sets: Sequence[Set], journal: Journal) -> list[Group]:
    """Return what else is missing of regimes whose rates are chosen, one seed after the other."""
    factors = {tuple(line["key"]): line["factor"] for line in journal.lines}
    found: dict[tuple[Any, ...], list[Unit]] = {}
    for one in sets:
        for unit in units_of(one):
            factor = factors.get(first_of(one, unit.regime).key)
            if unit.key not in factors and factor is not None:
                found.setdefault((unit.draw, factor), []).append(unit)
    return [Group(tuple(units), key[-1]) for key, units in found.items()]


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
            parts.append(f"{shots} shots, {name}")
            parts.append(_table(one, some, replace(metric, name=name), factors, *heads[:1]))
    if picture is not None and runs:
        _draw(one, runs, metric, picture)
    return "\n\n".join(parts)


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

    It trains at most a quarter of the reference's numbers beside the head, and its mean is in the
    reference's interval or better.
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
            and 4 * (found.trainable_parameters - head) <= reference.trainable_parameters - head
            and sign * found.mean >= min(sign * end for end in reference.ci95 or (math.inf,))
        )
        rows.append(
            f"| {f'**{regime}**' if reached else regime} | {found.trainable_parameters - head:,} | "
            f"{value} | {against} | {wins} | {factors[regime]:.2g} | {found.seeds} |"
        )
    return "\n".join(rows)


def _with_half(value: float, half: float | None, scale: float, sign: str = "") -> str:
    return f"{value:{sign}.1f}" + ("" if half is None else f" ± {scale * half:.1f}")


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


def _complete(one: Set, runs: Sequence[Run]) -> list[Run]:
    """Leave out seeds of a regime that lack a fold."""
    count = Counter((each.regime, each.seed, each.shots) for each in runs)
    folds = len(one.folds) or 1
    return [each for each in runs if count[each.regime, each.seed, each.shots] == folds]


def _quick(one: Set) -> Set:
    """Two steps, and one run a regime."""
    episodes = {"test_episodes": 8} if one.folds else {}
    return replace(
        one,
        options={**one.options, **episodes},
        settings=replace(one.settings, steps=2),
        seeds=1,
        shots=one.shots[:1],
        folds=one.folds[:1],
    )


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("sets", nargs="*", help=", ".join(one.name for one in SETS))
    parser.add_argument("--regime", help="comma-separated; all by default")
    parser.add_argument("--seeds", type=int, help="at most; by default 5, or 3")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--log", action="store_true")
    return parser.parse_intermixed_args()


def main() -> None:
    """Run what is missing and print the tables."""
    asked = parse_arguments()
    names = chosen(asked.sets, [one.name for one in SETS])
    sets = [_quick(one) if asked.quick else one for one in SETS if one.name in names]
    if asked.regime:
        left = [one for one in HEAD + SPECTRAL + OTHERS if one not in asked.regime.split(",")]
        sets = [replace(one, left_out=one.left_out + tuple(left)) for one in sets]
    if asked.seeds:
        sets = [replace(one, seeds=min(one.seeds, asked.seeds)) for one in sets]
    journal = Journal(asked.work / "curves.jsonl")
    if not (asked.table or asked.log):
        there = [one for one in sets if one.checkpoint_in(asked.data).exists()]
        for one in there:
            factors = one.factors_in(asked.work)
            if not factors.exists():
                apart(decompose, one.checkpoint_in(asked.data), factors)
        go(asked, there, journal)
    for one in sets:
        if asked.log:
            print(log(one, journal.lines), end="\n\n")
            continue
        print(tables(one, journal.lines, asked.work / f"curve-{one.name}.svg"), end="\n\n")


if __name__ == "__main__":
    main()
