"""``svftool demo``: once in full, its files, its numbers and the commands that it shows."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from svftool.checkpoints import fingerprint_checkpoint, open_checkpoint
from svftool.cli import app
from svftool.factors import read_tuned

pytest.importorskip("sklearn")
# What the demo made is shared, so its tests stay in one process.
pytestmark = pytest.mark.xdist_group("demo")

runner = CliRunner()


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Run the demo once; give its folder and its document."""
    folder = tmp_path_factory.mktemp("my digits") / "demo"
    result = runner.invoke(app, ["demo", str(folder), "--json", "-q"])
    assert result.exit_code == 0, result.stderr
    return folder, json.loads(result.stdout)


def test_every_step_is_shown(shown: tuple[Path, dict[str, Any]]) -> None:
    _, document = shown
    assert (document["command"], document["schema_version"]) == ("demo", 1)
    names = [step["name"] for step in document["steps"]]
    assert names == ["pretrain", "decompose", "finetune", "merge", "inspect"]
    assert document["steps"][0]["result"]["accuracy"] > 0.9
    for step in document["steps"][1:]:
        assert step["result"]["command"] == step["name"]
        assert step["command"].startswith(f"svftool {step['name']} ")


def test_tuning_is_measured_and_helps(shown: tuple[Path, dict[str, Any]]) -> None:
    folder, document = shown
    tuned = document["steps"][2]["result"]
    assert [row["regime"] for row in tuned["summary"]] == ["head", "svf", "full"]
    assert all(row["mean"] > row["before"] for row in tuned["summary"])
    assert tuned["summary"][1]["trainable_parameters"] < 500
    expert = read_tuned(folder / "runs" / "svf-seed0.svf.safetensors")
    assert expert.classes == ("6", "7", "8", "9")
    assert load_file(folder / "merged.safetensors")["fc.weight"].shape == (4, 64)
    assert document["steps"][3]["result"]["verified"] is True


def test_the_commands_shown_do_the_same(shown: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, document = shown
    commands = {step["name"]: shlex.split(step["command"] or "") for step in document["steps"]}
    for name, target in (("decompose", "factors"), ("merge", "merged.safetensors")):
        words = commands[name][1:]
        words[words.index("-o") + 1] = str(tmp_path / target)
        assert runner.invoke(app, words).exit_code == 0
    prints = []
    for path in (folder / "merged.safetensors", tmp_path / "merged.safetensors"):
        with open_checkpoint(path) as opened:
            prints.append(fingerprint_checkpoint(opened))
    assert prints[0] == prints[1]
    words = commands["finetune"][1:]
    words[words.index("-o") + 1] = str(tmp_path / "one.svf.safetensors")
    words[words.index("--seeds") + 1] = "1"
    words[words.index("--regime") + 1] = "svf"
    assert runner.invoke(app, words).exit_code == 0
    mine = (tmp_path / "one.svf.safetensors").read_bytes()
    assert mine == (folder / "runs" / "svf-seed0.svf.safetensors").read_bytes()
    assert runner.invoke(app, commands["inspect"][1:]).exit_code == 0


def test_other_peoples_folders_are_left_alone(
    shown: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, _ = shown
    again = runner.invoke(app, ["demo", str(folder)])
    assert again.exit_code == 2
    assert "Replace it with --force" in again.stderr
    (tmp_path / "thesis.txt").write_text("mine")
    for options in ([], ["--force"]):
        refused = runner.invoke(app, ["demo", str(tmp_path), *options])
        assert refused.exit_code == 2
        assert "holds other files" in refused.stderr
    assert (tmp_path / "thesis.txt").read_text() == "mine"
