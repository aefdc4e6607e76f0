"""The few-shot segmentation experiments of docs/results.md: run what is missing, print the tables.

Each experiment is a handful of ``svftool finetune`` commands, printed as they start. A command that
has finished is not run again; one that was cut short goes on, and until then its finished runs
count.

    python benchmarks/few_shot_findings.py DATA WORK             all that is missing, then tables
    python benchmarks/few_shot_findings.py DATA WORK --jobs 2    two commands at a time
    python benchmarks/few_shot_findings.py DATA WORK --match main/full
    python benchmarks/few_shot_findings.py DATA WORK --table     only the tables
    python benchmarks/few_shot_findings.py DATA WORK --list      only the commands

DATA holds ``models.py``, ``images/voc20_pairs`` and, in ``checkpoints``, the files of `BACKBONES`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svftool.training.results import interval

FOLDS = ("0,1", "2,3")
"""Halves of the folds, for two processes."""

RESNET, MOBILENET = "resnet18_to_layer3", "mobilenet_v2_035"
BACKBONES = {
    RESNET: "resnet18_to_layer3.safetensors",
    MOBILENET: "mobilenet_v2_035_features.safetensors",
}
"""Checkpoints by their function in models.py."""

COMMON = "--task few-shot-segmentation --batch-size 4 --select-on last"
CHOSEN = "--image-size 129 --output-stride 16 --steps 300"
TESTED = "--test-shots 5 --swap-supports"
METRICS = ("miou", "miou_5shot", "swapped_miou", "fb_iou", "base_miou", "base_miou_5shot")


@dataclass(frozen=True)
class Command:
    """One call of ``svftool finetune``.

    Attributes
    ----------
    experiment : str
        Which table it belongs to.
    name : str
        What tells it from the others of its experiment and seed.
    seed : int
        First seed of its runs.
    options : str
        Options of its own.
    row : str
        Row of its runs in the table.
    backbone : str
        One of `BACKBONES`.
    """

    experiment: str
    name: str
    seed: int
    options: str
    row: str = "{regime}"
    backbone: str = RESNET

    @property
    def folder(self) -> str:
        """Name of its output."""
        return f"{self.experiment}/{self.name}-seed{self.seed}"

    def arguments(self, data: Path, work: Path) -> list[str]:
        """Return the words after ``svftool``."""
        where = f"--model {data}/models.py:{self.backbone} --data {data}/images/voc20_pairs"
        words = shlex.split(f"{where} {COMMON} {self.options} --seed {self.seed}")
        factors = work / f"factors-{self.backbone}"
        return ["finetune", str(factors), "-o", str(work / self.folder), "--resume", "-q", *words]


BEST_SVF = "--regime svf --lr 1e-2"
"""The rate that did best on base classes, of 1, 5 and 15 times the default of each regime."""

REGIMES = {
    "head": "--regime head",
    "svf": BEST_SVF,
    "svf at 2e-3": "--regime svf",
    "lora:8": "--regime lora:8",
    "bias": "--regime bias",
    "full": "--regime full",
}


def by_folds(
    experiment: str, rows: Mapping[str, str], seed: int, common: str, backbone: str = RESNET
) -> list[Command]:
    """Return a command for each row and half of the folds."""
    return [
        Command(
            experiment,
            f"{_slug(row)}-folds{folds[0]}{folds[2]}",
            seed,
            f"{options} --fold {folds} {common}",
            row,
            backbone,
        )
        for row, options in rows.items()
        for folds in FOLDS
    ]


def _slug(row: str) -> str:
    return row.replace(" ", "-").replace(":", "-")


def host_commands() -> list[Command]:
    """PFENet, BAM and the baseline without its start, all as published, on the first fold."""
    rows = {"head": "--regime head", "svf": BEST_SVF, "full": "--regime full"}
    hosts = {"pfenet": "--host pfenet", "bam": "--host bam", "blank": "--start blank"}
    return [
        Command(experiment, name, 0, f"{host} {options} --fold 0 {CHOSEN} {TESTED}", name)
        for experiment, host in hosts.items()
        for name, options in rows.items()
    ]


WITH_NORMS = {
    regime: f"--regime {regime}" for regime in ("head", "svf", "lora:8", "bias", "norm", "full")
}
"""For a backbone whose batch norms are not folded into its convolutions."""

LONGER = {
    "head": "--regime head",
    "svf": "--regime svf",
    "full": "--regime full",
    "full at 1e-4": "--regime full --lr 1e-4",
}


def longer_commands() -> list[Command]:
    """Train three times as long."""
    common = f"{CHOSEN.replace('300', '900')} {TESTED} --test-episodes 500"
    return by_folds("longer", LONGER, 0, common, MOBILENET)


def choice_commands() -> list[Command]:
    """Compare starts of the host on base classes alone."""
    return [
        Command(
            f"inner{inner}",
            start,
            0,
            f"--start {start} --regime head --fold 0 --inner-fold {inner} {CHOSEN} {TESTED}",
        )
        for inner in (1, 2)
        for start in ("blank", "nearest")
    ]


SETTINGS = {
    "default rates": "--regime head,svf,bias,lora:8,full",
    "svf x5": "--regime svf --lr 1e-2",
    "svf x15": "--regime svf --lr 3e-2",
    "full x5": "--regime full --lr 1e-4",
    "full x15": "--regime full --lr 3e-4",
    "bias lora x5": "--regime bias,lora:8 --lr 5e-3",
    "bias lora x15": "--regime bias,lora:8 --lr 1.5e-2",
    "layer3": "--regime svf --train-layers layer3*",
    "absolute": "--regime svf --parametrisation absolute --lr 1.5e-3",
    "decay": "--regime svf --decay 10",
    "head first": "--regime head,svf,full --head-first 100",
    "sgd": "--regime head,svf,full --optimizer sgd",
}
"""What is compared on base classes alone: the default rates, 5 and 15 times those, and ways."""


def setting_commands() -> list[Command]:
    """Vary how each regime is trained: a fold's classes stand in for novel ones."""
    common = f"{CHOSEN} --test-shots 5 --test-episodes 300"
    return [
        Command(
            f"settings-{fold}-{inner}",
            _slug(name),
            0,
            f"{options} --fold {fold} --inner-fold {inner} {common}",
            f"{{regime}}, {name}",
        )
        for name, options in SETTINGS.items()
        for fold, inner in ((0, 1), (2, 3))
    ]


def all_commands(seeds: int) -> list[Command]:
    """Return every command, in an order in which small tables are complete early."""
    common = f"{CHOSEN} {TESTED}"
    return [
        *setting_commands(),
        *(c for seed in range(seeds) for c in by_folds("main", REGIMES, seed, common)),
        *host_commands(),
        *longer_commands(),
        *(
            c
            for seed in range(seeds)
            for c in by_folds("mobilenet", WITH_NORMS, seed, common, MOBILENET)
        ),
        *choice_commands(),
    ]


def run(command: Command, data: Path, work: Path) -> None:
    """Run a command unless it has finished; its messages go to a file beside its output."""
    if finished(work / command.folder):
        return
    words = command.arguments(data, work)
    print("svftool", shlex.join(words), flush=True)
    log = (work / command.folder).with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        subprocess.run(
            [sys.executable, "-m", "svftool", *words], stdout=file, stderr=file, check=False
        )


def finished(folder: Path) -> bool:
    """Tell whether a command's results are all there."""
    results = folder / "results.json"
    return results.exists() and json.loads(results.read_text())["interrupted"] is None


def results(commands: Iterable[Command], work: Path) -> list[dict[str, Any]]:
    """Read the runs of the commands, each with its row of the table."""
    found = []
    for command in commands:
        path = work / command.folder / "results.json"
        if path.exists():
            runs = json.loads(path.read_text())["runs"]
            found += [{**run, "row": command.row.format(regime=run["regime"])} for run in runs]
    return found


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Make an experiment's table: scores by fold, their mean, and how much that is above head."""
    if not runs:
        return "nothing has finished yet"
    folds = sorted({run["fold"] for run in runs})
    lines = []
    for metric in (name for name in METRICS if name in runs[0]["metrics"]["after"]):
        names = " | ".join(f"fold {fold}" for fold in folds)
        lines.append(f"\n| {metric} | {names} | mean | above head | pairs above | runs |")
        lines.append("|---" * (len(folds) + 5) + "|")
        lines.append(_line("nothing trained", _scores(runs, metric, "before"), {}, folds))
        by_row = {
            row: _scores([run for run in runs if run["row"] == row], metric)
            for row in dict.fromkeys(run["row"] for run in runs)
        }
        first, *others = by_row.items()
        lines.append(_line(*first, {}, folds))
        lines += [_line(row, scores, first[1], folds) for row, scores in others]
    return "\n".join(lines)


Scores = dict[tuple[int, int], float]
"""A metric in percent by (seed, fold)."""


def _scores(runs: Iterable[dict[str, Any]], metric: str, when: str = "after") -> Scores:
    return {
        (run["seed"], run["fold"]): 100 * run["metrics"][when][metric]
        for run in runs
        if run["metrics"][when].get(metric) is not None and run["ending"] == "finished"
    }


def _line(row: str, scores: Scores, reference: Scores, folds: Sequence[int]) -> str:
    cells = [_mean([v for (_, f), v in scores.items() if f == fold]) for fold in folds]
    whole = _by_seed(scores, folds)
    above = {key: value - reference[key] for key, value in scores.items() if key in reference}
    pairs = f"{sum(value > 0 for value in above.values())} of {len(above)}" if above else ""
    cells += [_interval(whole), _interval(_by_seed(above, folds), signed=True), pairs]
    cells.append(str(len(scores)) if scores else "diverged")
    return f"| {row} | {' | '.join(cells)} |"


def _by_seed(scores: Scores, folds: Sequence[int]) -> list[float]:
    """Average over the folds of each seed that has all of them."""
    seeds = sorted({seed for seed, _ in scores})
    whole = [[scores.get((seed, fold), math.nan) for fold in folds] for seed in seeds]
    return [statistics.fmean(values) for values in whole if not any(map(math.isnan, values))]


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.1f}" if values else ""


def _interval(values: Sequence[float], *, signed: bool = False) -> str:
    if not values:
        return ""
    mean, bounds = statistics.fmean(values), interval(values)
    text = f"{mean:+.1f}" if signed else f"{mean:.1f}"
    return text if bounds is None else f"{text} ± {(bounds[1] - bounds[0]) / 2:.1f}"


def decompose(data: Path, work: Path) -> None:
    """Make the factors that all commands start from."""
    for backbone, checkpoint in BACKBONES.items():
        factors = work / f"factors-{backbone}"
        if not factors.is_dir():
            words = ["decompose", str(data / "checkpoints" / checkpoint), "-o", str(factors), "-q"]
            subprocess.run([sys.executable, "-m", "svftool", *words], check=True, stdout=sys.stderr)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--match", default="", help="commands whose output's name contains this")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--list", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Run what is missing and print the tables."""
    asked = parse_arguments()
    data, work = asked.data.resolve(), asked.work.resolve()
    commands = [c for c in all_commands(asked.seeds) if asked.match in c.folder]
    if asked.list:
        for command in commands:
            print("svftool", shlex.join(command.arguments(Path("DATA"), Path("WORK"))))
        return
    if not asked.table:
        decompose(data, work)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        with ThreadPoolExecutor(asked.jobs) as threads:
            list(threads.map(lambda command: run(command, data, work), commands))
    for experiment in dict.fromkeys(command.experiment for command in commands):
        print(f"\n{experiment}")
        print(table(results([c for c in commands if c.experiment == experiment], work)))


if __name__ == "__main__":
    main()
