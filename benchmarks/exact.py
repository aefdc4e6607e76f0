"""Exact deltas of bf16 pairs against XOR + zstd: size, packing and unpacking, in turns.

    python benchmarks/exact.py WORK [--layers 8] [--width 2048] [--rounds 3]

Pairs are made: normal weights in bfloat16 and a fine-tune whose change has the given size relative
to the weight. Two others are timed on the same words: plain zstd of the XOR, and the published way
(BitX, arXiv 2505.06252): XOR, the exponent's bytes and the rest as two streams, zstd of each. They
work in memory, by one thread, and check nothing. svftool's figures are of whole calls from file to
file, SHA-256 included.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from svftool.numerics.words import zstd
from svftool.stages.extract_exact import extract_exact
from svftool.stages.restore import restore

Times = tuple[float, float]
Packing = Callable[[np.ndarray], list[bytes]]
Unpacking = Callable[[list[bytes], np.ndarray], np.ndarray]
CHANGES = (0.0005, 0.002, 0.01, 0.05)


def make_pair(folder: Path, layers: int, width: int, change: float) -> tuple[Path, Path, int]:
    """Write a base and its fine-tune; also return the bytes of one side."""
    g = torch.Generator().manual_seed(0)
    base, tuned = {}, {}
    for layer in range(layers):
        W = torch.randn(width, width, generator=g) / width**0.5
        D = torch.randn(width, width, generator=g) / width**0.5
        name = f"layers.{layer}.weight"
        base[name], tuned[name] = W.bfloat16(), (W + change * D).bfloat16()
    paths = folder / f"base-{change}.safetensors", folder / f"tuned-{change}.safetensors"
    for path, state in zip(paths, (base, tuned), strict=True):
        save_file(state, path)
    return *paths, 2 * layers * width * width


def words(path: Path) -> list[np.ndarray]:
    return [one.view(torch.int16).numpy().view("<u2").ravel() for one in load_file(path).values()]


def plain(xor: np.ndarray) -> list[bytes]:
    return [zstd.compress(xor.tobytes())]


def published(xor: np.ndarray) -> list[bytes]:
    exponents = ((xor >> 7) & 255).astype(np.uint8)
    rest = ((xor >> 8) & 128 | xor & 127).astype(np.uint8)
    return [zstd.compress(exponents.tobytes()), zstd.compress(rest.tobytes())]


def plain_back(parts: list[bytes], base: np.ndarray) -> np.ndarray:
    return np.frombuffer(zstd.decompress(parts[0]), "<u2") ^ base


def published_back(parts: list[bytes], base: np.ndarray) -> np.ndarray:
    exponents, rest = (np.frombuffer(zstd.decompress(part), np.uint8) for part in parts)
    wide = rest.astype("<u2")
    return (exponents.astype("<u2") << 7 | (wide & 128) << 8 | wide & 127) ^ base


OTHERS = {"xor + zstd": (plain, plain_back), "published": (published, published_back)}


def timed(work: Callable[[], Any]) -> tuple[Times, Any]:
    """Return the wall's and the processor's seconds; the latter say more on a shared machine."""
    start = time.perf_counter(), time.process_time()
    found = work()
    return (time.perf_counter() - start[0], time.process_time() - start[1]), found


def in_memory(base: Path, tuned: Path, pack: Packing, back: Unpacking) -> tuple[int, Times, Times]:
    old, new = words(base), words(tuned)
    packing, parts = timed(lambda: [pack(a ^ b) for a, b in zip(new, old, strict=True)])
    unpacking, out = timed(lambda: [back(p, b) for p, b in zip(parts, old, strict=True)])
    assert all(map(np.array_equal, out, new))
    return sum(len(one) for part in parts for one in part), packing, unpacking


def round_trip(base: Path, tuned: Path, folder: Path) -> dict[str, tuple[int, Times, Times]]:
    """Pack and unpack once in each way: bytes and the two times."""
    found = {name: in_memory(base, tuned, *ways) for name, ways in OTHERS.items()}
    delta, out = folder / "delta.safetensors", folder / "out.safetensors"
    packing, _ = timed(lambda: extract_exact(base, tuned, output=delta, force=True))
    unpacking, _ = timed(lambda: restore(base, delta, output=out, force=True))
    same = [hashlib.sha256(one.read_bytes()).hexdigest() for one in (tuned, out)]
    assert same[0] == same[1], "not bit for bit"
    found["svftool"] = delta.stat().st_size, packing, unpacking
    return found


def main() -> None:
    """Print a line for each pair and way."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", action="store_true")
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    print("MB/s; in brackets of one second of processor")
    print("change   way             size         packing       unpacking")
    for change in CHANGES:
        base, tuned, size = make_pair(chosen.work, chosen.layers, chosen.width, change)
        rounds = [round_trip(base, tuned, chosen.work) for _ in range(chosen.rounds)]
        for name in rounds[0]:
            bytes_ = rounds[0][name][0]
            speeds = [
                f"{statistics.median(size / one[name][at][clock] / 1e6 for one in rounds):.0f}"
                for at in (1, 2)
                for clock in (0, 1)
            ]
            packing, unpacking = (f"{speeds[at]} ({speeds[at + 1]})" for at in (0, 2))
            print(f"{change:<8} {name:<12} {bytes_ / size:7.2%} {packing:>15} {unpacking:>15}")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")
    if not chosen.keep:
        shutil.rmtree(chosen.work)


if __name__ == "__main__":
    main()
