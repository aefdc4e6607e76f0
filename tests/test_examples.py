"""The example scripts run on the real data, each in a few steps."""

from __future__ import annotations

import json
import os
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "metric"), [("classification.sh", "accuracy"), ("segmentation.sh", "miou")]
)
def test_images(example: Any, name: str, metric: str) -> None:
    output = example(name, "--steps", "2", "--image-size", "48")
    runs = json.loads((output / "runs" / "results.json").read_text())["runs"]
    assert [run["regime"] for run in runs] == ["head", "svf"]
    assert all(0 < run["metrics"]["after"][metric] < 1 for run in runs)
    assert (output / "merged.safetensors").is_file()
