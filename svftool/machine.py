"""The machine: the device that ``--device`` names, and memory, free and used."""

from __future__ import annotations

import os
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from svftool.errors import ResourceError, UsageError

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
_SIGNS = ("out of memory", "not enough memory", "can't allocate memory")
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def pick_device(name: str) -> torch.device:
    """Read ``auto``, ``cpu``, ``cuda`` or ``cuda:1``: the one place where ``--device`` is read.

    ``auto`` takes a GPU if there is one. ``torchrun`` numbers the processes of a host: with
    ``auto`` and ``cuda`` each takes a GPU of its own.

    Raises
    ------
    UsageError
        If the name means nothing, or that GPU is not there.

    Examples
    --------
    >>> pick_device("cpu")
    device(type='cpu')
    """
    if not _DEVICE.fullmatch(name):
        raise UsageError(f"--device {name!r}, expected auto, cpu, cuda or cuda:INDEX")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if name in {"auto", "cuda"}:
        index = int(os.environ.get("LOCAL_RANK", "0")) % max(count, 1)
    else:
        index = int(name.removeprefix("cuda:"))
    if index >= count:
        raise UsageError(f"--device {name!r}: {count} GPUs are available. Use --device cpu")
    return torch.device("cuda", index)


def available_memory() -> int | None:
    """Return the bytes that are free here, on the machine or in its control group, if known."""
    found = [free for free in (_machine(), _control_group()) if free is not None]
    return min(found, default=None)


def _machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return None


def _control_group() -> int | None:
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = (folder / "memory.current").read_text(encoding="ascii").strip()
    except OSError:
        return None
    return None if limit == "max" else max(0, int(limit) - int(used))


def peak_memory_bytes() -> int:
    """Return the largest resident memory of this process so far, mapped files included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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
    """Return the largest memory since the last reset, in bytes.

    The device's own for a GPU; else the resident memory of the whole process, which on Linux is
    that since the reset and elsewhere that since the process began.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        lines = _STATUS.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return peak_memory_bytes()


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
