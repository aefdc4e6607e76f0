"""Time and memory of one run."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self


def anonymous_bytes() -> int:
    """Return this process's anonymous resident memory (Linux), 0 elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")), 0)


class Watch:
    """Measures the wall time of a block and how much memory it took beside what was there."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.peak_bytes = 0
        self._before = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._stop.wait(0.01):
            self.peak_bytes = max(self.peak_bytes, anonymous_bytes() - self._before)

    def __enter__(self) -> Self:
        self._before = anonymous_bytes()
        self._thread.start()
        self._start = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.seconds = time.perf_counter() - self._start
        self.peak_bytes = max(self.peak_bytes, anonymous_bytes() - self._before)
        self._stop.set()
        self._thread.join()
