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


def run(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of one thread, from which commands may be forked."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", script, *words],
        cwd=FOLDER, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("fuzz.py", ("--count", "300", "--seed", "13")),
        ("kills.py", ("--count", "20", "--seed", "13")),
        ("faults.py", ("--count", "20", "--seed", "13")),
    ],
)
def test_a_few_give_no_fault(script: str, words: tuple[str, ...], tmp_path: Path) -> None:
    more = ("--keep", str(tmp_path)) if script == "fuzz.py" else ()
    ended = run(script, *words, *more)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]
    assert f"{words[1]} " in ended.stdout.splitlines()[-1]


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
