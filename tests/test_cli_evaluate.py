"""``svftool evaluate`` as a user meets it, on a small network and coloured pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pictures import write_pictures
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import svftool
from svftool.cli import app

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

class Backbone(Net):
    def __init__(self):
        super().__init__(3)
        del self.fc

    def forward(self, images):
        return self.bn(self.conv(images)).relu().mean((2, 3))

def three():
    return Net(3)

def five():
    return Net(5)

def backbone():
    return Backbone()
"""

TRAINING = ["--shots", 3, "--steps", 25, "--lr", 0.02, "--head-lr", 0.05]


def run(*args: object) -> Any:
    return runner.invoke(app, [str(arg) for arg in args])


def succeed(*args: object) -> Any:
    result = run(*args)
    assert result.exit_code == 0, result.stderr
    return result


Tune = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """Return a function that decomposes and tunes a model of `MODEL` in a folder, each once."""

    @cache
    def make(model: str, *options: object) -> tuple[Path, dict[str, Any]]:
        work = tmp_path_factory.mktemp("made")
        (work / "net.py").write_text(MODEL)
        write_pictures(work / "data", count=8)
        scope: dict[str, Any] = {}
        exec(compile(MODEL, "net.py", "exec"), scope)
        save_file(scope[model]().state_dict(), work / "base.safetensors", {"format": "pt"})
        succeed("decompose", work / "base.safetensors", "-o", work / "factors", "-q")
        fixed = ["-o", work / "t.svf.safetensors", "--model", f"{work}/net.py:{model}"]
        fixed += ["--data", work / "data", *TRAINING, "--json"]
        result = succeed("finetune", work / "factors", *fixed, *options)
        return work, json.loads(result.stdout)["runs"][0]

    return make


@pytest.fixture
def tune(made: Callable[..., tuple[Path, dict[str, Any]]], tmp_path: Path) -> Tune:
    """Return a function that puts what `made` makes into the test's folder, and gives the run."""

    def call(model: str = "three", *options: object) -> dict[str, Any]:
        work, measured = made(model, *options)
        shutil.copytree(work, tmp_path, dirs_exist_ok=True)
        return measured

    return call


def evaluate(work: Path, checkpoint: str, *options: object, model: str = "three") -> Any:
    fixed = ["--model", f"{work}/net.py:{model}", "--data", work / "data"]
    return run("evaluate", work / checkpoint, *fixed, *options)


def metrics(result: Any) -> dict[str, float]:
    assert result.exit_code == 0, result.stderr
    return dict(json.loads(result.stdout)["runs"][0]["metrics"])


def tuned(work: Path) -> list[object]:
    return ["--tuned", work / "t.svf.safetensors", "--json"]


@pytest.mark.parametrize(("regime", "seed"), [("svf", 0), ("head", 3), ("svf+norm", 0)])
def test_factors_and_tuned_give_the_metrics_of_the_fine_tune(
    tune: Tune, tmp_path: Path, regime: str, seed: int
) -> None:
    measured = tune("three", "--regime", regime, "--seed", seed, "--head", "keep")["metrics"]
    options = ["--shots", 3, "--seed", seed]
    found = metrics(evaluate(tmp_path, "factors", *tuned(tmp_path), *options))
    assert found == pytest.approx(measured["after"], rel=1e-5)
    assert measured["after"]["loss"] < measured["before"]["loss"]
    base = metrics(evaluate(tmp_path, "factors", *options, "--json"))
    assert base == pytest.approx(measured["before"], rel=1e-5)


def test_the_merged_checkpoint_gives_them_too(tune: Tune, tmp_path: Path) -> None:
    measured = tune("three", "--head", "keep")["metrics"]
    merged = tmp_path / "merged.safetensors"
    succeed("merge", tmp_path / "factors", tmp_path / "t.svf.safetensors", "-o", merged)
    found = metrics(evaluate(tmp_path, "merged.safetensors", "--shots", 3, "--json"))
    assert found == pytest.approx(measured["after"], rel=1e-4)
    dense = metrics(evaluate(tmp_path, "base.safetensors", "--shots", 3, "--json"))
    assert dense == pytest.approx(measured["before"], rel=1e-5)


@pytest.mark.parametrize("model", ["five", "backbone"])
def test_a_merged_checkpoint_brings_its_new_head(tune: Tune, tmp_path: Path, model: str) -> None:
    measured = tune(model, "--head-type", "linear")["metrics"]
    merged = tmp_path / "merged.safetensors"
    succeed("merge", tmp_path / "factors", tmp_path / "t.svf.safetensors", "-o", merged)
    found = metrics(evaluate(tmp_path, merged.name, "--shots", 3, "--json", model=model))
    assert found == pytest.approx(measured["after"], rel=1e-4)


@pytest.mark.parametrize("model", ["five", "backbone"])
def test_the_base_has_no_head_for_the_data(tune: Tune, tmp_path: Path, model: str) -> None:
    tune(model, "--head-type", "linear")
    for checkpoint in ("factors", "base.safetensors"):
        result = evaluate(tmp_path, checkpoint, model=model)
        assert (result.exit_code, result.stdout) == (7, "")
        assert "no head for the data's 3 classes" in result.stderr


@pytest.mark.parametrize("model", ["five", "backbone"])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_new_head_comes_with_the_tuned_file(
    tune: Tune, tmp_path: Path, model: str, kind: str
) -> None:
    measured = tune(model, "--head-type", kind)["metrics"]
    options = [*tuned(tmp_path), "--shots", 3]
    found = metrics(evaluate(tmp_path, "factors", *options, model=model))
    assert found == pytest.approx(measured["after"], rel=1e-5)


def test_data_that_lacks_a_class_is_measured_by_the_tuned_files_own(
    tune: Tune, tmp_path: Path
) -> None:
    tune("five")
    rows = tmp_path / "all.jsonl"
    every = evaluate(tmp_path, "factors", *tuned(tmp_path), "--predictions", rows, model="five")
    assert every.exit_code == 0, every.stderr
    shutil.rmtree(tmp_path / "data" / "blue")
    found = metrics(evaluate(tmp_path, "factors", *tuned(tmp_path), model="five"))
    kept = [row for row in map(json.loads, rows.read_text().splitlines()) if row["label"] != "blue"]
    right = sum(row["label"] == row["prediction"] for row in kept)
    assert found["accuracy"] == pytest.approx(right / len(kept))


def test_predictions_are_one_row_an_image(tune: Tune, tmp_path: Path) -> None:
    tune()
    file = tmp_path / "p.jsonl"
    result = evaluate(tmp_path, "factors", *tuned(tmp_path), "--predictions", file)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    images = list((tmp_path / "data").rglob("*.png"))
    assert sorted(row["file"].rpartition("/")[2] for row in rows) == sorted(p.name for p in images)
    right = sum(row["label"] == row["prediction"] for row in rows)
    assert right / len(rows) == pytest.approx(metrics(result)["accuracy"])
    assert json.loads(result.stdout)["predictions"] == str(file)
    again = evaluate(tmp_path, "factors", *tuned(tmp_path), "--predictions", file)
    assert (again.exit_code, again.stdout) == (2, "")
    assert "--force" in again.stderr
    forced = evaluate(tmp_path, "factors", *tuned(tmp_path), "--predictions", file, "--force")
    assert forced.exit_code == 0, forced.stderr


def test_the_table_fits_a_terminal(tune: Tune, tmp_path: Path) -> None:
    tune()
    result = evaluate(tmp_path, "factors", "--tuned", tmp_path / "t.svf.safetensors")
    assert result.exit_code == 0, result.stderr
    assert "accuracy %" in result.stdout
    assert "loss" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_json_holds_the_promised_keys(tune: Tune, tmp_path: Path) -> None:
    tune()
    document = json.loads(evaluate(tmp_path, "factors", *tuned(tmp_path)).stdout)
    assert (document["command"], document["schema_version"]) == ("evaluate", 1)
    assert {"task", "metric", "checkpoint", "tuned", "setting", "runs"} <= document.keys()
    assert document["metric"] == "accuracy"
    assert document["predictions"] is None
    assert document["runs"][0].keys() == {"seed", "shots", "metrics", "seconds"}
    assert document["setting"]["image_size"] == [16, 16]


def test_the_library_gives_what_the_command_does(tune: Tune, tmp_path: Path) -> None:
    tune()
    result = svftool.evaluate(
        tmp_path / "factors",
        tuned=tmp_path / "t.svf.safetensors",
        data=tmp_path / "data",
        model=f"{tmp_path}/net.py:three",
    )
    found = metrics(evaluate(tmp_path, "factors", *tuned(tmp_path)))
    assert dict(result.runs[0].metrics) == found


def test_another_size_than_in_training_is_said(tune: Tune, tmp_path: Path) -> None:
    tune()
    result = evaluate(tmp_path, "factors", *tuned(tmp_path), "--image-size", 24)
    assert result.exit_code == 0, result.stderr
    assert "image size is [24, 24]" in result.stderr


def test_a_tuned_file_of_another_base_is_refused(tune: Tune, tmp_path: Path) -> None:
    tune()
    weights = load_file(tmp_path / "base.safetensors")
    save_file({n: 2 * v for n, v in weights.items()}, tmp_path / "b.safetensors", {"format": "pt"})
    succeed("decompose", tmp_path / "b.safetensors", "-o", tmp_path / "others", "-q")
    result = evaluate(tmp_path, "others", *tuned(tmp_path))
    assert (result.exit_code, result.stdout) == (4, "")
    assert "was trained on the base" in result.stderr


@pytest.mark.parametrize(
    ("checkpoint", "options", "code", "message"),
    [
        ("factors", ["--shots", 8], 6, "leave none to measure with"),
        ("factors", ["--shots", 9], 6, "expected at least 9"),
        ("factors", ["--task", "language"], 6, ""),
        ("factors", ["--fold", "1"], 2, "--fold has no meaning"),
        ("nowhere", [], 3, "no such file"),
        ("base.safetensors", ["--tuned", "t.svf.safetensors"], 2, "expected factors"),
        ("base.safetensors", ["--classes", "two.txt"], 6, "unknown class green"),
        ("base.safetensors", ["--classes", "four.txt"], 7, "no head for the data's 4 classes"),
        ("base.safetensors", ["--predictions", "data/p.jsonl"], 2, "inside the input"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    tune: Tune,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: str,
    options: list[object],
    code: int,
    message: str,
) -> None:
    tune()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.txt").write_text("blue\nred\n")
    (tmp_path / "four.txt").write_text("blue\ngreen\nred\nwhite\n")
    before = sorted(tmp_path.rglob("*"))
    result = evaluate(tmp_path, checkpoint, *options)
    assert (result.exit_code, result.stdout) == (code, ""), result.stderr
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert [path for path in sorted(tmp_path.rglob("*")) if "__pycache__" not in str(path)] == [
        path for path in before if "__pycache__" not in str(path)
    ]
