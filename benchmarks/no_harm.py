"""What training does to its start: backbones, data sets and shots, with the defaults of finetune.

Every cell is one call of ``svftool.finetune`` with the default length, rates and safeguard. Each
run is a line of WORK/runs.jsonl; what is there is not run again. The documentation's are in
``docs/experiments/no-harm.jsonl``.

    python benchmarks/no_harm.py DATA WORK --seeds 2             all that is missing, then the table
    python benchmarks/no_harm.py DATA WORK --match minilm        cells whose name contains this
    python benchmarks/no_harm.py DATA WORK --safeguard never     the same without the safeguard
    python benchmarks/no_harm.py DATA WORK --jobs 16 --device cuda --minutes 9
    python benchmarks/no_harm.py DATA WORK --table               only the table

DATA holds ``models.py``, ``checkpoints``, ``images`` and ``text``. Models of packages are sought in
``$SVFTOOL_MODELS``, by default ``~/.cache/svftool-models``; cells of absent ones are left out.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from units import Journal, Line, apart, work_off

from svftool import decompose, finetune
from svftool.choices.training import Settings
from svftool.training.results import interval

SHOTS = (1, 5, 10)
HOME = Path(os.environ.get("SVFTOOL_MODELS") or Path.home() / ".cache" / "svftool-models")


@dataclass(frozen=True)
class Backbone:
    """A checkpoint with its model and the size of its images.

    Attributes
    ----------
    name : str
        In the table.
    checkpoint : str
        Below DATA, or below the folder of models if it begins with ``~``.
    model : str
        The value of ``--model``; a function of DATA's models.py if it begins with a colon.
    size : int or None
        Pixels of an image; None for a model of texts.
    """

    name: str
    checkpoint: str
    model: str
    size: int | None

    def path(self, data: Path) -> Path:
        """Where the checkpoint is."""
        inner = self.checkpoint
        return HOME / inner[1:] if inner.startswith("~") else data / "checkpoints" / inner


BACKBONES = (
    Backbone("resnet56", "resnet56-4bfd9763.th", ":resnet56", 32),
    Backbone("minilm", "~minilm", "auto", None),
    Backbone("mobilenet035", "mobilenet_v2_035_features.safetensors", ":mobilenet_v2_035", 96),
    Backbone("resnet18", "resnet18_to_layer3.safetensors", ":resnet18_to_layer3", 64),
    Backbone(
        "mobilenet_v2", "~mobilenet_v2/mobilenet_v2-b0353104.pth", "torchvision:mobilenet_v2", 160
    ),
)
IMAGES = {"dtd10": ("dtd10", None), "cifar10": ("cifar10/train", "cifar10/test")}
TEXTS = {"banking77": ("banking77/train.csv", "banking77/test.csv")}


@dataclass(frozen=True)
class Cell:
    """A backbone on some shots of a data set."""

    backbone: Backbone
    data: str
    shots: int

    @property
    def name(self) -> str:
        """What ``--match`` looks in."""
        return f"{self.backbone.name}/{self.data}/{self.shots}"

    def options(self, data: Path) -> dict[str, Any]:
        """Return the arguments of `svftool.finetune` for its data."""
        text = self.backbone.size is None
        folder = data / ("text" if text else "images")
        train, test = (TEXTS if text else IMAGES)[self.data]
        found: dict[str, Any] = {"data": folder / train, "shots": self.shots}
        if test is not None:
            found["evaluation"] = folder / test
        if text:
            return {**found, "task": "text-classification"}
        return {**found, "image_size": self.backbone.size, "augment": "none"}


def cells() -> Iterator[Cell]:
    """Yield all cells, the cheapest backbones first."""
    for backbone in BACKBONES:
        for data in TEXTS if backbone.size is None else IMAGES:
            yield from (Cell(backbone, data, shots) for shots in SHOTS)


@dataclass(frozen=True)
class Unit:
    """Regimes of a cell with one seed."""

    cell: Cell
    seed: int
    regimes: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.cell.name}, seed {self.seed}"


def run(asked: argparse.Namespace, unit: Unit) -> list[Line]:
    """Train and measure."""
    cell, data, work = unit.cell, asked.data.resolve(), asked.work.resolve()
    model = cell.backbone.model
    with TemporaryDirectory(dir=work) as place:
        result = finetune(
            work / f"factors-{cell.backbone.name}",
            output=Path(place) / "runs",
            model=f"{data / 'models.py'}{model}" if model.startswith(":") else model,
            regimes=unit.regimes,
            seeds=[unit.seed],
            settings=Settings(safeguard=asked.safeguard),
            device=asked.device,
            **cell.options(data),
        )
    if result.interrupted is not None:
        raise KeyboardInterrupt
    return [
        {
            "cell": cell.name,
            "safeguard": asked.safeguard,
            "seed": unit.seed,
            "regime": one.regime,
            "before": one.before[result.metric],
            "after": one.after[result.metric],
            "kept": one.kept,
            "share": None if one.safeguard is None else one.safeguard.share,
            "steps": one.outcome.steps,
            "seconds": one.seconds,
        }
        for one in result.runs
    ]


def table(lines: Iterable[Mapping[str, Any]], safeguard: str) -> str:
    """Write a row for every cell: its start, and the gain of each regime with what was kept."""
    groups: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for line in lines:
        if line["safeguard"] == safeguard:
            groups.setdefault(line["cell"], {}).setdefault(line["regime"], []).append(line)
    regimes = list(dict.fromkeys(regime for cell in groups.values() for regime in cell))
    rows = [f"| backbone | data | shots | seeds | start | {' | '.join(regimes)} |"]
    rows.append("|---" * (5 + len(regimes)) + "|")
    for cell in (one.name for one in cells() if one.name in groups):
        found = groups[cell]
        first = next(iter(found.values()))
        start = 100 * statistics.fmean(one["before"] for one in first)
        columns = [_gain(found.get(regime, ())) for regime in regimes]
        name = " | ".join(cell.split("/"))
        rows.append(f"| {name} | {len(first)} | {start:.1f} | {' | '.join(columns)} |")
    return "\n".join(rows)


def _gain(runs: Sequence[Mapping[str, Any]]) -> str:
    if not runs:
        return ""
    gains = [100 * (one["after"] - one["before"]) for one in runs]
    ends = interval(gains)
    text = f"{statistics.fmean(gains):+.1f}"
    text += "" if ends is None else f" ± {(ends[1] - ends[0]) / 2:.1f}"
    kept = sum(one["kept"] == "start" for one in runs)
    return f"{text} (start {kept} of {len(runs)})" if kept else text


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--match", default="", help="cells whose name contains this")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--safeguard", choices=["auto", "never"], default="auto")
    parser.add_argument("--regime", default="head,svf", help="comma-separated")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--table", action="store_true")
    return parser.parse_args()


def missing(asked: argparse.Namespace, lines: Iterable[Line], cells: Sequence[Cell]) -> list[Unit]:
    """Return what was not run yet, a seed of all cells after the other."""
    done = {(one["cell"], one["seed"], one["safeguard"], one["regime"]) for one in lines}
    found = []
    for seed in range(asked.seeds):
        for cell in cells:
            regimes = tuple(
                regime
                for regime in asked.regime.split(",")
                if (cell.name, seed, asked.safeguard, regime) not in done
            )
            found += [Unit(cell, seed, regimes)] if regimes else []
    return found


def main() -> None:
    """Run what is missing and print the table."""
    asked = parse_arguments()
    journal = Journal(asked.work / "runs.jsonl")
    there = [one for one in cells() if one.backbone.path(asked.data).exists()]
    wanted = [one for one in there if asked.match in one.name]
    if not asked.table:
        for backbone in dict.fromkeys(cell.backbone for cell in wanted):
            factors = asked.work / f"factors-{backbone.name}"
            if not factors.exists():
                apart(decompose, backbone.path(asked.data), factors)
        work_off(
            missing(asked, journal.lines, wanted),
            partial(run, asked),
            journal,
            jobs=asked.jobs,
            minutes=asked.minutes,
        )
    print(table(journal.lines, asked.safeguard))


if __name__ == "__main__":
    main()
