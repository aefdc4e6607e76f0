"""Extraction of a LoRA against torch's own ways, and resizing: speed, errors and memory.

    python benchmarks/adapters.py [--side 4096] [--layers 2] [--rank 64] [--rounds 3]
        [--blocks 40] [--width 5120] [--only extract|resize] [--without-full]

Extraction: changes of square layers with a decaying and with a flat spectrum. Every round runs
svftool's truncation, ``torch.linalg.svd`` with the same cut, and ``torch.svd_lowrank(niter=7)``
after one another, so that a busy machine slows all of them. Resizing: an adapter of the shape of
Wan 14B (40 blocks, ten layers each, 5120 wide, feed-forward 13824) from rank 128 to 32.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from svftool.adapters.low_rank import LowRank, Truncated, resized, truncate
from svftool.choices.adapters import parse_adapter_rank
from svftool.numerics import ThreadPool

Product = tuple[Tensor, Tensor]


def layers(side: int, count: int, kind: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        D = torch.randn(side, side, generator=generator) * 1e-3
        if kind == "decaying":  # scaled columns in a turned basis: values fall about as 1/i
            turn = torch.linalg.qr(torch.randn(side, side, generator=generator)).Q
            D = (D / torch.arange(1, side + 1)) @ turn
        found.append(D)
    return found


def ours(D: Tensor, rank: int) -> Product:
    with ThreadPool(torch.get_num_threads() - 1) as pool:
        layer = truncate("x", D, parse_adapter_rank(str(rank)), dtype=torch.float32, pool=pool)
    assert layer.layer is not None
    return layer.layer.B, layer.layer.A


def full(D: Tensor, rank: int) -> Product:
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    root = S[:rank].sqrt()
    return U[:, :rank] * root, root[:, None] * Vh[:rank]


def lowrank(D: Tensor, rank: int) -> Product:
    U, S, V = torch.svd_lowrank(D, q=rank, niter=7)
    return U * S.sqrt(), (V * S.sqrt()).T


WAYS: dict[str, Callable[[Tensor, int], Product]] = {
    "svftool": ours, "linalg.svd": full, "svd_lowrank": lowrank,
}  # fmt: skip


def extraction(
    side: int, count: int, rank: int, rounds: int, ways: dict[str, Callable[[Tensor, int], Product]]
) -> Iterator[str]:
    for way in ways.values():  # libraries are loaded by the first call
        way(torch.randn(1024, 1024), 8)
    for kind in ("decaying", "flat"):
        changes = layers(side, count, kind)
        best = [float(torch.linalg.svdvals(D.double())[rank:].norm()) for D in changes]
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        excess = dict.fromkeys(ways, 0.0)
        for _ in range(rounds):
            for name, way in ways.items():
                started = time.perf_counter()
                found = [way(D, rank) for D in changes]
                seconds[name].append(time.perf_counter() - started)
                for D, (B, A), least in zip(changes, found, best, strict=True):
                    error = float((D.double() - B.double() @ A.double()).norm())
                    excess[name] = max(excess[name], error / least - 1)
        for name in ways:
            ratios = [a / b for a, b in zip(seconds[name], seconds["svftool"], strict=True)]
            yield (
                f"| {kind} | {name} | {statistics.median(seconds[name]):.2f} | "
                f"{statistics.median(ratios):.1f} | {excess[name]:.1e} |"
            )


def resizing(blocks: int, width: int) -> str:
    generator = torch.Generator().manual_seed(0)
    wide = width * 27 // 10
    shapes = [(width, width)] * 8 + [(wide, width), (width, wide)]
    rank, worst, seconds = parse_adapter_rank("32"), 0.0, 0.0
    for at in range(blocks):
        layers = []
        for m, n in shapes:
            B, A = (torch.randn(*two, generator=generator) for two in ((m, 128), (128, n)))
            layers.append(LowRank("x", B.bfloat16(), A.bfloat16()))
        found: dict[int, Truncated] = {}

        def cut(index: int, layer: LowRank, into: dict[int, Truncated] = found) -> None:
            into[index] = resized(layer, rank, dtype=torch.bfloat16)

        # As `convert` does it: a thread for each layer, no product over several.
        with ThreadPool(torch.get_num_threads() - 1) as pool:
            started = time.perf_counter()
            pool.share([partial(cut, index, layer) for index, layer in enumerate(layers)])
            seconds += time.perf_counter() - started
        for index, layer in enumerate(layers if at == 0 else []):
            R, T = (torch.linalg.qr(one.double()).R for one in (layer.B, layer.A.mT))
            S = torch.linalg.svdvals(R @ T.mT)
            worst = max(worst, found[index].error / float(S[32:].norm() / S.norm()) - 1)
        assert all(one.layer is not None and one.layer.rank == 32 for one in found.values())
    return (
        f"{blocks} blocks, {width} wide, rank 128 to 32: {seconds:.1f} s; error above the optimum "
        f"by {worst:.1e} of it at most (bfloat16)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("side", 4096), ("layers", 2), ("rank", 64), ("rounds", 3),
                        ("blocks", 40), ("width", 5120)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--only", choices=("extract", "resize"))
    parser.add_argument("--without-full", action="store_true", help="leave linalg.svd out")
    asked = parser.parse_args()
    left_out = {"linalg.svd"} if asked.without_full else set()
    ways = {name: way for name, way in WAYS.items() if name not in left_out}
    print(f"{torch.get_num_threads()} threads; load before {os.getloadavg()[0]:.1f}")
    if asked.only != "resize":
        print(f"{asked.layers} changes of {asked.side} x {asked.side}, rank {asked.rank}")
        print("| spectrum | way | seconds | times svftool's | error above the optimum |")
        print("|---|---|---|---|---|")
        for row in extraction(asked.side, asked.layers, asked.rank, asked.rounds, ways):
            print(row, flush=True)
    if asked.only != "extract":
        print(resizing(asked.blocks, asked.width))
    print(f"load after {os.getloadavg()[0]:.1f}")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
