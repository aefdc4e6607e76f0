"""What a layer takes of a device's memory, and what happens where that is not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from svftool.engine import Job, job_bytes, run_svds
from svftool.errors import ResourceError
from svftool.machine import explain_out_of_memory
from svftool.numerics import singular_values, svd

Row = dict[str, Any]
_RANK = 64


def _peak(work: Callable[[], object], device: torch.device) -> int:
    """Return the bytes that a piece of work takes beside what is there."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


def _taken(W: Tensor, device: torch.device) -> Iterator[Row]:
    job = Job("w", tuple(W.shape), W.dtype)
    ways: dict[str, tuple[Callable[[Tensor], object], int]] = {
        "full": (svd, job_bytes(job)),
        f"rank {_RANK}": (partial(svd, rank=_RANK), job_bytes(job, _RANK)),
        "values only": (singular_values, job_bytes(job, values_only=True)),
    }
    for name, (way, expected) in ways.items():
        peak = _peak(lambda way=way: way(W.to(device)), device)
        yield {
            "what": f"{name} of {W.shape[0]} x {W.shape[1]}",
            "peak MB": round(peak / 2**20),
            "of the matrix in float64": peak / (8 * W.numel()),
            "of what the CPU is said to take": peak / expected,
        }


def _too_little(device: torch.device) -> Iterator[Row]:
    """Leave the process 32 MB of the device."""
    W = torch.randn(1500, 1024, generator=torch.Generator().manual_seed(0))
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(2**25 / total, device)
    try:
        (found,) = dict(run_svds([Job("w", (1500, 1024))], lambda _: W, device=device)).values()
        same = torch.equal(found.U, svd(W).U)
        yield {"what": "a layer that does not fit is done on the CPU", "broken": not same}
        try:
            with explain_out_of_memory(8):
                torch.empty(2**27, device=device)
        except ResourceError as error:
            yield {"what": f"a batch that does not fit: {error}"[:90], "broken": False}
        else:
            yield {"what": "a batch that does not fit", "broken": True}
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def rows(device: torch.device, quick: bool) -> Iterator[Row]:
    """Yield a row for each way and shape; nothing on a CPU, whose memory tests measure."""
    if device.type != "cuda":
        return
    shapes = [(700, 500)] if quick else [(1024, 1024), (4096, 4096), (14336, 4096)]
    for m, n in shapes:
        yield from _taken(torch.randn(m, n), device)
    yield from _too_little(device)
