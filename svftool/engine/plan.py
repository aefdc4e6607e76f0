"""What a decomposition costs, before it is run: time, memory, and who does what."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from svftool.choices.ranks import FULL, RankRule

# Seconds an operation on one core of the machine in docs/performance.md, which does 42 GFLOP/s in
# float64 and 89 in float32. The Gram matrix (m n^2 operations, half of a product) and the product
# for the left vectors (2 m n k in float32) run at nine tenths of that. The eigenproblem and the
# checks are as timed there; docs/scale.md says how far off the whole is.
_LAYER = 1e-3
_GRAM = 2.6e-11
_PRODUCT = 2.5e-11
_VECTORS = 1.8e-10
_VALUES = 1.0e-10
_CHECK = 6e-9

# Bytes a column of the short side: a tile of 1024 rows in float64, with its single-precision copy
# and the work space of LAPACK.
_SCRATCH = 1024 * 20

AHEAD = 2
"""Layers that wait, read or done, beside those at work."""

PROCESS_BYTES = 512 << 20
"""What a process with torch takes before it holds any matrix, and the threads' own buffers."""


@dataclass(frozen=True)
class Job:
    """One layer to decompose.

    Attributes
    ----------
    name : str
        Name of the tensor.
    matrix : tuple of int
        (m, n), or (E, m, n) for a batch.
    dtype : torch.dtype
        Of the tensor as it is read.
    """

    name: str
    matrix: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def count(self) -> int:
        """Number of matrices."""
        return math.prod(self.matrix[:-2])

    @property
    def sides(self) -> tuple[int, int]:
        """Long and short side of one matrix."""
        m, n = self.matrix[-2:]
        return max(m, n), min(m, n)


def seconds(job: Job, rank: int | None = None, *, values_only: bool = False) -> float:
    """Estimate what a layer takes on one core of the machine in ``docs/performance.md``.

    Only the ratios between layers decide anything.

    Parameters
    ----------
    job : Job
    rank : int, optional
        Singular values kept, found the exact way; all of them by default.
    values_only : bool
        Without singular vectors.
    """
    alone, shared = parts(job, rank, values_only=values_only)
    return alone + shared


def parts(job: Job, rank: int | None = None, *, values_only: bool = False) -> tuple[float, float]:
    """Split the estimate of `seconds`.

    Returns
    -------
    alone : float
        What one thread does alone: the eigenproblem in tridiagonal form.
    shared : float
        What idle threads help with: the products.
    """
    long, short = job.sides
    alone = _LAYER + _VALUES * short**3
    shared = _GRAM * long * short**2
    if not values_only:
        kept = short if rank is None else min(rank, short)
        shared += (_VECTORS - _VALUES) * short**2 * kept
        shared += (_PRODUCT * short + _CHECK) * long * kept
    return job.count * alone, job.count * shared


def share(jobs: Iterable[Job], count: int) -> list[list[Job]]:
    """Share layers out by cost: the next longest to the process that has least to do.

    Parameters
    ----------
    jobs : iterable of Job
    count : int
        Number of processes.

    Returns
    -------
    list of list of Job
        For each process its layers, longest first. The result depends on the set of jobs alone,
        not on their order.

    Examples
    --------
    >>> jobs = [Job("small", (64, 64)), Job("large", (900, 900)), Job("middle", (600, 600))]
    >>> [[job.name for job in part] for part in share(jobs, 2)]
    [['large'], ['middle', 'small']]
    """
    shares: list[list[Job]] = [[] for _ in range(count)]
    loads = [(0.0, process) for process in range(count)]
    for job in longest_first(jobs):
        load, process = heapq.heappop(loads)
        shares[process].append(job)
        heapq.heappush(loads, (load + seconds(job), process))
    return shares


def longest_first(jobs: Iterable[Job]) -> list[Job]:
    """Sort layers by falling cost; those of one cost by name."""
    return sorted(jobs, key=lambda job: (-seconds(job), job.name))


def job_bytes(job: Job, rank: int | None = None, *, values_only: bool = False) -> int:
    """Bound the memory that one layer takes from being read until its result is released.

    Parameters
    ----------
    job : Job
    rank : int, optional
        Singular values kept; all of them by default.
    values_only : bool
        Without singular vectors.
    """
    long, short = job.sides
    held = job.count * long * short * job.dtype.itemsize
    if values_only:
        return held + 8 * short**2 + _SCRATCH * short
    kept = short if rank is None else min(rank, short)
    result = 4 * kept * (long + short)
    stages = [20 * short**2, 12 * short**2 + 8 * short * kept, result + 16 * short * kept]
    if kept < short:
        stages.append(4 * long * short + 4 * short**2 + result)
    return held + (job.count - 1) * result + max(stages) + _SCRATCH * short


def budget(jobs: Sequence[Job]) -> int:
    """Return the bytes that a run may hold at once: 512 MiB and 4 times its largest matrix.

    A matrix counts in float64, which is what the last rung of the ladder needs at most.
    """
    largest = max((math.prod(job.sides) for job in jobs), default=0)
    return (512 << 20) + 4 * 8 * largest


def peak_memory(
    jobs: Sequence[Job],
    rank: RankRule = FULL,
    *,
    values_only: bool = False,
    workers: int | None = None,
) -> int:
    """Bound the anonymous memory of a process that runs these layers.

    Parameters
    ----------
    jobs : sequence of Job
    rank : RankRule
        How many singular values are kept.
    values_only : bool
        Without singular vectors.
    workers : int, optional
        Layers at a time; by default the number of torch's threads, as in `run_svds`.

    Returns
    -------
    int
        Bytes: the process itself, and either the largest layers that can be there together, the
        budget, or the one layer that is larger than it.
    """
    places = (workers or torch.get_num_threads()) + AHEAD
    sizes = [job_bytes(job, rank.fixed(*job.matrix[-2:]), values_only=values_only) for job in jobs]
    together = sum(heapq.nlargest(places, sizes))
    return PROCESS_BYTES + max(max(sizes, default=0), min(together, budget(jobs)))
