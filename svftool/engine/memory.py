"""Memory that this process may still take."""

from __future__ import annotations

from pathlib import Path

from svftool.engine.plan import Job
from svftool.errors import ResourceError

_GIB = float(1 << 30)


def available_memory() -> int | None:
    """Return the bytes that are free here, on the machine or in its control group, if known."""
    found = [free for free in (_machine(), _control_group()) if free is not None]
    return min(found, default=None)


def check_memory(job: Job, needed: int) -> None:
    """Refuse a layer that cannot fit, before anything is computed.

    Raises
    ------
    ResourceError
        With the size needed and what is free.
    """
    free = available_memory()
    if free is not None and needed > free:
        raise ResourceError(
            f"{job.name}: a matrix of {_shape(job)} needs {needed / _GIB:.1f} GiB of memory, found "
            f"{free / _GIB:.1f} GiB free. Leave it out with --exclude, keep fewer singular values "
            "with --rank, or use a machine with more memory."
        )


def as_resource_error(job: Job, error: Exception) -> ResourceError | None:
    """Tell what an allocation that failed means to the user; None for any other error.

    torch raises a plain RuntimeError where memory of the CPU runs out.
    """
    text = str(error)
    if not isinstance(error, MemoryError) and "allocate memory" not in text:
        return None
    return ResourceError(
        f"{job.name}: out of memory in a matrix of {_shape(job)}. What is finished is kept. "
        "Keep fewer singular values with --rank, or use a machine with more memory."
    )


def _shape(job: Job) -> str:
    return " x ".join(map(str, job.matrix))


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
