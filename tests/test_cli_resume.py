"""``svftool finetune --resume``: what was killed or interrupted ends as if it had not been."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forked, start
from pictures import write_pictures
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from svftool.cli import app
from svftool.training.run_output import RunWriter

MODEL = """
import os, time
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(8, 3)

    def forward(self, images):
        if self.training:
            time.sleep(float(os.environ.get("PAUSE", "0")))
        return self.fc(self.drop(self.bn(self.conv(images)).relu().mean((2, 3))))
"""
TIMES = {"seconds", "step_seconds", "peak_memory_bytes", "output"}


def run(*args: object) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Return a folder with factors, the model's code and pictures."""
    (tmp_path / "net.py").write_text(MODEL)
    scope: dict[str, Any] = {}
    exec(MODEL, scope)
    save_file(scope["Net"]().state_dict(), tmp_path / "base.safetensors", {"format": "pt"})
    write_pictures(tmp_path / "data", count=6)
    made = run("decompose", tmp_path / "base.safetensors", "-o", tmp_path / "factors", "-q")
    assert made.exit_code == 0, made.stderr
    return tmp_path


def arguments(work: Path, output: str, *options: object) -> list[str]:
    fixed = ["--data", work / "data", "--model", f"{work / 'net.py'}:Net", "--shots", 3]
    words = ["finetune", work / "factors", "-o", work / output, *fixed, "--steps", 40, *options]
    return [str(word) for word in words]


def wait_for(file: Path, process: Forked) -> None:
    deadline = time.monotonic() + 120
    while not file.exists():
        assert not process.ended, process.stderr
        assert time.monotonic() < deadline
        time.sleep(0.003)


def contents(folder: Path) -> dict[str, Any]:
    """Bytes of every file; of the results all but times."""
    found: dict[str, Any] = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "results.json"
    }
    results = json.loads((folder / "results.json").read_text())
    results.pop("output")
    for row in (*results["runs"], *results["summary"]):
        for name in TIMES & row.keys():
            row.pop(name)
    return {**found, "results.json": results}


def test_a_killed_comparison_goes_on_to_the_same_bytes(work: Path) -> None:
    pytest.importorskip("peft")
    options = ["--regime", "svf,lora:2,full", "--seeds", 2, "--save-every", 7]
    whole = run(*arguments(work, "whole", *options))
    assert whole.exit_code == 0, whole.stderr
    states = work / "cut.partial.runs" / "states"
    for state in ("svf-seed0", "lora-2-seed1"):
        words = arguments(work, "cut", *options, *(["--resume"] if states.exists() else []))
        process = start(words, work, PAUSE=0.01)
        wait_for(states / f"{state}.safetensors", process)
        process.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (work / "cut").exists()
    records = states.parent / "records"
    assert {path.stem for path in records.iterdir()} == {
        "svf-seed0",
        "lora-2-seed0",
        "full-seed0",
        "svf-seed1",
    }
    before = {path.name: path.stat().st_mtime_ns for path in records.iterdir()}
    resumed = run(*arguments(work, "cut", *options, "--resume"))
    assert resumed.exit_code == 0, resumed.stderr
    assert contents(work / "cut") == contents(work / "whole")
    assert len(before) == 4
    assert not list(work.glob("*.partial*"))


@pytest.mark.parametrize("output", ["t.svf.safetensors", "runs"])
def test_an_interrupted_run_can_be_used_and_goes_on(work: Path, output: str) -> None:
    several = ["--seeds", 2] if output == "runs" else []
    whole = run(*arguments(work, f"whole-{output}", *several))
    assert whole.exit_code == 0, whole.stderr
    process = start(arguments(work, output, *several, "--save-every", 3), work, PAUSE=0.03)
    wait_for(work / f"{output}.partial.runs" / "states" / "svf-seed0.safetensors", process)
    process.send(signal.SIGINT)
    assert process.wait() == 130, process.stderr
    assert "--resume goes on" in process.stdout
    assert (work / output).exists()
    refused = run(*arguments(work, output, *several))
    assert refused.exit_code == 2
    resumed = run(*arguments(work, output, *several, "--resume"))
    assert resumed.exit_code == 0, resumed.stderr
    if output == "runs":
        assert contents(work / output) == contents(work / f"whole-{output}")
    else:
        assert (work / output).read_bytes() == (work / f"whole-{output}").read_bytes()
    assert not list(work.glob("*.partial*"))


@pytest.fixture
def cut(work: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder with a comparison that ended when its second run was to be written."""
    write = RunWriter.__call__

    def crash(self: RunWriter, one: Any, *rest: Any) -> Path:
        if one.seed == 1:
            raise ZeroDivisionError
        return write(self, one, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(RunWriter, "__call__", crash)
        crashed = run(*arguments(work, "cut", "--seeds", 2))
    assert isinstance(crashed.exception, ZeroDivisionError)
    return work


def test_what_is_finished_is_not_trained_again(cut: Path) -> None:
    resumed = run(*arguments(cut, "cut", "--seeds", 2, "--resume", "--json"))
    assert resumed.exit_code == 0, resumed.stderr
    assert run(*arguments(cut, "whole", "--seeds", 2)).exit_code == 0
    assert contents(cut / "cut") == contents(cut / "whole")
    document = json.loads(resumed.stdout)
    assert [one["seed"] for one in document["runs"]] == [0, 1]


def test_other_options_are_refused(cut: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: object, **__: object) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr("svftool.stages.finetune.build_model", build)
    for options, message in (
        (["--lr", 0.5], "--lr was not given, now 0.5"),
        (["--regime", "svf,head"], "--regime was svf, now svf,head"),
        (["--lr", "svf=0.5"], "--lr was not given, now svf=0.5"),
        (["--model", "elsewhere.py:Net"], "--model was"),
        (["--clip-grad", 0], "--clip-grad was 1.0, now 0"),
        (["--train-layers", "conv*"], "--train-layers was not given, now conv*"),
        (["--seeds", 3], "--seeds: the seeds were 0,1, now 0,1,2"),
        (["--batch-size", 2], "--batch-size was 16, now 2"),
        (["--augment", "none"], "--augment was not given, now none"),
    ):
        result = run(*arguments(cut, "cut", "--seeds", 2, "--resume", *options))
        assert result.exit_code == 2
        assert message in result.stderr
        assert "leave --resume out" in result.stderr
    monkeypatch.undo()
    # Nothing was built for it, and what was refused has left everything as it was.
    assert run(*arguments(cut, "cut", "--seeds", 2, "--resume")).exit_code == 0


def test_another_number_of_threads_is_refused(cut: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        result = run(*arguments(cut, "cut", "--seeds", 2, "--resume"))
    finally:
        torch.set_num_threads(before)
    assert result.exit_code == 2
    assert f"the number of threads was {before}, now {before + 1}" in result.stderr


def test_other_data_code_or_base_is_refused(cut: Path) -> None:
    again = arguments(cut, "cut", "--seeds", 2, "--resume")
    picture = cut / "data" / "red" / "00.png"
    kept = cut / "kept.png"
    shutil.copy2(picture, kept)
    shutil.copy(cut / "data" / "blue" / "00.png", picture)
    changed = run(*again)
    assert (changed.exit_code, "--data: red/00.png has changed" in changed.stderr) == (2, True)
    shutil.copy2(kept, picture)
    other = {name: value + 1 for name, value in load_file(cut / "base.safetensors").items()}
    (cut / "elsewhere").mkdir()
    save_file(other, cut / "elsewhere" / "base.safetensors")
    assert (
        run("decompose", cut / "elsewhere" / "base.safetensors", "-o", cut / "other").exit_code == 0
    )
    again[1] = str(cut / "other")
    changed = run(*again)
    assert (changed.exit_code, "the base has changed" in changed.stderr) == (2, True)


def test_without_resume_everything_begins_anew(cut: Path) -> None:
    assert run(*arguments(cut, "cut", "--seeds", 2, "--lr", 0.01)).exit_code == 0
    assert run(*arguments(cut, "whole", "--seeds", 2, "--lr", 0.01)).exit_code == 0
    assert contents(cut / "cut") == contents(cut / "whole")


def test_what_was_put_in_the_place_of_the_output_is_left_alone(work: Path) -> None:
    process = start(arguments(work, "t.svf.safetensors", "--save-every", 3), work, PAUSE=0.03)
    state = work / "t.svf.safetensors.partial.runs" / "states" / "svf-seed0.safetensors"
    wait_for(state, process)
    process.send(signal.SIGINT)
    process.wait()
    target = work / "t.svf.safetensors"
    target.unlink()
    target.write_text("mine")
    refused = run(*arguments(work, target.name, "--resume"))
    assert refused.exit_code == 2
    assert target.read_text() == "mine"


def test_with_nothing_to_go_on_from_it_starts(work: Path) -> None:
    assert run(*arguments(work, "t.svf.safetensors", "--resume")).exit_code == 0
    again = run(*arguments(work, "t.svf.safetensors", "--resume"))
    assert again.exit_code == 2
    assert "exists already" in again.stderr
