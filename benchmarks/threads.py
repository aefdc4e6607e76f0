"""Processor time of a training step on one thread and on all, by the work of a batch.

    python benchmarks/threads.py

Each network and number of threads runs in a process of its own, without OMP_NUM_THREADS. Prints the
floating-point operations of a batch (16 images, forward) and medians of a step. The limit in
`svftool.training.threads.LEAST_WORK` comes from this table.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import time

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

# Width, pixels a side and number of convolutions.
NETWORKS = (
    (24, 12, 3), (32, 16, 3), (32, 24, 3), (16, 16, 20), (48, 24, 3), (24, 16, 30), (64, 32, 3),
    (32, 24, 40), (64, 56, 3),
)  # fmt: skip
REPEATS, SECONDS, MOST = 5, 0.6, 40


def build(width: int, depth: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def step(model: nn.Module, images: Tensor) -> None:
    model.zero_grad()
    model(images).sum().backward()


def measure(width: int, pixels: int, depth: int, threads: int) -> None:
    torch.set_num_threads(threads)
    model, images = build(width, depth), torch.randn(16, 3, pixels, pixels)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    for _ in range(3):
        step(model, images)
    rows = []
    for _ in range(REPEATS):
        used, begun, count = processor_seconds(), time.perf_counter(), 0
        while count < 5 or (time.perf_counter() - begun < SECONDS and count < MOST):
            step(model, images)
            count += 1
        wall = time.perf_counter() - begun
        rows.append((1e3 * (processor_seconds() - used) / count, 1e3 * wall / count))
    used, wall = (statistics.median(column) for column in zip(*rows, strict=True))
    print(
        f"{counter.get_total_flops() / 1e6:7.0f} M {depth:3} layers {threads} threads "
        f"{used:8.1f} ms of the processor {wall:8.1f} ms",
        flush=True,
    )


def main() -> None:
    if len(sys.argv) > 1:
        measure(*map(int, sys.argv[1:]))
        return
    free = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    for network in NETWORKS:
        for threads in (1, torch.get_num_threads()):
            command = [sys.executable, __file__, *map(str, (*network, threads))]
            subprocess.run(command, env=free, check=True)


if __name__ == "__main__":
    main()
