"""The engine's benchmark in its short mode: every result within its bounds of float64 LAPACK."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "decompose.py"
KINDS = {"values", "reconstruction", "orthogonality"}


@pytest.mark.skipif(not SCRIPT.is_file(), reason="benchmarks/ is not in this checkout")
def test_the_engine_holds_its_bounds(tmp_path: Path) -> None:
    measured = tmp_path / "rows.json"
    command = [sys.executable, SCRIPT, "--quick", "--threads", "1", "--json", measured]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["case"]: row for row in json.loads(measured.read_text(encoding="utf-8"))}
    assert rows["quick"]["our_errors"].keys() == KINDS
    assert rows["quick rank 64"]["methods"] == {"krylov": 1}
    for row in rows.values():
        assert all(error <= 1e-6 for kind, error in row["our_errors"].items() if kind == "values")
