"""The few-shot segmentation experiments of docs/results.md: run what is missing, print the tables.

Each experiment is a handful of ``svftool finetune`` commands, printed as they start. A command that
has finished is not run again; one that was cut short goes on, and until then its finished runs
count.

    python benchmarks/few_shot_findings.py DATA WORK             all that is missing, then tables
    python benchmarks/few_shot_findings.py DATA WORK --jobs 2    two commands at a time
    python benchmarks/few_shot_findings.py DATA WORK --match main/full
    python benchmarks/few_shot_findings.py DATA WORK --table     only the tables
    python benchmarks/few_shot_findings.py DATA WORK --list      only the commands

DATA holds ``models.py``, ``checkpoints/resnet18_to_layer3.safetensors`` and ``images/voc20_pairs``.
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
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svftool.training.summary import interval

FOLDS = range(4)
COMMON = (
    "--model DATA/models.py:resnet18_to_layer3 --data DATA/images/voc20_pairs "
    "--task few-shot-segmentation --batch-size 4 --select-on last"
)
CHOSEN = "--image-size 129 --output-stride 16 --steps 300"
TESTED = "--test-shots 5 --test-episodes 500 --swap-supports"
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
    """

    experiment: str
    name: str
    seed: int
    options: str

    @property
    def folder(self) -> str:
        """Name of its output."""
        return f"{self.experiment}/{self.name}-seed{self.seed}"

    def arguments(self, data: Path, work: Path) -> list[str]:
        """Give the words after ``svftool``."""
        text = f"{COMMON} {self.options} --seed {self.seed}".replace("DATA", str(data))
        output = [str(work / "factors"), "-o", str(work / self.folder), "--resume", "-q"]
        return ["finetune", *output, *shlex.split(text)]


def main_commands(seed: int, count: int, *regimes: str) -> list[Command]:
    """Regimes on four folds and some seeds, in halves for two processes."""
    return [
        Command(
            "main",
            f"{regime.replace(',', '-')}-folds{folds[0]}{folds[2]}",
            seed,
            f"--regime {regime} --fold {folds} --seeds {count} {CHOSEN} {TESTED}",
        )
        for regime in regimes
        for folds in ("0,1", "2,3")
    ]


def host_commands(regime: str) -> list[Command]:
    """PFENet and BAM on the first fold."""
    options = f"--regime {regime} --fold 0 {CHOSEN} {TESTED}"
    return [
        Command(host, f"{regime.replace(',', '-')}-fold0", 0, f"--host {host} {options}")
        for host in ("pfenet", "bam")
    ]


def start_commands() -> list[Command]:
    """Train the baseline as published, without its start, on the first fold."""
    options = f"--regime head,svf --fold 0 {CHOSEN} {TESTED}"
    return [Command("blank", "head-svf-fold0", 0, f"--start blank {options}")]


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
    "default": "--regime head,svf,bias,lora:8,full",
    "svf-rate5": "--regime svf --lr 1e-2",
    "svf-rate15": "--regime svf --lr 3e-2",
    "full-rate5": "--regime full --lr 1e-4",
    "full-rate15": "--regime full --lr 3e-4",
    "bias-lora-rate5": "--regime bias,lora:8 --lr 5e-3",
    "bias-lora-rate15": "--regime bias,lora:8 --lr 1.5e-2",
    "layer3": "--regime svf --train-layers layer3*",
    "absolute": "--regime svf --parametrisation absolute --lr 1.5e-3",
    "decay": "--regime svf --decay 10",
    "head-first": "--regime svf,full --head-first 100",
}
"""What is compared on base classes alone: the default rates, 5 and 15 times those, and ways."""


def setting_commands() -> list[Command]:
    """Vary how each regime is trained: a fold's classes stand in for novel ones."""
    common = f"{CHOSEN} --test-shots 5 --test-episodes 300"
    return [
        Command(
            "settings",
            f"{name}-fold{fold}inner{inner}",
            0,
            f"{options} --fold {fold} --inner-fold {inner} {common}",
        )
        for name, options in SETTINGS.items()
        for fold, inner in ((0, 1), (2, 3))
    ]


def all_commands(seeds: int) -> list[Command]:
    """Give every command, in an order in which small tables are complete early."""
    others = seeds - 1
    return [
        *main_commands(0, 1, "head,svf", "full"),
        *host_commands("head,svf"),
        *start_commands(),
        *choice_commands(),
        *(main_commands(1, others, "head,svf") if seeds > 1 else ()),
        *setting_commands(),
        *(each for seed in range(seeds) for each in main_commands(seed, 1, "bias")),
        *(main_commands(1, others, "full") if seeds > 1 else ()),
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
    """Read every finished run of the commands."""
    found = []
    for command in commands:
        path = work / command.folder / "results.json"
        if path.exists():
            runs = json.loads(path.read_text())["runs"]
            found += [run for run in runs if run["ending"] == "finished"]
    return found


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Make an experiment's table: scores by fold, their mean, and how much that is above head."""
    if not runs:
        return "nothing has finished yet"
    folds = sorted({run["fold"] for run in runs})
    wanted = [name for name in METRICS if name in runs[0]["metrics"]["after"]]
    lines = []
    for metric in wanted:
        names = [f"fold {fold}" for fold in folds]
        lines.append(f"\n| {metric} | {' | '.join(names)} | mean | above head | runs |")
        lines.append("|---" * (len(folds) + 4) + "|")
        lines.append(_line("before training", _scores(runs, metric, "before"), {}, folds))
        reference = _scores([run for run in runs if run["regime"] == "head"], metric)
        for row in dict.fromkeys(run["regime"] for run in runs):
            scores = _scores([run for run in runs if run["regime"] == row], metric)
            lines.append(_line(row, scores, {} if row == "head" else reference, folds))
    return "\n".join(lines)


Scores = dict[tuple[int, int], float]
"""A metric in percent by (seed, fold)."""


def _scores(runs: Iterable[dict[str, Any]], metric: str, when: str = "after") -> Scores:
    return {
        (run["seed"], run["fold"]): 100 * run["metrics"][when][metric]
        for run in runs
        if run["metrics"][when].get(metric) is not None
    }


def _line(row: str, scores: Scores, reference: Scores, folds: Sequence[int]) -> str:
    cells = [_mean([v for (_, f), v in scores.items() if f == fold]) for fold in folds]
    whole = _by_seed(scores, folds)
    above = {key: value - reference[key] for key, value in scores.items() if key in reference}
    cells += [_interval(whole), _interval(_by_seed(above, folds), signed=True), str(len(scores))]
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
    if not (work / "factors").is_dir():
        base = data / "checkpoints" / "resnet18_to_layer3.safetensors"
        words = ["decompose", str(base), "-o", str(work / "factors"), "-q"]
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
        of_it = [c for c in commands if c.experiment == experiment]
        for name in dict.fromkeys("" if experiment == "main" else c.name for c in of_it):
            if name:
                print(f"\n{name}")
            print(table(results([c for c in of_it if name in ("", c.name)], work)))


if __name__ == "__main__":
    main()
