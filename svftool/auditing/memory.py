"""What comparing a layer takes, before it is read: memory and time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from svftool.engine import Job, seconds

_SPARE = 512 << 20
_AT_ONCE = 4
_SQUARES_OF_ONE = 3
_SQUARES_OF_VALUES = 4
_SQUARES_OF_VECTORS = 11
_VECTORS_COST = 2.0
_VALUES_COST = 2.0


def audit_bytes(
    job: Job, *, compared: bool, vectors: bool, adapters: bool = False, lead: bool = False
) -> int:
    """Bound the memory that one layer takes: weights as stored, and matrices of the short side.

    Parameters
    ----------
    job : Job
    compared : bool
        Whether it is held against fine-tunes, which are read one after another.
    vectors : bool
        Whether singular vectors are computed.
    adapters : bool
        Whether a fine-tune is an adapter, whose change is formed in float64, a matrix at a time.
    lead : bool
        Whether the leading directions of the change are found.
    """
    long, short = job.sides
    held = job.count * long * short * job.dtype.itemsize
    if not compared:
        return held + 8 * _SQUARES_OF_ONE * short**2
    squares = _SQUARES_OF_VECTORS if vectors else _SQUARES_OF_VALUES
    change = 16 * long * short if adapters else 0
    return 2 * held + change + 8 * squares * short**2 + (_lead_bytes(job) if lead else 0)


def _lead_bytes(job: Job) -> int:
    """Bound what base and change of a matrix and the decomposition of the change take."""
    long, short = job.sides
    wide = 8 if job.dtype.itemsize == 8 else 4
    return 3 * wide * long * short + 8 * _SQUARES_OF_ONE * short**2


def audit_budget(jobs: Sequence[Job], size: Callable[[Job], int]) -> int:
    """Return the bytes that all layers at work may take: the largest one's, or four usual ones'.

    Parameters
    ----------
    jobs : sequence of Job
        All that is compared.
    size : callable
        Bytes of one.
    """
    sizes = [size(job) for job in jobs]
    return _SPARE + int(max(max(sizes, default=0), _AT_ONCE * statistics.median(sizes or [0])))


_COLUMNS = 256
"""Columns of float32 that sketches of both sides take, the widest included."""

_CONVERTED = 8 << 20


def screen_bytes(job: Job, *, adapters: bool = False, lead: bool = False) -> int:
    """Bound the memory that screening one layer takes.

    Parameters
    ----------
    job : Job
    adapters : bool
        Whether a fine-tune is an adapter, whose change is formed in float64, a matrix at a time.
    lead : bool
        Whether the leading directions of the change are found.
    """
    long, short = job.sides
    held = 2 * job.count * long * short * job.dtype.itemsize
    change = 16 * long * short if adapters else 0
    spare = _lead_bytes(job) if lead else 0
    return held + change + 4 * _COLUMNS * (long + short) + _CONVERTED + spare


def screen_budget(jobs: Sequence[Job], size: Callable[[Job], int]) -> int:
    """Return the bytes that layers at work may take: both sides of the two largest matrices."""
    return max(_SPARE // 4, 2 * max(map(size, jobs), default=0))


# Seconds an entry on one core of the machine in docs/performance.md.
_SCREENED = 3e-9


def compared_seconds(job: Job, *, vectors: bool = True) -> float:
    """Estimate what comparing a layer takes on one core: as some decompositions of it.

    Parameters
    ----------
    job : Job
    vectors : bool
        With singular vectors.
    """
    return (_VECTORS_COST if vectors else _VALUES_COST) * seconds(job, values_only=not vectors)


def screened_seconds(job: Job) -> float:
    """Estimate what screening a layer takes on one core."""
    return _SCREENED * job.count * math.prod(job.sides) + 1e-3 * job.count
