"""``svftool finetune`` as a user meets it, on a small network and coloured pictures."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import start
from pictures import write_pictures
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from svftool.cli import app
from svftool.factors import read_tuned
from svftool.tasks.classification import Classification

runner = CliRunner()

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, classes)

    def forward(self, images):
        return self.fc(self.bn(self.conv(images)).relu().mean((2, 3)))

def net():
    return Net(3)

def other():
    return nn.Sequential(nn.Linear(2, 2))
"""

RUN_KEYS = {
    "regime",
    "seed",
    "shots",
    "metrics",
    "trainable_parameters",
    "steps",
    "step_seconds",
    "seconds",
    "peak_memory_bytes",
    "output",
}
SUMMARY_KEYS = {"regime", "metric", "mean", "ci95", "trainable_parameters", "step_seconds"}


def run(*args: object) -> Any:
    return runner.invoke(app, [str(arg) for arg in args])


def build(folder: Path) -> torch.nn.Module:
    scope: dict[str, Any] = {}
    exec(compile(MODEL, "net.py", "exec"), scope)
    return scope["net"]()


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Return a folder with a base, its factors, the model's code and pictures."""
    (tmp_path / "net.py").write_text(MODEL)
    save_file(build(tmp_path).state_dict(), tmp_path / "base.safetensors", {"format": "pt"})
    write_pictures(tmp_path / "data", count=8)
    made = run("decompose", tmp_path / "base.safetensors", "-o", tmp_path / "factors", "-q")
    assert made.exit_code == 0, made.stderr
    return tmp_path


@pytest.fixture
def finetune(work: Path) -> Callable[..., Any]:
    """Return a caller of ``finetune`` with everything given but the output and what is tested."""

    def call(output: str, *options: object) -> Any:
        fixed = ["--data", work / "data", "--model", f"{work / 'net.py'}:net", "--shots", 3]
        return run("finetune", work / "factors", "-o", work / output, *fixed, *options)

    return call


def accuracy(model: torch.nn.Module, work: Path) -> float:
    draw = Classification(work / "data", shots=3).draw(0)
    return draw.evaluate(model)["accuracy"]


def test_one_run_writes_one_tuned_file(finetune: Callable[..., Any], work: Path) -> None:
    result = finetune("t.svf.safetensors", "--steps", 5)
    assert result.exit_code == 0, result.stderr
    assert "accuracy %" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    tuned = read_tuned(work / "t.svf.safetensors")
    assert set(tuned.S) == {"conv.weight"}
    assert set(tuned.whole) == {"fc.weight", "fc.bias"}
    assert (tuned.task, tuned.classes) == ("classification", ("blue", "green", "red"))
    assert tuned.training["regime"] == "svf"
    assert str(work) not in json.dumps(tuned.training)
    assert not (work / "results.json").exists()


def test_json_holds_the_promised_keys(finetune: Callable[..., Any]) -> None:
    result = finetune("runs", "--steps", 3, "--seeds", 2, "--regime", "head,svf", "--json")
    document = json.loads(result.stdout)
    assert (document["command"], document["schema_version"]) == ("finetune", 1)
    assert all(run.keys() >= RUN_KEYS for run in document["runs"])
    assert all(row.keys() >= SUMMARY_KEYS for row in document["summary"])
    assert [(r["regime"], r["seed"]) for r in document["runs"]] == [
        ("head", 0),
        ("svf", 0),
        ("head", 1),
        ("svf", 1),
    ]
    for item in document["runs"]:
        assert item["metrics"].keys() == {"before", "after"}
        assert item["metrics"]["after"].keys() == {"accuracy", "class_accuracy", "loss"}
        assert item["steps"] == 3
        assert Path(item["output"]).exists()
    low, high = document["summary"][1]["ci95"]
    assert low <= document["summary"][1]["mean"] <= high


def test_a_regime_may_be_spelt_another_way(finetune: Callable[..., Any]) -> None:
    options = ["--steps", 2, "--regime", "svf+bias,head", "--seeds", 2, "--json"]
    result = finetune("runs", *options, "--against", "bias+svf", "--lr", "bias+svf=0.5")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["against"]["reference"] == "svf+bias"
    assert [one["regime"] for one in document["against"]["differences"]] == ["head"]
    rates = [run["learning_rates"] for run in document["runs"] if run["regime"] == "svf+bias"]
    assert all(rate["singular_values"] == 0.5 for rate in rates)


def test_one_seed_has_no_interval(finetune: Callable[..., Any]) -> None:
    document = json.loads(finetune("t.svf.safetensors", "--steps", 2, "--json").stdout)
    assert document["summary"][0]["ci95"] is None


def test_several_runs_write_a_folder(finetune: Callable[..., Any], work: Path) -> None:
    result = finetune("runs", "--steps", 3, "--regime", "head,svf,svf+norm,full", "--seed", 4)
    assert result.exit_code == 0, result.stderr
    assert {path.name for path in (work / "runs").iterdir()} == {
        "head-seed4.svf.safetensors",
        "svf-seed4.svf.safetensors",
        "svf+norm-seed4.svf.safetensors",
        "full-seed4.safetensors",
        "results.json",
        "run.toml",
    }
    results = json.loads((work / "runs" / "results.json").read_text())
    assert [run["regime"] for run in results["runs"]] == ["head", "svf", "svf+norm", "full"]
    assert not read_tuned(work / "runs" / "head-seed4.svf.safetensors").S


def test_the_same_seed_gives_the_same_bytes(finetune: Callable[..., Any], work: Path) -> None:
    for name in ("a", "b"):
        assert finetune(f"{name}.svf.safetensors", "--steps", 6).exit_code == 0
    finetune("c.svf.safetensors", "--steps", 6, "--seed", 1)
    a, b, c = ((work / f"{name}.svf.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_the_merged_checkpoint_does_what_was_measured(
    finetune: Callable[..., Any], work: Path
) -> None:
    options = ["--steps", 30, "--lr", 0.02, "--head-lr", 0.05, "--head", "keep", "--json"]
    document = json.loads(finetune("t.svf.safetensors", *options).stdout)
    measured = document["runs"][0]["metrics"]
    assert measured["after"]["accuracy"] > measured["before"]["accuracy"]
    merged = work / "merged.safetensors"
    assert run("merge", work / "factors", work / "t.svf.safetensors", "-o", merged).exit_code == 0
    model = build(work)
    assert accuracy(model, work) == measured["before"]["accuracy"]
    model.load_state_dict(load_file(merged), strict=True)
    assert accuracy(model, work) == measured["after"]["accuracy"]


@pytest.mark.parametrize("output", ["dense.safetensors", "dense.pth", "dense"])
def test_full_alone_writes_a_checkpoint(
    finetune: Callable[..., Any], work: Path, output: str
) -> None:
    options = ["--regime", "full", "--steps", 20, "--lr", 0.01, "--head-lr", 0.05, "--json"]
    result = finetune(output, *options)
    assert result.exit_code == 0, result.stderr
    if output.endswith(".pth"):
        state = torch.load(work / output, weights_only=True)
    else:
        file = work / output
        state = load_file(file / "model.safetensors" if file.is_dir() else file)
    model = build(work)
    model.load_state_dict(state, strict=True)
    after = json.loads(result.stdout)["runs"][0]["metrics"]["after"]
    assert accuracy(model, work) == after["accuracy"]


def test_lora_writes_a_peft_folder(finetune: Callable[..., Any], work: Path) -> None:
    peft = pytest.importorskip("peft")
    result = finetune("adapter", "--regime", "lora:2", "--steps", 10, "--json")
    assert result.exit_code == 0, result.stderr
    model = peft.PeftModel.from_pretrained(build(work), str(work / "adapter"))
    after = json.loads(result.stdout)["runs"][0]["metrics"]["after"]
    assert accuracy(model, work) == after["accuracy"]


def test_new_classes_get_a_head_of_their_own(finetune: Callable[..., Any], work: Path) -> None:
    write_pictures(work / "two", classes=["red", "blue"], count=6)
    result = finetune("t.svf.safetensors", "--steps", 3, "--data", work / "two")
    assert result.exit_code == 0, result.stderr
    assert read_tuned(work / "t.svf.safetensors").whole["fc.weight"].shape == (2, 8)
    merged = work / "merged.safetensors"
    assert run("merge", work / "factors", work / "t.svf.safetensors", "-o", merged).exit_code == 0
    assert load_file(merged)["fc.weight"].shape == (2, 8)


def test_a_csv_file_and_evaluation_apart(finetune: Callable[..., Any], work: Path) -> None:
    images = sorted((work / "data").rglob("*.png"))
    lines = [f"{path.relative_to(work)},{path.parent.name}" for path in images]
    (work / "train.csv").write_text("\n".join(["path,label", *lines]))
    options = ["--data", work / "train.csv", "--eval", work / "data", "--steps", 2, "--json"]
    result = finetune("t.svf.safetensors", *options)
    assert result.exit_code == 0, result.stderr


def test_a_worse_tune_is_said_loudly(finetune: Callable[..., Any], work: Path) -> None:
    wrong = work / "wrong"
    for source, name in (("red", "blue"), ("blue", "green"), ("green", "red")):
        (wrong / name).mkdir(parents=True)
        for path in (work / "data" / source).iterdir():
            Image.open(path).save(wrong / name / path.name)
    keep = ["--head", "keep"]
    good = finetune("good.safetensors", "--regime", "full", "--steps", 40, "--head-lr", 0.05, *keep)
    assert good.exit_code == 0, good.stderr
    assert "WORSE" not in good.stdout
    assert run("decompose", work / "good.safetensors", "-o", work / "better").exit_code == 0
    fixed = ["--model", f"{work / 'net.py'}:net", "--shots", 3, "--steps", 40, "--head-lr", 0.1]
    fixed += keep
    bad = run(
        "finetune",
        work / "better",
        "-o",
        work / "bad.svf.safetensors",
        "--data",
        wrong,
        "--eval",
        work / "data",
        *fixed,
    )
    assert bad.exit_code == 0
    assert "worse than the base" in bad.stderr
    assert "WORSE than the base" in bad.stdout


def test_an_existing_output_is_left_alone(finetune: Callable[..., Any], work: Path) -> None:
    target = work / "t.svf.safetensors"
    target.write_text("mine")
    refused = finetune(target.name, "--steps", 2)
    assert refused.exit_code == 2
    assert target.read_text() == "mine"
    assert finetune(target.name, "--steps", 2, "--force").exit_code == 0
    assert read_tuned(target).S


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--regime", "everything"], 2, "regime 'everything', expected one of head"),
        (["--regime", "svf,svf"], 2, "svf: expected each once"),
        (["--regime", "svf+bias,bias+svf"], 2, "bias+svf, svf+bias: expected each once"),
        (["--regime", "entries:4x:gradient,entries:4.0x"], 2, "expected each once"),
        (["--regime", "svf,head"], 2, "2 runs are written to a folder"),
        (["--steps", 2, "--epochs", 2], 2, "--steps and --epochs"),
        (["--shots", 9], 6, "class 'blue' has 8 images, expected at least 9"),
        (["--data", "nowhere"], 6, "nowhere: no such file or folder"),
        (["--classes", "names.txt"], 6, "unknown class blue, green"),
        (["--model", "net.py:other"], 7, "missing"),
        (["--model", "net.py:absent"], 7, "no factory 'absent'"),
        (["--head-name", "body"], 7, "'body' is no module of the model: conv, bn, fc"),
        (["--train-layers", "nothing.*"], 7, "none of 1 decomposed layers"),
        (["--regime", "rows", "--train-rank", "top:3"], 2, "only for svf, svf+scale and salt:SIZE"),
        (["--regime", "full", "--train-layers", "nope*"], 2, "--train-layers has no meaning for"),
        (["--shots", 1, "--hold-out", 0.3], 2, "--hold-out 0.3 holds out none of the images"),
        (["--base", "second.safetensors"], 3, "fingerprint"),
        (["--device", "cuda:99"], 2, "GPUs are available"),
        (["--device", "toaster"], 2, "'toaster', expected one of auto"),
    ],
)
def test_what_cannot_be_ends_in_one_line(
    finetune: Callable[..., Any],
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[object],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(work)
    (work / "names.txt").write_text("red\nyellow\n")
    other = {name: value + 1 for name, value in load_file(work / "base.safetensors").items()}
    save_file(other, work / "second.safetensors")
    before = sorted(path.name for path in work.iterdir())
    result = finetune("t.svf.safetensors", "--steps", 1, *options)
    assert result.exit_code == code, result.stderr
    assert result.stdout == ""
    assert sum(message in line for line in result.stderr.splitlines()) == 1, result.stderr
    assert sorted(path.name for path in work.iterdir() if path.name != "__pycache__") == before


def test_an_unreadable_image_is_named(finetune: Callable[..., Any], work: Path) -> None:
    (work / "data" / "red" / "00.png").write_bytes(b"not an image")
    result = finetune("t.svf.safetensors", "--steps", 1)
    assert result.exit_code == 6
    assert "red/00.png" in result.stderr
    assert not (work / "t.svf.safetensors").exists()


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_saves_what_was_trained(work: Path, signum: int, code: int) -> None:
    target = work / "t.svf.safetensors"
    words = ["finetune", work / "factors", "-o", target, "--data", work / "data", "--shots", 3]
    words += ["--model", f"{work / 'net.py'}:net", "--steps", 1000000, "--save-every", 5, "--json"]
    process = start(list(map(str, words)), work)
    deadline = time.monotonic() + 120
    while not list(work.glob("*.partial.runs/states/*")):
        assert not process.ended, process.stderr
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send(signum)
    assert process.wait() == code, process.stderr
    assert "Traceback" not in process.stderr
    assert "saving what was trained" in process.stderr
    document = json.loads(process.stdout)
    assert document["interrupted"] == signal.Signals(signum).name
    only = document["runs"][0]
    assert only["ending"] == "interrupted"
    assert 0 < only["steps"] < 1000000
    assert read_tuned(target).training["steps"] == only["steps"]
    left = [path.name for path in work.glob("*.partial*")]
    assert left == [f"{target.name}.partial.runs"]
