"""Time and memory of matching the names of two checkpoints, by names and shapes alone.

    python benchmarks/matching.py [--layers 47] [--experts 128]

The fine-tune holds the base's experts under another prefix: 18,048 tensors by default.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch

from svftool.auditing import match_names
from svftool.checkpoints import TensorInfo


def experts(prefix: str, layers: int, count: int) -> dict[str, TensorInfo]:
    """Name the tensors of a mixture of experts."""
    shapes = {"w1": (64, 32), "w2": (32, 64), "w3": (64, 32)}
    names = (
        (f"{prefix}layers.{layer}.mlp.experts.{expert}.{part}.weight", shape)
        for layer in range(layers)
        for expert in range(count)
        for part, shape in shapes.items()
    )
    return {name: TensorInfo(name, torch.bfloat16, shape, "") for name, shape in names}


def peak() -> float:
    """Return the most memory that the process ever held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Match once and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=47)
    parser.add_argument("--experts", type=int, default=128)
    chosen = parser.parse_args()
    base, tuned = (
        experts(prefix, chosen.layers, chosen.experts) for prefix in ("model.", "base.policy.lm.")
    )
    before, start = peak(), time.perf_counter()
    found = match_names(base, tuned)
    seconds = time.perf_counter() - start
    print(
        f"{len(base)} tensors, {len(found.pairs)} pairs: {seconds:.2f} s, "
        f"{peak() - before:.0f} MB more"
    )


if __name__ == "__main__":
    main()
