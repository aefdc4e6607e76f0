"""``torchrun -m svftool finetune``: two processes with gloo end where one process does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import torchrun
from pictures import write_pictures
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from svftool.cli import app

pytest.importorskip("accelerate")
pytestmark = pytest.mark.skipif(os.name == "nt", reason="gloo through torchrun, and signals")

# Each process says who it is, so that a test can kill one of them, and what threads outlive work.
MODEL = """
import atexit, os, time
from pathlib import Path
import torch
from torch import nn

def write_threads():
    names = [one.read_text() for one in Path("/proc/self/task").glob("*/comm")]
    Path(os.environ["THREADS"], os.environ["RANK"]).write_text("".join(names))

if "THREADS" in os.environ:
    atexit.register(write_threads)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 3)
        if "PIDS" in os.environ:
            Path(os.environ["PIDS"], os.environ["RANK"]).write_text(str(os.getpid()))

    def forward(self, images):
        if self.training:
            time.sleep(float(os.environ.get("PAUSE", "0")))
        return self.fc(self.bn(self.conv(images)).relu().mean((2, 3)))
"""
STEPS, BATCH, SHOTS = 20, 5, 3
"""A batch of five has no halves, and nine images are no whole number of batches."""

ROUNDING = {"rtol": 1e-4, "atol": 1e-6}
"""The sums of a gradient are formed in another order: float32, over `STEPS` steps of Adam."""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with factors, the model's code and pictures."""
    work = tmp_path_factory.mktemp("work")
    (work / "net.py").write_text(MODEL)
    scope: dict[str, Any] = {}
    exec(MODEL, scope)
    save_file(scope["Net"]().state_dict(), work / "base.safetensors", {"format": "pt"})
    write_pictures(work / "data", count=5)
    run("decompose", work / "base.safetensors", "-o", work / "factors", "-q")
    return work


def run(*args: object) -> Any:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == 0, result.stderr
    return result


def arguments(work: Path, output: str, *options: object) -> list[str]:
    words = ["finetune", work / "factors", "-o", work / output, "--data", work / "data"]
    words += ["--model", f"{work / 'net.py'}:Net", "--shots", SHOTS, "--steps", STEPS]
    words += [
        "--batch-size",
        BATCH,
        "--regime",
        "svf,entries:12,full",
        "--lr",
        0.01,
        "--json",
        *options,
    ]
    return [str(word) for word in words]


def tensors(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def alone(work: Path) -> Path:
    """Return what one process writes."""
    run(*arguments(work, "alone"))
    return work / "alone"


@pytest.fixture(scope="module")
def killed(
    work: Path, tmp_path_factory: pytest.TempPathFactory
) -> subprocess.CompletedProcess[str]:
    """Return what two processes said of which the second was killed in the second regime."""
    pids = tmp_path_factory.mktemp("pids")
    process = torchrun(arguments(work, "cut", "--save-every", 4), PIDS=pids, PAUSE=0.05)
    state = work / "cut.partial.runs" / "states" / "entries-12-seed0.safetensors"
    deadline = time.monotonic() + 180
    while not state.exists():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(int((pids / "1").read_text()), signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=180)
    assert not (work / "cut").exists()
    return subprocess.CompletedProcess([], process.returncode, stdout, stderr)


def test_a_killed_process_ends_all_with_one_line(killed: subprocess.CompletedProcess[str]) -> None:
    assert killed.returncode != 0
    assert killed.stdout == ""
    assert [line for line in killed.stderr.splitlines() if line.startswith("error:")] == [
        "error: process 0: another of the 2 processes was lost. What is finished is kept; "
        "run the same command again with --resume."
    ], killed.stderr
    # What follows is the launcher's own account of it.
    assert "Traceback" not in killed.stderr.partition("error:")[0]


@pytest.mark.usefixtures("killed")
def test_two_processes_give_the_tuned_files_of_one(work: Path, alone: Path, tmp_path: Path) -> None:
    process = torchrun(arguments(work, "cut", "--save-every", 4, "--resume"), THREADS=tmp_path)
    stdout, stderr = process.communicate(timeout=180)
    assert process.returncode == 0, stderr
    # A thread that frees a tensor while the interpreter ends would abort the process.
    assert ["gloo" in (tmp_path / rank).read_text() for rank in "01"] == [False, False]
    assert [row["steps"] for row in json.loads(stdout)["runs"]] == [STEPS] * 3
    expected, found = tensors(alone), tensors(work / "cut")
    assert (
        found.keys()
        == expected.keys()
        == {
            "full-seed0.safetensors",
            "svf-seed0.svf.safetensors",
            "entries-12-seed0.svf.safetensors",
        }
    )
    for name, values in found.items():
        torch.testing.assert_close(values, expected[name], **ROUNDING)
    base, full = load_file(work / "base.safetensors"), found["full-seed0.safetensors"]
    moved = (full["conv.weight"] - base["conv.weight"]).abs().max()
    assert float(moved) > 100 * ROUNDING["rtol"], "rounding would hide that nothing was trained"
