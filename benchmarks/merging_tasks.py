"""Fine-tunes of MobileNetV2 on five tasks merged by every method: what is left of each.

    python benchmarks/merging_tasks.py DATA WORK --seeds 3                 all that is missing
    python benchmarks/merging_tasks.py DATA WORK --device cuda --jobs 12   in 12 processes
    python benchmarks/merging_tasks.py DATA WORK --match full/0 /tsv       some of the merges
    python benchmarks/merging_tasks.py DATA WORK --table                   table and picture alone
    python benchmarks/merging_tasks.py DATA WORK --seeds 1 --steps 3 --images 4    does it run

Each fine-tune is the trunk of torchvision's MobileNetV2, trained below a head of its own that does
not change: the mean direction of each class in the features of the base. All weights are trained
(``full``), or changes of rank 8 of every convolution but the depthwise ones (``lora:8``, written as
PEFT does). The merges are those of ``svftool merge``, each method with its defaults; the merged
trunk is measured with every task's head. The normalised accuracy is the mean over tasks of accuracy
over that of the task's own fine-tune. Learning rates are chosen of three, for all tasks together,
by accuracy on a fifth of the training pictures. Batch norms run with their statistics, which
fine-tuning leaves as they are in the base, and so does merging.

A method that takes two inputs merges each task with the next one, and a task's accuracy is the mean
of its two merges.

Everything measured is a line of RESULTS/runs.jsonl; what is there is not run again. Beside it stand
``merging-tasks.md`` and ``merging-tasks.svg``. RESULTS is WORK unless --results names another.
DATA holds ``images``; the network is sought in ``$SVFTOOL_MODELS``, by default
``~/.cache/svftool-models``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import merging_tasks_network as work
from merging_tasks_images import TASKS
from merging_tasks_network import RATES, Place
from merging_tasks_report import draw, table
from names import chosen
from units import Journal, Line, work_off

from svftool.choices.merging import METHODS

HOME = Path(os.environ.get("SVFTOOL_MODELS") or Path.home() / ".cache" / "svftool-models")
NETWORK = Path("mobilenet_v2") / "mobilenet_v2-b0353104.pth"
KINDS = tuple(RATES)
Groups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Cell:
    """One row of a table with one seed.

    Attributes
    ----------
    kind : str
        How the fine-tunes were trained.
    seed : int
    method : str
        As ``--method`` takes it.
    groups : tuple of tuple of str
        The tasks that are merged; several groups where a method takes two inputs.
    """

    kind: str
    seed: int
    method: str
    groups: Groups

    @property
    def pairs(self) -> bool:
        """Whether tasks are merged two at a time."""
        return len(self.groups) > 1

    @property
    def name(self) -> str:
        """What ``--match`` looks in."""
        return f"{self.kind}/{self.seed}/{'pairs/' * self.pairs}{self.method}"


def methods(tasks: Sequence[str]) -> Iterator[tuple[str, Groups]]:
    """Yield every method with what it merges, and the means that all are held against.

    ``linear`` adds all changes up. Its paper chooses a scale on held-out examples; 0.4 is what the
    paper of ``ties`` takes where there are none.
    """
    together = (tuple(tasks),)
    for name, method in METHODS.items():
        if method.most is None:
            yield name, together
        if name == "linear":
            yield "linear:scale=0.4", together
            yield f"linear:scale={1 / len(tasks):g}", together
    pairs = tuple(zip(tasks, [*tasks[1:], tasks[0]], strict=True))
    yield from ((name, pairs) for name, method in METHODS.items() if method.most == 2)
    yield "linear:scale=0.5", pairs


def cells(seeds: int) -> Iterator[Cell]:
    """Yield all cells."""
    for seed in range(seeds):
        for kind in KINDS:
            for method, groups in methods(list(TASKS)):
                yield Cell(kind, seed, method, groups)


def matched(known: Sequence[Cell], texts: Sequence[str]) -> list[Cell]:
    """Return the cells whose name contains one of the texts, all of them where there are none.

    A text in no name ends the process with exit code 2 and the names on stderr.
    """
    for text in texts:
        if not any(text in one.name for one in known):
            names = "; ".join(one.name for one in known)
            print(f"--match: no such case: {text!r}, expected a part of {names}", file=sys.stderr)
            raise SystemExit(2)
    return [one for one in known if not texts or any(text in one.name for text in texts)]


@dataclass(frozen=True)
class Call:
    """A function of `merging_tasks_network`, its arguments, and what is written beside its result.

    Attributes
    ----------
    known : dict
        With the ``cell``.
    function : callable
    arguments : tuple
        Those after the place.
    """

    known: Line
    function: Callable[..., Line]
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        return str(self.known["cell"])


@dataclass
class Runner:
    """Runs calls in processes, and keeps what they return.

    Attributes
    ----------
    place : Place
    journal : Journal
    jobs : int
        Processes.
    failed : int
        Calls that failed so far; the others went on.
    """

    place: Place
    journal: Journal
    jobs: int
    failed: int = 0

    @property
    def lines(self) -> dict[str, Line]:
        """What was measured, by cell; lines of other settings are left aside."""
        setting = self.place.setting
        return {one["cell"]: one for one in self.journal.lines if one["setting"] == setting}

    def run(self, calls: Sequence[Call]) -> None:
        """Run calls, and add what they return to the journal."""
        self.failed += work_off(
            calls, self._do, self.journal, jobs=self.jobs, threads=self.place.threads
        )

    def _do(self, call: Call) -> list[Line]:
        found = call.function(self.place, *call.arguments)
        return [{**call.known, "setting": self.place.setting, **found}]


def run(runner: Runner, wanted: Sequence[Cell]) -> None:
    """Run what is missing."""
    place, tasks, done = runner.place, list(TASKS), runner.lines
    units = dict.fromkeys((one.kind, one.seed) for one in wanted)
    untrained = [
        (*unit, task)
        for unit in units
        for task in tasks
        if _tune_name(*unit, task) not in done or not place.tuned(*unit, task).exists()
    ]
    stale = {(kind, seed) for kind, seed, _ in untrained}
    missing = [one for one in wanted if one.name not in done or (one.kind, one.seed) in stale]
    if not missing:
        return
    if not place.base.exists():
        work.write_base(HOME / NETWORK, place.base)
    # In every run: pictures and heads may be gone where what was measured is still there.
    runner.run(
        [Call({"cell": f"base/{one}", "row": "base"}, work.prepare, (one,)) for one in tasks]
    )
    rates = _rates(runner, list(dict.fromkeys(kind for kind, _, _ in untrained)))
    runner.run([_tuning(*one, rates[one[0]], tasks) for one in untrained])
    runner.run([_merging(one) for one in missing])


def _rates(runner: Runner, kinds: Sequence[str]) -> Mapping[str, float]:
    """Return the rate of each kind: the one given, or the best in the mean over the tasks."""
    given, done = dict(runner.place.rates), runner.lines
    asked = [kind for kind in kinds if kind not in given]
    trials = [
        (kind, rate, task)
        for kind in asked
        for rate in RATES[kind]
        for task in TASKS
        if _trial_name(kind, rate, task) not in done
    ]
    runner.run(
        [Call({"cell": _trial_name(*one), "row": "rate"}, work.try_rate, one) for one in trials]
    )
    done = runner.lines

    def mean(kind: str, rate: float) -> float:
        lines = [done[_trial_name(kind, rate, task)] for task in TASKS]
        return statistics.fmean(value for one in lines for value in one["accuracy"].values())

    return given | {kind: max(RATES[kind], key=partial(mean, kind)) for kind in asked}


def _tuning(kind: str, seed: int, task: str, rate: float, tasks: Sequence[str]) -> Call:
    known = {"cell": _tune_name(kind, seed, task), "kind": kind, "seed": seed, "rate": rate}
    return Call({**known, "row": "fine-tune"}, work.fine_tune, (kind, seed, task, rate, tasks))


def _merging(cell: Cell) -> Call:
    known = {"cell": cell.name, "kind": cell.kind, "seed": cell.seed, "pairs": cell.pairs}
    arguments = (cell.kind, cell.seed, cell.method, cell.groups)
    return Call({**known, "row": cell.method}, work.merge, arguments)


def _trial_name(kind: str, rate: float, task: str) -> str:
    return f"rate/{kind}/{rate:g}/{task}"


def _tune_name(kind: str, seed: int, task: str) -> str:
    return f"{kind}/{seed}/fine-tune/{task}"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--match", nargs="*", default=[], help="merges whose name contains one")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--steps", type=int, default=200, help="of each fine-tuning")
    parser.add_argument("--size", type=int, default=96, help="pixels of a picture")
    parser.add_argument("--images", type=int, help="pictures a class, at most; all by default")
    parser.add_argument(
        "--rate",
        nargs="*",
        default=[],
        metavar="KIND=RATE",
        help="such as full=1e-4; by default chosen on training pictures that are held out",
    )
    parser.add_argument("--results", type=Path, help="folder of what is measured; WORK by default")
    parser.add_argument("--table", action="store_true", help="run nothing")
    asked = parser.parse_args()
    if asked.device != "cpu" and not asked.table:
        import torch

        there = torch.cuda.is_available()
        if asked.device == "cuda" and not there:
            parser.error("--device cuda: no GPU is available. Use --device cpu")
        asked.device = "cuda" if there else "cpu"
    if not asked.table and not (HOME / NETWORK).exists():
        parser.error(f"{HOME / NETWORK}: no such file, expected torchvision's MobileNetV2")
    return asked


def _given_rates(texts: Sequence[str]) -> tuple[tuple[str, float], ...]:
    found = {}
    for text in texts:
        kind, _, rate = text.partition("=")
        try:
            found[chosen([kind], KINDS)[0]] = float(rate)
        except ValueError:
            print(f"--rate: {text!r}, expected such as full=1e-4", file=sys.stderr)
            raise SystemExit(2) from None
    return tuple(sorted(found.items()))


def main() -> int:
    """Run what is missing, write table and picture, and print the table."""
    asked = parse_arguments()
    wanted = matched(list(cells(asked.seeds)), asked.match)
    results = asked.results or asked.work
    for folder in (asked.work, results):
        folder.mkdir(parents=True, exist_ok=True)
    place = Place(
        data=asked.data.resolve(),
        work=asked.work.resolve(),
        device=asked.device,
        steps=asked.steps,
        size=asked.size,
        images=asked.images,
        rates=_given_rates(asked.rate),
        threads=max(1, work.processors() // asked.jobs),
    )
    runner = Runner(place, Journal(results / "runs.jsonl"), asked.jobs)
    if not asked.table:
        run(runner, wanted)
    lines = list(runner.lines.values())
    text = table(lines, list(TASKS))
    print(text)
    (results / "merging-tasks.md").write_text(text + "\n", encoding="utf-8")
    draw(lines, list(TASKS), results / "merging-tasks.svg")
    return 1 if runner.failed else 0


if __name__ == "__main__":
    sys.exit(main())
