"""What a decomposition of a very large checkpoint takes on many hosts, by simulation.

The layers are shared out by the engine's scheduler and cost model. A host runs as many layers at
a time as its memory holds, longest first; cores without a layer of their own help with the products
of the others (a tridiagonal eigenproblem runs on one core). Reading and writing overlap with the
work, so a host takes the longer of the two. The cost model's seconds are those of one core of the
machine that docs/performance.md describes; --speed says how many times as fast another one is.

    python benchmarks/simulate_scale.py
    python benchmarks/simulate_scale.py --cores 64 --memory 500 --bandwidth 2.0 --rank 64
    python benchmarks/simulate_scale.py --cores 1 --speed 30 --memory 80     a GPU so much faster
    python benchmarks/simulate_scale.py --checkpoint FOLDER --cores 2    to compare with a real run
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from synthetic_checkpoint import SIZES

from svftool.checkpoints import Selection, matrix_shape, open_checkpoint, select
from svftool.engine import Job, RankRule, budget, job_bytes, parse_rank, parts, seconds, share


def llama_70b() -> Iterator[Job]:
    for name, shape in SIZES["70b"].shapes():
        if len(shape) == 2 and "embed" not in name:
            yield Job(name, shape, torch.bfloat16)


def experts_1t() -> Iterator[Job]:
    """Yield a mixture of 384 experts in 60 of 61 layers, hidden 7168: 1.03 trillion parameters."""
    attention = {
        "q_a": (1536, 7168),
        "q_b": (12288, 1536),
        "kv_a": (576, 7168),
        "kv_b": (16384, 512),
        "o": (7168, 8192),
    }
    for layer in range(61):
        for name, shape in attention.items():
            yield Job(f"{layer}.{name}", shape, torch.bfloat16)
        width = 2048 if layer else 18432
        for expert in range(385 if layer else 1):
            yield Job(f"{layer}.{expert}.gate", (width, 7168), torch.bfloat16)
            yield Job(f"{layer}.{expert}.up", (width, 7168), torch.bfloat16)
            yield Job(f"{layer}.{expert}.down", (7168, width), torch.bfloat16)


def of_checkpoint(path: Path) -> Iterator[Job]:
    """Yield what `svftool decompose` takes of a checkpoint."""
    with open_checkpoint(path) as checkpoint:
        chosen, _ = select(checkpoint.infos, Selection(), config=checkpoint.config)
        for one in chosen:
            info = checkpoint.infos[one.name]
            yield Job(one.name, matrix_shape(info.shape, one.view), info.dtype)


def moved_bytes(job: Job, rank: RankRule) -> int:
    """Return the bytes that a layer is read with and its float32 factors are written with."""
    m, n = job.matrix[-2:]
    kept = rank.fixed(m, n) or min(m, n)
    return job.count * (m * n * job.dtype.itemsize + 4 * kept * (m + n + 1))


@dataclass(frozen=True)
class Host:
    """A host, or a GPU: layers at a time at most, speed of one, bytes for layers."""

    cores: int
    speed: float
    memory: int

    def seconds(self, jobs: Sequence[Job], rank: RankRule) -> float:
        """Return when the last of the jobs, longest first, is done."""
        ends: list[tuple[float, int]] = []
        now, free = 0.0, max([self.memory, *(self._bytes(job, rank) for job in jobs)])
        for job in jobs:
            while len(ends) == self.cores or free < self._bytes(job, rank):
                now, released = heapq.heappop(ends)
                free += released
            free -= self._bytes(job, rank)
            alone, shared = parts(job, rank.fixed(*job.matrix[-2:]))
            helped = min(self.cores, max(1.0, self.memory / self._bytes(job, rank)))
            taken = (alone + shared * helped / self.cores) / self.speed
            heapq.heappush(ends, (now + taken, self._bytes(job, rank)))
        return max((end for end, _ in ends), default=0.0)

    def _bytes(self, job: Job, rank: RankRule) -> int:
        return job_bytes(job, rank.fixed(*job.matrix[-2:]))


def duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.3g} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--cores", type=int, default=32, help="layers at a time on a host")
    parser.add_argument("--speed", type=float, default=1.0, help="of a core or GPU")
    parser.add_argument("--bandwidth", type=float, default=1.0, help="of a host's disk, GB/s")
    parser.add_argument("--memory", type=float, help="of a host for layers, GB; else the bound")
    parser.add_argument("--rank", default="full", help="full, a count or a fraction")
    parser.add_argument("--checkpoint", type=Path, help="one at hand instead of the two made up")
    options = parser.parse_args()
    rank = parse_rank(options.rank)
    table = Table(title=f"{options.cores} x {options.speed:g} a host, rank {rank}")
    for heading in ("checkpoint", "layers", "core time", "hosts", "work", "moving", "in all"):
        table.add_column(heading, justify="right")
    cases = {"70 billion": llama_70b(), "1 trillion": experts_1t()}
    if options.checkpoint:
        cases = {options.checkpoint.name: of_checkpoint(options.checkpoint)}
    for name, made in cases.items():
        jobs = list(made)
        alone = sum(seconds(job, rank.fixed(*job.matrix[-2:])) for job in jobs) / options.speed
        memory = int(options.memory * 1e9) if options.memory else budget(jobs)
        host = Host(options.cores, options.speed, memory)
        for hosts in options.hosts:
            shares = share(jobs, hosts)
            work = max(host.seconds(part, rank) for part in shares)
            moving = max(sum(moved_bytes(job, rank) for job in part) for part in shares)
            moving_seconds = moving / (options.bandwidth * 1e9)
            table.add_row(
                name,
                str(len(jobs)),
                duration(alone),
                str(hosts),
                duration(work),
                duration(moving_seconds),
                duration(max(work, moving_seconds)),
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
