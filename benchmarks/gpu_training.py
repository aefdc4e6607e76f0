"""One optimiser step of each regime on a device."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from training import CASES, REGIMES, Case, Runner, prepare

Row = dict[str, Any]
TURNS = 10

# Images a step: few, where launching kernels sets the time, and more, where the device does.
_FEW, _MANY = 32, 128


def _small_net() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 100)),
    )


def _larger(case: Case, images: int) -> Case:
    """Return the case with another number of images."""
    return replace(
        case,
        batch=lambda: {
            "x": torch.randn(images, 3, 224, 224),
            "y": torch.randint(0, 100, (images,)),
        },
    )


class Steps:
    """A regime that steps, in one precision; milliseconds by the device's own clock."""

    def __init__(self, runner: Runner, device: torch.device, precision: str) -> None:
        self.runner, self.precision, self._device = runner, precision, device
        self.milliseconds: list[float] = []
        self.peak_bytes = 0

    def step(self, *, kept: bool) -> None:
        """Do a step and note how long it took."""
        half = self.precision == "bf16"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=half):
            taken = self._timed()
        if kept:
            self.milliseconds.append(taken)

    def _timed(self) -> float:
        if self._device.type != "cuda":
            start = time.perf_counter()
            self.runner.step()
            return 1e3 * (time.perf_counter() - start)
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        self.runner.step()
        ended.record()
        torch.cuda.synchronize()
        return begun.elapsed_time(ended)


def _ready(case: Case, folder: Path, regime: str, device: torch.device, precision: str) -> Steps:
    """Make a regime; measure what it takes of the device: model, step and optimiser."""
    cuda = device.type == "cuda"
    # Models hold themselves in circles: what is left of the last ones would go at some later time.
    gc.collect()
    before = torch.cuda.memory_allocated() if cuda else 0
    steps = Steps(Runner(case, folder, regime, "default", str(device)), device, precision)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        steps.step(kept=False)
    steps.peak_bytes = torch.cuda.max_memory_allocated() - before if cuda else 0
    return steps


def rows(device: torch.device, quick: bool) -> Iterator[Row]:
    """Yield a row for each model, number of images, precision and regime."""
    if quick:
        yield from _of_model("a small network", Case(_small_net, dict, True), device, {2: ["fp32"]})
        return
    settings = {"vit_b_16": {_FEW: ["fp32", "bf16"], _MANY: ["bf16"]}}
    settings["resnet50"] = {count: ["fp32", "bf16"] for count in (_FEW, _MANY)}
    for name, images in settings.items():
        yield from _of_model(name, CASES[name], device, images)


def _of_model(
    name: str, case: Case, device: torch.device, images: dict[int, list[str]]
) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as cache:
        folder = prepare(name, case, Path(cache))
        for count, precisions in images.items():
            for precision in precisions:
                yield from _timed_turns(
                    name, _larger(case, count), count, folder, device, precision
                )


def _timed_turns(
    name: str, case: Case, images: int, folder: Path, device: torch.device, precision: str
) -> Iterator[Row]:
    """Let the regimes take turns."""
    regimes = REGIMES if images == _FEW else ("svf", "lora:8", "full")
    regimes = regimes if images >= _FEW else ("svf", "full")
    all_steps = {regime: _ready(case, folder, regime, device, precision) for regime in regimes}
    for _ in range(TURNS if images >= _FEW else 1):
        for steps in all_steps.values():
            steps.step(kept=True)
    medians = {regime: statistics.median(one.milliseconds) for regime, one in all_steps.items()}
    for regime, steps in all_steps.items():
        row: Row = {"model": name, "images": images, "precision": precision, "regime": regime}
        row |= {"/ full": medians[regime] / medians["full"]}
        if "lora:8" in medians:
            row["/ lora"] = medians[regime] / medians["lora:8"]
        row["ms a step"] = medians[regime]
        row["spread"] = (max(steps.milliseconds) - min(steps.milliseconds)) / medians[regime]
        if steps.peak_bytes:
            row["peak MB"] = round(steps.peak_bytes / 2**20)
            row["memory / full"] = steps.peak_bytes / all_steps["full"].peak_bytes
        yield row
    del all_steps, steps
    if device.type == "cuda":
        torch.cuda.empty_cache()
