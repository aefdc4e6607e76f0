"""The engine's benchmark in its short mode: every result within its bounds of float64 LAPACK."""

from __future__ import annotations

import importlib
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


@pytest.mark.skipif(not SCRIPT.is_file(), reason="benchmarks/ is not in this checkout")
def test_what_a_gpu_is_measured_with_runs_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    gpu = importlib.import_module("gpu")
    measured = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--quick", "--json", str(measured)])
    assert gpu.main() == 0, capsys.readouterr()
    document = json.loads(measured.read_text(encoding="utf-8"))
    assert document.keys() == {"machine", "seconds", *gpu.PARTS}
    assert not any(row["broken"] for row in document["bounds"])
    methods = " ".join(row.get("methods", "") for row in document["bounds"])
    assert all(method in methods for method in ("gram", "krylov", "lapack64", "zero"))
    ratios = {(row["kind"], row["peer"]) for row in document["networks"] if "ratio" in row}
    assert ratios == {("full", "default"), ("values", "default"), ("rank", "default"),
                      ("rank", "svd_lowrank")}  # fmt: skip
    assert [row["regime"] for row in document["training"]] == ["svf", "full"]
    assert [row["command"] for row in document["commands"]] == ["decompose", "merge", "inspect"]


@pytest.mark.skipif(not SCRIPT.is_file(), reason="benchmarks/ is not in this checkout")
@pytest.mark.parametrize("part", ["bounds", "commands"])
def test_it_fails_where_something_is_broken(
    part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    gpu = importlib.import_module("gpu")
    if part == "bounds":
        bounds = importlib.import_module("gpu_bounds")
        monkeypatch.setitem(bounds.BOUNDS, "orthogonality", 1e-18)
    else:
        monkeypatch.setitem(gpu.PARTS, part, lambda device, quick: iter([{"broken": True}]))
    monkeypatch.setattr(sys, "argv", ["gpu", part, "--device", "cpu", "--quick"])
    assert gpu.main() == 1


@pytest.mark.skipif(not SCRIPT.is_file(), reason="benchmarks/ is not in this checkout")
def test_cases_go_by_the_names_of_the_documentation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    chosen = importlib.import_module("names").chosen
    known = ["resnet50", "resnet50 values", "vit_b_16", "gpt2"]
    assert chosen([], known) == known
    assert chosen(["ViT-B/16", "GPT-2"], known) == ["vit_b_16", "gpt2"]
    assert chosen(["ResNet-50"], known) == known[:2]
    with pytest.raises(SystemExit, match="2"):
        chosen(["resnet50", "resnet51"], known)
    assert "no such case: 'resnet51', expected one of resnet50; " in capsys.readouterr().err


@pytest.mark.parametrize("script", sorted(SCRIPT.parent.glob("*.py")), ids=lambda path: path.stem)
def test_every_script_loads(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    importlib.import_module(script.stem)
