"""One linear layer of ViT-B/16 in a training step of `svf`: ways to scale by the singular values.

    python benchmarks/linear_step.py [--threads N] [--rounds N]

Forward and backward pass of each way, in turns; medians, as shares of the four bare products that
the factored way is made of. *factor*: the left factor is scaled once a step, as svftool does where
activations are larger. *activations*: what was projected is scaled instead. *in place*: as before,
in the product's own memory. *split in three*: a packed attention weight as three matrices with
factors of their own. *composed*: the weight is formed, and its gradient projected. *dense*: the
layer with its weight trained, as in `full`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

POSITIONS = 8 * 197
LAYERS = {
    "attention, packed": (2304, 768),
    "attention, output": (768, 768),
    "MLP, first": (3072, 768),
    "MLP, second": (768, 3072),
}


def ways(m: int, n: int) -> dict[str, Callable[[], object]]:
    """Return the ways to run one layer, on the same random numbers."""
    g = torch.Generator().manual_seed(0)
    W = torch.randn(m, n, generator=g) * 0.02
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    x = torch.randn(POSITIONS, n, generator=g)
    dy = torch.randn(POSITIONS, m, generator=g)
    thirds = [torch.linalg.svd(part, full_matrices=False) for part in W.split(m // 3)]

    def bare() -> object:
        z = x @ Vh.mT
        dz = dy @ U
        return z @ U.mT, dz @ Vh

    def factor() -> object:
        return _factored(x, dy, U, s, Vh)

    def activations() -> object:
        z = x @ Vh.mT
        y = (z * s) @ U.mT
        dz = dy @ U
        return y, (dz * s) @ Vh, (dz * z).sum(0)

    def in_place() -> object:
        z = x @ Vh.mT
        y = (z * s) @ U.mT
        dz = dy @ U
        ds = torch.einsum("nk,nk->k", dz, z)
        return y, dz.mul_(s) @ Vh, ds

    def split() -> object:
        parts = zip(dy.split(m // 3, dim=1), thirds, strict=True)
        return [_factored(x, part, *factors) for part, factors in parts]

    def composed() -> object:
        weight = (U * s) @ Vh
        y = x @ weight.mT
        gradient = dy.mT @ x
        return y, dy @ weight, ((U.mT @ gradient) * Vh).sum(1)

    def dense() -> object:
        return x @ W.mT, dy @ W, dy.mT @ x

    found = {
        "bare": bare,
        "factor": factor,
        "activations": activations,
        "in place": in_place,
        "composed": composed,
        "dense": dense,
    }
    return {**found, "split in three": split} if m == 2304 else found


def _factored(x: Tensor, dy: Tensor, U: Tensor, s: Tensor, Vh: Tensor) -> tuple[Tensor, ...]:
    z = x @ Vh.mT
    y = z @ (U * s).mT
    dz = dy @ U
    return y, dz @ (s[:, None] * Vh), (dz * z).sum(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    for layer, (m, n) in LAYERS.items():
        known = ways(m, n)
        taken: dict[str, list[float]] = {name: [] for name in known}
        for turn in range(asked.rounds + 1):
            for name, run in known.items():
                start = time.perf_counter()
                run()
                if turn:
                    taken[name].append(time.perf_counter() - start)
        seconds = {name: statistics.median(times) for name, times in taken.items()}
        print(f"{layer}, {m} x {n}: bare products {1e3 * seconds['bare']:.1f} ms")
        for name, one in seconds.items():
            if name != "bare":
                print(f"  {name:15} {one / seconds['bare']:.2f}")


if __name__ == "__main__":
    main()
