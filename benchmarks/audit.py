"""Compare two ResNet-50s: `svftool.audit` against loops over torch.linalg, interleaved.

    python benchmarks/audit.py [--threads N] [--rounds N] [--model NAME]

The first peer decomposes both sides by `torch.linalg.svd` and takes from the factors the svf share,
the best matches of the leading vectors and the drift; the second, for `--fast`, takes
`torch.linalg.svdvals` of both. All four read the files. Medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from svftool import audit


def checkpoints(folder: Path, model: str) -> tuple[Path, Path]:
    import timm

    torch.manual_seed(0)
    base = timm.create_model(model, pretrained=False).state_dict()
    tuned = {
        name: value + 0.02 * value.std() * torch.randn_like(value)
        if value.is_floating_point() and value.ndim > 1
        else value
        for name, value in base.items()
    }
    paths = folder / "base.safetensors", folder / "tuned.safetensors"
    for path, tensors in zip(paths, (base, tuned), strict=True):
        save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return paths


def matrices(path: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(path)
    return {
        name: value.reshape(value.shape[0], -1)
        for name, value in tensors.items()
        if value.is_floating_point() and value.ndim > 1
    }


def by_svd(base: Path, tuned: Path) -> None:
    before, after = matrices(base), matrices(tuned)
    for name, W in before.items():
        D = after[name] - W
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        U2, S2, _ = torch.linalg.svd(after[name], full_matrices=False)
        torch.einsum("mk,mk->k", U, D @ Vh.mT).square().sum() / D.square().sum()
        (U.mT @ U2[:, :10]).abs().amax(0)
        (S2 - S).norm() / S.norm()


def by_svdvals(base: Path, tuned: Path) -> None:
    before, after = matrices(base), matrices(tuned)
    for name, W in before.items():
        S, S2 = torch.linalg.svdvals(W), torch.linalg.svdvals(after[name])
        (S2 - S).norm() / S.norm()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="resnet50")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        base, tuned = checkpoints(Path(folder), options.model)
        ways = {
            "torch.linalg.svd of both": lambda: by_svd(base, tuned),
            "svftool.audit": lambda: audit(base, [tuned], device="cpu"),
            "torch.linalg.svdvals of both": lambda: by_svdvals(base, tuned),
            "svftool.audit, fast": lambda: audit(base, [tuned], fast=True, device="cpu"),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(options.rounds + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                if turn:  # the first round warms up
                    seconds[name].append(time.perf_counter() - start)
    found = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in found.items():
        print(f"{name:30} {median:6.2f} s")
    peers = list(found.values())
    print(f"{options.model}, {options.threads} threads: "
          f"default {peers[0] / peers[1]:.1f}x, fast {peers[2] / peers[3]:.1f}x")  # fmt: skip


if __name__ == "__main__":
    main()
