"""Share jobs out over processes by cost."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from svftool.engine.run import Job


def cost(job: Job) -> float:
    """Estimate the operations of a decomposition: a Gram matrix, its eigenvectors, the long side.

    Examples
    --------
    >>> cost(Job("w", (2, 10))) == cost(Job("w", (10, 2))) == 192.0
    True
    """
    *batch, m, n = job.matrix
    short, long = sorted((m, n))
    return (batch[0] if batch else 1) * (3.0 * long * short**2 + 9.0 * short**3)


def share(jobs: Sequence[Job], count: int) -> list[list[Job]]:
    """Share jobs out: the longest first, each to the process with the least to do.

    Parameters
    ----------
    jobs : sequence of Job
        Any order; ties are broken by it.
    count : int
        Number of processes.

    Returns
    -------
    list of list of Job
        One list a process, longest job first; the same on every machine.

    Examples
    --------
    >>> jobs = [Job("small", (4, 4)), Job("large", (9, 9)), Job("middle", (6, 6))]
    >>> [[job.name for job in part] for part in share(jobs, 2)]
    [['large'], ['middle', 'small']]
    """
    loads = [(0.0, number) for number in range(count)]
    shares: list[list[Job]] = [[] for _ in range(count)]
    for job in sorted(jobs, key=cost, reverse=True):
        load, number = heapq.heappop(loads)
        shares[number].append(job)
        heapq.heappush(loads, (load + cost(job), number))
    return shares
