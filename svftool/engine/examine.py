"""One pass over a checkpoint before the work: its fingerprint, and weights that are not finite."""

from __future__ import annotations

import heapq
import os
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from svftool.checkpoints import Checkpoint, Fingerprint, dtype_name, tensor_digest
from svftool.processes import Processes
from svftool.progress import Progress

THREADS = 4
_PART = 2**22
_PART_BYTES = 2 * _PART


@dataclass(frozen=True)
class Examination:
    """What was found.

    Attributes
    ----------
    fingerprint : str
        Of the whole checkpoint.
    non_finite : dict of str to str
        Checked tensors that hold NaN or infinity, with what they hold.
    """

    fingerprint: str
    non_finite: dict[str, str]


def examination_bytes(source: Checkpoint) -> int:
    """Bound the memory that `examine` takes for tensors: as many as it reads at a time."""
    sizes = heapq.nlargest(_threads(), (info.nbytes for info in source.infos.values()))
    return sum(sizes) + _threads() * _PART_BYTES


def _threads() -> int:
    return min(THREADS, os.cpu_count() or 1)


def examine(
    source: Checkpoint,
    *,
    check_finite: Collection[str],
    processes: Processes,
    progress: Progress,
) -> Examination:
    """Read every tensor once; the processes share them.

    Parameters
    ----------
    source : Checkpoint
        What is examined.
    check_finite : collection of str
        Names of the tensors that must be finite.
    processes : Processes
        This process among those that share the work.
    progress : Progress
        Told how many bytes are done.
    """
    checked = frozenset(check_finite)

    def look(name: str) -> tuple[str, str]:
        tensor = source.read(name)
        return tensor_digest(tensor), _not_finite(tensor) if name in checked else ""

    mine = list(source.infos.values())[processes.rank :: processes.count]
    size = sum(info.nbytes for info in mine)
    with (
        progress.task("examining", size) as task,
        ThreadPoolExecutor(_threads()) as pool,
    ):
        found = {}
        for info, seen in zip(mine, pool.map(look, (one.name for one in mine)), strict=True):
            found[info.name] = seen
            task.advance(info.nbytes, detail=info.name)
    for others in processes.gather(found):
        found |= others
    total = Fingerprint()
    for info in source.infos.values():
        total.add_digest(info.name, dtype_name(info.dtype), info.shape, found[info.name][0])
    bad = {name: found[name][1] for name in source.infos if found[name][1]}
    return Examination(total.hexdigest(), bad)


def _not_finite(tensor: Tensor) -> str:
    nan = infinite = 0
    for part in tensor.reshape(-1).split(_PART):  # type: ignore[no-untyped-call]
        if not bool(torch.isfinite(part).all()):
            nan += int(torch.isnan(part).sum())
            infinite += int(torch.isinf(part).sum())
    parts = [f"{nan} NaN"] * bool(nan) + [f"{infinite} infinite"] * bool(infinite)
    return " and ".join(parts)
