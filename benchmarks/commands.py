"""Whole commands on one checkpoint, beside what they cannot do without.

    python benchmarks/commands.py CHECKPOINT [--threads N] [--rounds N] [--work FOLDER]

Decomposes the checkpoint once, changes every singular value by some 5 %, and then times in turns:
`merge`, `inspect` with the default metrics, with `--fast` and with `--screen`, `sha256sum` of both
files, the start of Python with torch, and, as a function, the products ``U diag(S) Vh`` in float64
that `merge` consists of. Embeddings stay whole. Medians, and the peak memory of each process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from svftool.factors import open_factors, write_tuned

TORCH = [sys.executable, "-c", "import torch"]
SVFTOOL = [sys.executable, "-m", "svftool"]


def prepare(checkpoint: Path, folder: Path) -> None:
    """Write factors and a tuned file, where they are not there yet."""
    factors, tuned = folder / "factors", folder / "tuned.safetensors"
    if not factors.exists():
        run([*SVFTOOL, "decompose", checkpoint, "-o", factors, "--exclude", "*embed*", "--quiet"])
    if not tuned.exists():
        g = torch.Generator().manual_seed(0)
        store = open_factors(factors)
        values = {name: store.read_S(name) for name in store.layers}
        changed = {
            name: S * (1.0 + 0.05 * torch.randn(S.shape, generator=g)) for name, S in values.items()
        }
        write_tuned(tuned, store=store, S=changed)


def run(command: Sequence[object]) -> tuple[float, int]:
    """Run a command; return its seconds and peak bytes."""
    start = time.perf_counter()
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: exit code {process.returncode}")
    return time.perf_counter() - start, used.ru_maxrss << 10


def products(factors: Path) -> float:
    """Multiply the factors of every layer, read beforehand, in float64."""
    store, seconds = open_factors(factors), 0.0
    for name in store.layers:
        layer = store.read(name)
        left, right = layer.U.double() * layer.S.double(), layer.Vh.double()
        start = time.perf_counter()
        left @ right
        seconds += time.perf_counter() - start
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="keeps factors and results for the next call")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    os.environ["OMP_NUM_THREADS"] = str(asked.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.work or Path(temporary)
        folder.mkdir(exist_ok=True)
        prepare(asked.checkpoint, folder)
        merged = folder / "merged.safetensors"
        factors, tuned = folder / "factors", folder / "tuned.safetensors"
        merge = [*SVFTOOL, "merge", factors, tuned, "-o", merged, "--force", "--quiet"]
        inspect = [*SVFTOOL, "inspect", asked.checkpoint, merged, "--quiet"]
        commands: dict[str, list[object]] = {
            "merge": merge,
            "inspect": inspect,
            "inspect --fast": [*inspect, "--fast"],
            "inspect --screen": [*inspect, "--screen"],
            "sha256sum of both": ["sha256sum", asked.checkpoint, merged],
            "start with torch": list(TORCH),
        }
        found: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
        multiplied = []
        for _ in range(asked.rounds):
            for name, command in commands.items():
                found[name].append(run(command))
            multiplied.append(products(factors))
    for name, runs in found.items():
        seconds = statistics.median(one for one, _ in runs)
        print(f"{name:18} {seconds:7.2f} s {max(peak for _, peak in runs) >> 20:6} MiB")
    print(f"{'products of merge':18} {statistics.median(multiplied):7.2f} s")


if __name__ == "__main__":
    main()
