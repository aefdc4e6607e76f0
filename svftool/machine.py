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

from svftool.errors import ResourceError, UsageError, no_such

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
# Also as cuBLAS, cuSOLVER and cuDNN say it.
_SIGNS = ("out of memory", "not enough memory", "allocate memory", "status_alloc_failed")
_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUP = Path("/proc/self/cgroup")
_NO_LIMIT = 1 << 60
# Names of the limit, of what is used, and of the file pages that can be dropped, by version.
_GROUP_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}
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
        raise UsageError(no_such("--device", name, ("auto", "cpu", "cuda", "cuda:INDEX")))
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


_SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def usual_threads() -> set[int]:
    """Return the numbers of threads that torch takes of itself: of the cores, or their threads."""
    if not hasattr(os, "sched_getaffinity"):
        return {os.cpu_count() or 1}
    places = os.sched_getaffinity(0)
    try:
        cores = {Path(_SIBLINGS.format(place)).read_text(encoding="ascii") for place in places}
    except OSError:
        return {len(places)}
    return {len(places), len(cores)}


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


def _control_group(groups: Path = _GROUPS, own: Path = _OWN_GROUP) -> int | None:
    """Return what is free in this process's control group and in all around it.

    Pages of files that nobody uses count as free: the system drops them before it refuses.
    """
    try:
        lines = own.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        lines = []
    free = [
        one
        for version, folder in _group_folders(groups, lines)
        if (one := _free_in_group(folder, *_GROUP_FILES[version])) is not None
    ]
    return min(free, default=None)


def _group_folders(groups: Path, lines: list[str]) -> Iterator[tuple[int, Path]]:
    """List the folders from the process's own group to the root, of either version."""
    seen = [(2, groups, "/"), (1, groups / "memory", "/")]
    for line in lines:
        number, controllers, place = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            seen.append((2, groups, place))
        elif "memory" in controllers.split(","):
            seen.append((1, groups / "memory", place))
    for version, root, place in seen:
        parts = [part for part in place.split("/") if part not in ("", "..")]
        for count in range(len(parts), -1, -1):
            yield version, root.joinpath(*parts[:count])


def _free_in_group(folder: Path, limit: str, used: str, inactive: str) -> int | None:
    try:
        most = (folder / limit).read_text(encoding="ascii").strip()
        taken = int((folder / used).read_text(encoding="ascii"))
        if most == "max" or int(most) >= _NO_LIMIT:
            return None
    except (OSError, ValueError):
        return None
    return max(0, int(most) - max(0, taken - _droppable(folder, inactive)))


def _droppable(folder: Path, inactive: str) -> int:
    try:
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
        pairs = [line.split() for line in lines]
        return next((int(pair[1]) for pair in pairs if pair[:1] == [inactive]), 0)
    except (OSError, ValueError, IndexError):
        return 0


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


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out, on the machine or on a device.

    torch raises a plain RuntimeError where memory of the CPU runs out, and so do the libraries that
    it calls on a GPU.

    Examples
    --------
    >>> is_out_of_memory(RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED"))
    True
    """
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(s in str(error).lower() for s in _SIGNS)


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
        if not is_out_of_memory(error):
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
