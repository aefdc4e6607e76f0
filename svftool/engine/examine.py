"""One pass over a checkpoint before the work: its fingerprint, and weights that are not finite."""

from __future__ import annotations

import heapq
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from svftool.checkpoints import Checkpoint, Fingerprint, dtype_name, tensor_digest
from svftool.processes import Processes
from svftool.progress import Progress

THREADS = 4
SMALLEST, LARGEST = 1e-31, float(torch.finfo(torch.float32).max)
"""Between which float32 holds the largest singular value, and those down to 1e-7 of it."""
_WIDE_RANGE = (torch.float64, torch.float32, torch.bfloat16)
_PART = 2**22
_PART_BYTES = 2 * _PART


@dataclass(frozen=True)
class Examination:
    """What was found.

    Attributes
    ----------
    fingerprint : str
        Of the whole checkpoint.
    digests : dict of str to str
        SHA-256 of each tensor's bytes.
    non_finite : dict of str to str
        Checked tensors that hold NaN or infinity, with what they hold.
    out_of_range : dict of str to str
        Checked tensors whose singular values float32 cannot hold, with the largest.
    """

    fingerprint: str
    digests: dict[str, str]
    non_finite: dict[str, str]
    out_of_range: dict[str, str]


def examination_bytes(source: Checkpoint) -> int:
    """Bound the memory that `examine` takes for tensors: as many as it reads at a time."""
    sizes = heapq.nlargest(_threads(), (info.nbytes for info in source.infos.values()))
    return sum(sizes) + _threads() * _PART_BYTES


def _threads() -> int:
    return min(THREADS, os.cpu_count() or 1)


def examine(
    source: Checkpoint,
    *,
    check: Mapping[str, tuple[int, ...]],
    processes: Processes,
    progress: Progress,
) -> Examination:
    """Read every tensor once; the processes share them.

    Parameters
    ----------
    source : Checkpoint
        What is examined.
    check : mapping of str to tuple of int
        Tensors that must be finite and have singular values that float32 holds, with the shape of
        their matrix or matrices.
    processes : Processes
        This process among those that share the work.
    progress : Progress
        Told how many bytes are done.
    """

    def look(name: str) -> tuple[str, str, str]:
        tensor = source.read(name)
        bad = _not_finite(tensor) if name in check else ""
        far = _out_of_range(tensor, check[name]) if name in check and not bad else ""
        return tensor_digest(tensor), bad, far

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
    far = {name: found[name][2] for name in source.infos if found[name][2]}
    digests = {name: seen[0] for name, seen in found.items()}
    return Examination(total.hexdigest(), digests, bad, far)


def _not_finite(tensor: Tensor) -> str:
    nan = infinite = 0
    for part in tensor.reshape(-1).split(_PART):  # type: ignore[no-untyped-call]
        if not bool(torch.isfinite(part).all()):
            nan += int(torch.isnan(part).sum())
            infinite += int(torch.isinf(part).sum())
    parts = [f"{nan} NaN"] * bool(nan) + [f"{infinite} infinite"] * bool(infinite)
    return " and ".join(parts)


def _out_of_range(tensor: Tensor, matrix: tuple[int, ...]) -> str:
    """Say that float32 cannot hold a matrix's singular values with its usual precision."""
    if tensor.dtype not in _WIDE_RANGE or tensor.numel() == 0:
        return ""
    low, high = tensor.aminmax()
    top = max(abs(float(low)), abs(float(high)))
    # An entry is at most the largest singular value, which is at most the root of all squares.
    stacked = len(matrix) > 2
    if top == 0.0 or (not stacked and top > SMALLEST and top * math.sqrt(tensor.numel()) < LARGEST):
        return ""
    if stacked:
        tops = tensor.reshape(matrix[0], -1).abs().amax(1).double()
        bound = tops * math.sqrt(math.prod(matrix[1:]))
        doubtful = (tops > 0) & ((tops <= SMALLEST) | (bound >= LARGEST))
        if not bool(doubtful.any()):
            return ""
        tensor = tensor.reshape(matrix)[doubtful]
    scaled = tensor.double().reshape(-1, *matrix[-2:]) / top
    norms = torch.linalg.matrix_norm(scaled, 2) * top
    wrong = norms[(norms <= SMALLEST) | (norms >= LARGEST)]
    return f"largest singular value {float(wrong[0]):.1e}" if len(wrong) else ""
