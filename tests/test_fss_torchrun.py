"""Few-shot segmentation under ``torchrun``: two processes share batches and test episodes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import shapes
from launch import torchrun
from safetensors.torch import save_file
from typer.testing import CliRunner

from svftool.cli import app
from svftool.factors import read_tuned

pytest.importorskip("accelerate")
pytestmark = pytest.mark.skipif(os.name == "nt", reason="gloo through torchrun")

EPISODES = 25
"""An odd number, as of a batch: the shares of two processes are not equal."""


def run(*words: object) -> Any:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with pictures and the factors of a small network."""
    work = tmp_path_factory.mktemp("work")
    (work / "pairs").mkdir()
    shapes.write_shapes(work / "pairs")
    save_file(shapes.SmallNet().state_dict(), work / "base.safetensors", {"format": "pt"})
    run("decompose", work / "base.safetensors", "-o", work / "factors", "--json")
    return work


def rules(work: Path, *options: object) -> list[object]:
    words = ["--data", work / "pairs", "--task", "few-shot-segmentation", "--width", 16]
    words += ["--model", f"{shapes.__file__}:SmallNet", "--image-size", 65, "--json"]
    return [*words, "--test-episodes", EPISODES, "--test-shots", 2, *options]


def in_two(*words: object) -> list[dict[str, Any]]:
    process = torchrun([str(word) for word in words])
    stdout, stderr = process.communicate(timeout=180)
    assert process.returncode == 0, stderr
    return json.loads(stdout)["runs"]


@pytest.mark.parametrize(
    ("host", "more"), [("baseline", ()), ("pfenet", ()), ("bam", ("--base-steps", 3))]
)
def test_two_processes_score_as_one_does(work: Path, host: str, more: tuple[object, ...]) -> None:
    options = rules(work, "--host", host, "--fold", 1, *more)
    training = ["--select-episodes", 7, "--steps", 6, "--batch-size", 3, "--lr", 0.01]
    out = work / host
    runs = in_two(
        "finetune", work / "factors", "-o", out, "--regime", "svf,head", *training, *options
    )
    for one in runs:
        tuned = Path(one["output"])
        told = run("evaluate", work / "factors", "--tuned", tuned, *options)
        # Whole pixels are summed: nothing but a decision at the brink can differ.
        assert one["metrics"]["after"] == pytest.approx(told["runs"][0]["metrics"], abs=2e-3)
        assert one["metrics"]["after"] != pytest.approx(one["metrics"]["before"], abs=0.01)
    singular = read_tuned(out / "fold1-1shot-svf-seed0.svf.safetensors")
    assert min(float((singular.S[n] - singular.S_base[n]).abs().max()) for n in singular.S) > 0
