"""Run a command and report the highest anonymous memory and the wall time of it and its children.

python benchmarks/process_memory.py svftool decompose /tmp/llama-3b -o /tmp/factors --rank 64
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path


def anonymous_bytes(process: int) -> int:
    """Return RssAnon of a process and its descendants; 0 once they are gone."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
        children = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="ascii")
    except OSError:
        return 0
    own = next((int(x.split()[1]) << 10 for x in status.splitlines() if x[:7] == "RssAnon"), 0)
    return own + sum(anonymous_bytes(int(child)) for child in children.split())


def main() -> int:
    start, peak = time.perf_counter(), 0
    with subprocess.Popen(sys.argv[1:]) as process:
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.02)
    seconds = time.perf_counter() - start
    print(f"peak anonymous memory {peak / 2**20:.0f} MiB, {seconds:.1f} s", file=sys.stderr)
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
