"""Convolutions on a CPU with the channels of each pixel together and apart, in turns.

    python benchmarks/layout.py                       networks of torchvision, random weights
    python benchmarks/layout.py resnet18 vgg11        these
    python benchmarks/layout.py --commands DATA WORK  ``finetune`` on DATA's textures

The first prints a training step of the norms and the head, and a pass without gradients: 8 images
of 160 pixels, medians. The second trains 20 steps of 16 images of each backbone of no_harm.py.
``apart / together`` is how many times as long it takes apart.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar
from unittest import mock

import torch
from names import chosen
from no_harm import BACKBONES, Backbone
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import convert_conv2d_weight_memory_format

from svftool import decompose, finetune
from svftool.choices.training import Settings
from svftool.tasks import classification

T = TypeVar("T")

NETWORKS = (
    "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0",
    "convnext_tiny", "vgg11_bn", "squeezenet1_1", "shufflenet_v2_x1_0", "densenet121",
    "resnext50_32x4d", "regnet_y_400mf",
)  # fmt: skip
LAYOUTS = {"apart": torch.contiguous_format, "together": torch.channels_last}
REGIMES = ("svf", "norm", "lora:8", "full")
NORMS = (nn.BatchNorm2d, nn.LayerNorm)


def networks(names: list[str], rounds: int) -> None:
    """Print a step and a pass of each network in both layouts."""
    print("network | step apart, ms | together, ms | apart / together | pass | apart / together")
    images, labels = torch.randn(8, 3, 160, 160), torch.arange(8)
    for name in names:
        both = {one: _network(name, layout) for one, layout in LAYOUTS.items()}
        steps = _in_turns(both, lambda net: _step(net, images, labels), rounds)
        passes = _in_turns(both, lambda net: _pass(net, images), rounds)
        print(f"{name} | {_row(steps)} | {_row(passes)}", flush=True)


def _network(name: str, layout: torch.memory_format) -> nn.Module:
    import torchvision

    torch.manual_seed(0)
    net: nn.Module = torchvision.models.get_model(name, weights=None)
    convert_conv2d_weight_memory_format(net.requires_grad_(False), layout)
    last = [one for one in net.modules() if isinstance(one, nn.Linear | nn.Conv2d)][-1]
    for module in (last, *(one for one in net.modules() if isinstance(one, NORMS))):
        module.requires_grad_(True)
    return net


def _step(net: nn.Module, images: Tensor, labels: Tensor) -> None:
    cross_entropy(net.train()(images), labels).backward()


@torch.no_grad()
def _pass(net: nn.Module, images: Tensor) -> None:
    net.eval()(images)


def _in_turns(both: dict[str, T], do: Callable[[T], None], rounds: int) -> dict[str, float]:
    """Return the median milliseconds of each, without the first round."""
    taken: dict[str, list[float]] = {one: [] for one in both}
    for _ in range(1 + rounds):
        for one, subject in both.items():
            begun = time.perf_counter()
            do(subject)
            taken[one].append(1e3 * (time.perf_counter() - begun))
    return {one: statistics.median(times[1:]) for one, times in taken.items()}


def commands(data: Path, work: Path, rounds: int) -> None:
    """Print the steps of `finetune` and its whole time in both layouts."""
    print("backbone | regime | step apart, ms | together, ms | apart / together")
    for one in BACKBONES:
        if one.size is None or not one.path(data).exists():
            continue
        factors = work / f"factors-{one.name}"
        if not factors.exists():
            decompose(one.path(data), factors)
        rows: dict[str, dict[str, list[float]]] = {}
        for _ in range(rounds):
            for layout in LAYOUTS:
                with _laid_out(layout):
                    for regime, value in _finetune(one, data, factors).items():
                        rows.setdefault(regime, {}).setdefault(layout, []).append(value)
        for regime, row in rows.items():
            medians = {layout: statistics.median(values) for layout, values in row.items()}
            print(f"{one.name} | {regime} | {_row(medians)}", flush=True)


@contextmanager
def _laid_out(layout: str) -> Iterator[None]:
    """Context in which the task leaves the channels apart, if that is asked for."""
    leave = mock.patch.object(classification, "in_suited_layout", lambda model, forward: forward())
    with leave if layout == "apart" else nullcontext():
        yield


def _finetune(one: Backbone, data: Path, factors: Path) -> dict[str, float]:
    """Train 20 steps with each regime: milliseconds of a step, and of everything."""
    model = f"{data / 'models.py'}{one.model}" if one.model.startswith(":") else one.model
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        result = finetune(
            factors,
            output=Path(place) / "runs",
            model=model,
            data=data / "images" / "dtd10",
            shots=5,
            image_size=one.size,
            augment="none",
            regimes=REGIMES,
            settings=Settings(steps=20, batch_size=16, safeguard="never"),
            device="cpu",
        )
    taken = 1e3 * (time.perf_counter() - begun)
    steps = {run.regime: 1e3 * (run.outcome.step_seconds or 0.0) for run in result.runs}
    return {**steps, "all of it": taken}


def _row(times: dict[str, float]) -> str:
    apart, together = times["apart"], times["together"]
    return f"{apart:.0f} | {together:.0f} | {apart / together:.2f}"


def main() -> None:
    """Read the command line and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("names", nargs="*", help=", ".join(NETWORKS))
    parser.add_argument("--commands", nargs=2, type=Path, metavar=("DATA", "WORK"))
    parser.add_argument("--rounds", type=int)
    asked = parser.parse_args()
    if asked.commands:
        data, work = asked.commands
        commands(data, work, asked.rounds or 3)
    else:
        networks(chosen(asked.names, NETWORKS), asked.rounds or 7)


if __name__ == "__main__":
    main()
