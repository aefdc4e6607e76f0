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
    python benchmarks/curves.py DATA WORK --docs docs       both, in the documentation's pages
    python benchmarks/curves.py DATA WORK --quick           does it run

``docs/experiments/curves.jsonl`` is the journal behind the documentation's tables: a copy of it in
WORK shows them with ``--table``, and is what further runs go on from.

DATA holds ``checkpoints``, ``images`` and ``text``. Models of packages are sought in
``$SVFTOOL_MODELS``, by default ``~/.cache/svftool-models``; sets of absent ones are left out.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from curves_report import log, tables, write
from curves_sets import HEAD, OTHERS, SETS, SPECTRAL, Set, Unit, first_of, units_of
from names import chosen
from units import Journal, Line, apart, work_off

from svftool import decompose, finetune
from svftool.training import Run
from svftool.training.plan import run_to_plain

EARLY = ("head", "svf", "lora:8", "entries:4x", "svf+norm", "norm", "svf+scale", "full", "lora:1")
"""Regimes that are run before the others."""


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


def run(asked: argparse.Namespace, group: Group) -> list[Line]:
    """Train and measure; choose the rates where the group brings no factor."""
    unit, tuned = group.units[0], group.factor is None
    one = next(each for each in SETS if each.name == unit.where)
    one = _quick(one) if asked.quick else one
    data, work = asked.data.resolve(), asked.work.resolve()
    settings = replace(one.settings, safeguard="never", tune_lr=tuned, lr_scale=group.factor or 1.0)
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
    return [{"metric": result.metric, **_line(each, unit, group.factor)} for each in result.runs]


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
    parser.add_argument("--docs", type=Path)
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
    if asked.docs:
        write(sets, journal.lines, asked.docs)
        return
    if not (asked.table or asked.log):
        go(asked, _with_factors(asked, sets), journal)
    for one in sets:
        if asked.log:
            print(log(one, journal.lines), end="\n\n")
            continue
        print(tables(one, journal.lines, asked.work / f"curve-{one.name}.svg"), end="\n\n")


def _with_factors(asked: argparse.Namespace, sets: Sequence[Set]) -> list[Set]:
    """Decompose what is not yet, and leave out sets whose checkpoint is absent."""
    there = [one for one in sets if one.checkpoint_in(asked.data).exists()]
    for one in there:
        factors = one.factors_in(asked.work)
        if not factors.exists():
            apart(decompose, one.checkpoint_in(asked.data), factors)
    return there


if __name__ == "__main__":
    main()
