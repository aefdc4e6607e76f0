"""One pass over a checkpoint before the work: its fingerprint, and weights that are not finite."""

from __future__ import annotations

import os
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from svftool.checkpoints import Checkpoint, Fingerprint, dtype_name, tensor_digest
from svftool.progress import Progress

THREADS = 4


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


def examine(
    source: Checkpoint, *, check_finite: Collection[str], progress: Progress
) -> Examination:
    """Read every tensor once.

    Parameters
    ----------
    source : Checkpoint
        What is examined.
    check_finite : collection of str
        Names of the tensors that must be finite.
    progress : Progress
        Told how many bytes are done.
    """
    total, bad = Fingerprint(), {}
    checked = frozenset(check_finite)

    def look(name: str) -> tuple[str, str]:
        tensor = source.read(name)
        return tensor_digest(tensor), _not_finite(tensor) if name in checked else ""

    size = sum(info.nbytes for info in source.infos.values())
    with (
        progress.task("examining", size) as task,
        ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool,
    ):
        found = pool.map(look, source.infos)
        for info, (digest, what) in zip(source.infos.values(), found, strict=True):
            total.add_digest(info.name, dtype_name(info.dtype), info.shape, digest)
            if what:
                bad[info.name] = what
            task.advance(info.nbytes, detail=info.name)
    return Examination(total.hexdigest(), bad)


def _not_finite(tensor: Tensor) -> str:
    nan, infinite = int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum())
    parts = [f"{nan} NaN"] * bool(nan) + [f"{infinite} infinite"] * bool(infinite)
    return " and ".join(parts)
