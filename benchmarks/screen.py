"""Screen a pair of language models: `inspect --screen` against `sha256sum` and the default metrics.

    python benchmarks/screen.py [--megabytes N] [--rounds N] [--change dense|lora] [--default]

Whole processes, warm cache, interleaved: `sha256sum` of both files one after the other,
`svftool inspect A B --screen`, and with `--default` once `svftool inspect A B`. The pair is made
here: bfloat16 matrices in the shapes of an 8-billion-parameter model's blocks (half of each side
where the file is to be small), the fine-tune a dense change of 2 % or updates of rank 16.
The screen's own time is without the start of the process, which is measured by `svftool --version`
with torch imported. Peak memory is that of the process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = (("q", 4096, 4096), ("k", 1024, 4096), ("gate", 14336, 4096), ("down", 4096, 14336))
SMALL = 1 << 30


def largest_of(size: int) -> int:
    """Return the bytes of the largest matrix of a file."""
    part = 2 if size < SMALL else 1
    return max(2 * (m // part) * (n // part) for _, m, n in SHAPES)


def write_pair(folder: Path, size: int, change: str) -> None:
    """Write both sides, in a process of its own: what runs later counts this one's memory."""
    g = torch.Generator().manual_seed(0)
    part = 2 if size < SMALL else 1
    base, tuned, written = {}, {}, 0
    while written < size:
        kind, m, n = SHAPES[len(base) % len(SHAPES)]
        m, n = m // part, n // part
        W = torch.randn(m, n, generator=g) * 0.02
        if change == "lora":
            D = torch.randn(m, 16, generator=g) @ torch.randn(16, n, generator=g)
        else:
            D = torch.randn(m, n, generator=g)
        name = f"layers.{len(base) // len(SHAPES)}.{kind}.weight"
        base[name] = W.bfloat16()
        tuned[name] = (W + 0.02 * W.norm() / D.norm() * D).bfloat16()
        written += 2 * m * n
    for name, tensors in (("base", base), ("tuned", tuned)):
        save_file(tensors, folder / f"{name}.safetensors")


def timed(command: Sequence[object]) -> tuple[float, int]:
    """Run a command; return its seconds and peak bytes."""
    start = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{command[0]} failed")
    return time.perf_counter() - start, usage.ru_maxrss << 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--megabytes", type=int, default=3000, help="of each side")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--change", choices=("dense", "lora"), default="dense")
    parser.add_argument("--default", action="store_true", help="run the default metrics too, once")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    svftool = Path(sys.executable).with_name("svftool")
    with tempfile.TemporaryDirectory() as folder:
        wanted = asked.megabytes * 10**6
        largest = largest_of(wanted)
        made = multiprocessing.get_context("spawn").Process(
            target=write_pair, args=(Path(folder), wanted, asked.change)
        )
        made.start()
        made.join()
        base, tuned = (Path(folder) / f"{name}.safetensors" for name in ("base", "tuned"))
        size = base.stat().st_size + tuned.stat().st_size
        inspect = [svftool, "inspect", base, tuned, "--quiet"]
        commands = {
            "sha256sum": ["sha256sum", base, tuned],
            "screen": [*inspect, "--screen"],
            "start": [sys.executable, "-c", "import svftool.stages.audit"],
        }
        found: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
        for command in commands.values():
            timed(command)
        for _ in range(asked.rounds):
            for name, command in commands.items():
                found[name].append(timed(command))
        seconds = {name: statistics.median(t for t, _ in runs) for name, runs in found.items()}
        peak = max(bytes_ for _, bytes_ in found["screen"])
        if asked.default:
            seconds["default"], _ = timed(inspect)
    row = {
        "bytes": size,
        "largest": largest,
        "change": asked.change,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "of_sha256sum": seconds["screen"] / seconds["sha256sum"],
        "below_default": seconds["default"] / seconds["screen"] if asked.default else None,
        "peak_memory_bytes": peak,
    }
    print(f"screen: {row['of_sha256sum']:.2f} of sha256sum ({size / 1e9:.2f} GB in all)")
    if asked.default:
        print(f"default metrics: {row['below_default']:.1f} times as long as the screen")
    for name, taken in seconds.items():
        print(f"  {name:10} {taken:8.2f} s")
    print(f"  peak memory {peak / 2**20:.0f} MiB, largest matrix {largest / 2**20:.0f} MiB")
    if asked.json is not None:
        asked.json.write_text(json.dumps(row, indent=2), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
