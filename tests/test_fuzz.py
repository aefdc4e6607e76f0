"""Damaged inputs, killed commands and refused calls, a few of each; see the scripts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fuzz
import mutations
import pytest
import warm

FOLDER = Path(__file__).parent


SCRIPT = """
import sys, fuzz, kills, faults
mains = {"fuzz": fuzz.main, "kills": kills.main, "faults": faults.main}
few = {"fuzz": ["--count", "300", "--keep", sys.argv[1]], "kills": ["--count", "20"],
       "faults": ["--count", "10"]}
sys.exit(max(mains[name](["--seed", "13", *words]) for name, words in few.items()))
"""


def test_a_few_of_each_give_no_fault(tmp_path: Path) -> None:
    """In one process of one thread, which imports everything once and forks every command."""
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path)],
        cwd=FOLDER, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]
    last = [line for line in ended.stdout.splitlines() if "faults, " in line]
    assert [line.partition(",")[0] for line in last] == ["300 inputs", "20 runs", "10 runs"]


@pytest.mark.parametrize(
    ("code", "err", "peak", "left", "fault"),
    [
        (0, "", 0, "", ""),
        (3, "warning: w\nerror: e\n", 0, "", ""),
        (10, "error: e\n", 0, "out.csv", ""),
        (3, "error: e\nmore\n", 0, "", "not one line"),
        (3, "error: e\nerror: f\n", 0, "", "not one line"),
        (0, "Traceback (most recent call last):\n", 0, "", "traceback"),
        (1, "", 0, "", "traceback"),
        (None, "", 0, "", "hang"),
        (-7, "", 0, "", "signal -7"),
        (139, "error: e", 0, "", "unknown exit"),
        (0, "", 3 << 30, "", "memory"),
        (3, "error: e\n", 0, "out.partial", "left something"),
        (0, "", 0, mutations.CANARY, "code ran"),
    ],
)
def test_each_fault_is_seen(
    tmp_path: Path, code: Any, err: str, peak: int, left: str, fault: str
) -> None:
    if left:
        (tmp_path / left).touch()
    ended = SimpleNamespace(code=code, err=err, peak=peak)
    assert fuzz.fault(ended, tmp_path, set()) == fault  # type: ignore[arg-type]


def test_a_child_that_does_not_end_is_killed(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        while True:
            pass
    for stream in warm.streams(tmp_path):
        stream.touch()
    assert warm.wait(child, tmp_path, 0.05).code is None
