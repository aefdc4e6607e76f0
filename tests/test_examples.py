"""The example scripts run on the real data, each in a few steps."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from svftool.factors import read_tuned

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

pytestmark = pytest.mark.skipif(os.name == "nt", reason="shell scripts")


@pytest.fixture
def example(data: Path, tmp_path: Path) -> Any:
    """Return a caller of an example script, with ``svftool`` on the path."""
    command = tmp_path / "bin" / "svftool"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m svftool "$@"\n')
    command.chmod(0o755)
    path = os.pathsep.join([str(command.parent), os.environ["PATH"]])
    source = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])

    def call(name: str, *options: str) -> Path:
        output = tmp_path / "output"
        result = subprocess.run(
            ["bash", str(EXAMPLES / name), str(data), str(output), *options],
            env={**os.environ, "PATH": path, "PYTHONPATH": source},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return output

    return call


@pytest.mark.slow
def test_language(example: Any, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    passages = (data / "text" / "shakespeare_eval.jsonl").read_text().splitlines()[:8]
    (tmp_path / "few.jsonl").write_text("\n".join(passages))
    output = example("language.sh", "--steps", "8", "--eval", str(tmp_path / "few.jsonl"))
    metrics = read_tuned(output / "play.svf.safetensors").training["metrics"]
    assert metrics["after"]["perplexity"] < 0.8 * metrics["before"]["perplexity"]
    assert (output / "merged" / "tokenizer.json").is_file()


def few(source: Path, target: Path, names: str, count: int) -> Path:
    """Copy the first files of every folder below `source`, so that measuring takes no time."""
    for folder in sorted({file.parent for file in source.rglob(names)}):
        place = target / folder.relative_to(source)
        place.mkdir(parents=True)
        for file in sorted(folder.glob(names))[:count]:
            shutil.copy(file, place)
    return target


def check(output: Path, metric: str) -> None:
    runs = json.loads((output / "runs" / "results.json").read_text())["runs"]
    assert [run["regime"] for run in runs] == ["head", "svf"]
    assert all(0 < run["metrics"]["after"][metric] < 1 for run in runs)
    assert (output / "merged.safetensors").is_file()


@pytest.mark.slow
def test_classification(example: Any, data: Path, tmp_path: Path) -> None:
    queries = few(data / "images" / "dtd10", tmp_path / "few", "*.jpg", 4)
    quick = ["--steps", "2", "--image-size", "48", "--eval", str(queries)]
    check(example("classification.sh", *quick), "accuracy")


@pytest.mark.slow
def test_segmentation(example: Any, data: Path, tmp_path: Path) -> None:
    queries = few(data / "images" / "camvid" / "test", tmp_path / "few", "*.*", 4)
    quick = ["--steps", "2", "--image-size", "48", "--eval", str(queries)]
    check(example("segmentation.sh", *quick), "miou")
