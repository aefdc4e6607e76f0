"""Training episodes a second of few-shot segmentation: frozen backbone, singular values, full.

All regimes take turns in one process, so that what else the machine does falls on all of them
alike, and the medians are compared, once every picture has been seen. ``head, nothing kept`` runs
the frozen backbone anew in every step. Memory is measured in a process of its own for each
regime: the highest resident size while every picture is trained on once, above what is resident
before. Pictures are noise and weights random; neither changes the cost.

    python benchmarks/few_shot_segmentation.py               ResNet-18 and ResNet-50
    python benchmarks/few_shot_segmentation.py resnet50 --memory
    python benchmarks/few_shot_segmentation.py --quick       does it run
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from names import chosen
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import svftool
from svftool.attaching import apply_regime
from svftool.factors import open_factors
from svftool.few_shot.encoder import SharedOutputs
from svftool.few_shot.task import FewShotSegmentation, few_shot_tasks
from svftool.machine import peak_memory, reset_peak_memory
from svftool.training.loop import training_mode

CLASSES, PICTURES = 4, 8
REGIMES = ("head", "head, nothing kept", "svf", "bias", "norm", "lora:8", "full")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A backbone, the side of its pictures, pixels a feature, and episodes a step."""

    backbone: str
    side: int
    stride: int
    batch: int


CASES = {"resnet18": Case("resnet18", 129, 8, 4), "resnet50": Case("resnet50", 129, 8, 2)}
QUICK = {"resnet18": Case("resnet18", 65, 8, 2)}


class Forgetful(SharedOutputs):
    """Keeps nothing."""

    def __init__(self) -> None:
        super().__init__(capacity=0)


def build(case: Case) -> nn.Module:
    """Make the backbone with the weights that all regimes start from."""
    import torchvision

    torch.manual_seed(0)
    model: nn.Module = getattr(torchvision.models, case.backbone)()
    return model


def write_pictures(folder: Path, case: Case) -> Path:
    """Write classes of noise with masks."""
    random = np.random.default_rng(0)
    for label in range(CLASSES):
        (folder / f"class{label}").mkdir(parents=True)
        for index in range(PICTURES):
            pixels = random.integers(0, 256, (case.side, case.side, 3), dtype=np.uint8)
            mask = np.zeros((case.side, case.side), np.uint8)
            mask[case.side // 4 : case.side // 2, case.side // 4 :] = 255
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{index}.jpg")
            Image.fromarray(mask).save(folder / f"class{label}" / f"{index}.png")
    return folder


class Runner:
    """One regime, ready to step."""

    def __init__(self, case: Case, folder: Path, regime: str) -> None:
        self.case = case
        task = few_shot_tasks(
            folder / "pictures", image_size=case.side, output_stride=case.stride, augment="none"
        )[0]
        if regime.endswith("nothing kept"):
            task = FewShotSegmentation(task.data, options=task.options, outputs=Forgetful())
        self.draw = task.draw(0)
        prepared = self.draw.prepare(build(case))
        with open_factors(folder / "factors") as store:
            trainable = apply_regime(
                prepared.model,
                regime.partition(",")[0],
                store,
                head=prepared.head,
                include=prepared.layers,
            )
        self.model = trainable.model
        training_mode(self.model)
        parameters = [p for group in trainable.groups.values() for p in group]
        self.optimiser = torch.optim.AdamW(parameters, lr=1e-5)
        self.steps = 0

    def step(self) -> float:
        """Do one step and give its seconds."""
        begun = time.perf_counter()
        first = self.steps * self.case.batch
        indices = torch.arange(first, first + self.case.batch) % self.draw.size
        batch = self.draw.batch(indices, torch.Generator().manual_seed(self.steps))
        self.draw.loss(self.model, batch).backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.steps += 1
        return time.perf_counter() - begun

    def see_everything(self) -> None:
        """Step until every picture has been a query."""
        while self.steps * self.case.batch < self.draw.size:
            self.step()


def prepare(case: Case, folder: Path) -> Path:
    """Write pictures, weights and factors."""
    write_pictures(folder / "pictures", case)
    state = {name: value.contiguous() for name, value in build(case).state_dict().items()}
    save_file(state, folder / "base.safetensors", {"format": "pt"})
    svftool.decompose(folder / "base.safetensors", folder / "factors")
    return folder


def measure_memory(case: Case, folder: Path, regime: str) -> float:
    """Return the highest resident size in MB while training, above what is resident before."""
    words = [sys.executable, __file__, "--one", regime, "--folder", str(folder)]
    words += ["--case", json.dumps(vars(case))]
    done = subprocess.run(words, check=True, capture_output=True, text=True, env=dict(os.environ))
    return float(done.stdout)


def one(case: Case, folder: Path, regime: str) -> None:
    """Print the memory of one regime."""
    runner = Runner(case, folder, regime)
    reset_peak_memory(CPU)
    before = peak_memory(CPU) or 0
    runner.see_everything()
    print(((peak_memory(CPU) or 0) - before) / 1e6)


def table(case: Case, folder: Path, rounds: int, memory: bool) -> None:
    """Time all regimes in turns, and print a row for each."""
    runners = {regime: Runner(case, folder, regime) for regime in REGIMES}
    for runner in runners.values():
        runner.see_everything()
    times: dict[str, list[float]] = {regime: [] for regime in REGIMES}
    for _ in range(rounds):
        for regime, runner in runners.items():
            times[regime].append(runner.step())
    print(f"\n{case.backbone}, {case.side} px, {case.batch} episodes a step")
    print("| regime | step, ms | episodes a second | memory, MB |\n|---|---|---|---|")
    for regime, seconds in times.items():
        median = statistics.median(seconds)
        megabytes = f"{measure_memory(case, folder, regime):.0f}" if memory else ""
        row = (regime, f"{1e3 * median:.0f}", f"{case.batch / median:.1f}", megabytes)
        print(f"| {' | '.join(row)} |", flush=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--quick", action="store_true")
    for hidden in ("--one", "--folder", "--case"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.one:
        one(Case(**json.loads(asked.case)), Path(asked.folder), asked.one)
        return
    cases = QUICK if asked.quick else CASES
    for name in chosen(asked.cases, cases):
        with tempfile.TemporaryDirectory() as folder:
            case = cases[name]
            table(
                case, prepare(case, Path(folder)), 2 if asked.quick else asked.rounds, asked.memory
            )


if __name__ == "__main__":
    main()
