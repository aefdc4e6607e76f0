"""What a run used."""

from __future__ import annotations

import resource
import sys


def peak_memory_bytes() -> int:
    """Return the largest resident memory of this process so far, mapped files included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
