"""``torchrun`` with two processes on this machine, for tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence


def torchrun(words: Sequence[str], **environment: object) -> subprocess.Popen[str]:
    """Start ``svftool`` with these words in two processes of one thread each."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    more = {name: str(value) for name, value in environment.items()}
    return subprocess.Popen(
        [*launch, "-m", "svftool", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
