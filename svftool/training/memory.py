"""Memory of a run: its peak, and what to say when there is not enough."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from svftool.errors import ResourceError

_SIGNS = ("out of memory", "not enough memory", "can't allocate memory")
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@contextmanager
def explain_out_of_memory(batch_size: int | None) -> Iterator[None]:
    """Turn a failed allocation into an error that says what to lower.

    Without a batch size nothing is trained, and there is less that could be lowered.

    Raises
    ------
    ResourceError
        In place of PyTorch's and Python's own errors.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(s in str(error) for s in _SIGNS):
            raise
        if batch_size is None:
            raise ResourceError(
                "not enough memory to measure the model. Lower --image-size, or choose another "
                "--device"
            ) from error
        raise ResourceError(
            f"not enough memory for a batch of {batch_size} examples. Lower --batch-size or "
            "--image-size, use --precision bf16, or train fewer layers (--train-layers)"
        ) from error


def reset_peak_memory(device: torch.device) -> None:
    """Start measuring anew, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        try:
            _CLEAR.write_text("5")
        except OSError:
            return


def peak_memory(device: torch.device) -> int | None:
    """Largest memory since the last reset, in bytes.

    The device's own for a GPU; else the resident memory of the whole process, which on Linux is
    that since the reset and elsewhere that since the process began; None where neither is known.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        lines = _STATUS.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
