"""``svftool demo``: once in full, its files, its numbers and the commands that it shows."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from svftool.checkpoints import fingerprint_checkpoint, open_checkpoint
from svftool.cli import app
from svftool.factors import read_tuned

pytest.importorskip("sklearn")

DOCS = Path(__file__).resolve().parents[1] / "docs"
sys.path.insert(0, str(DOCS))
import transcript  # noqa: E402

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


_NUMBER = re.compile(r"-?\+?\d[\d,]*(?:\.\d+)?(?:e[-+]\d+)?")
_VARIES = re.compile(r"\b[0-9a-f]{12}\b|\d[\d.]* (?:ms|s|min|kB|MB|GB)\b|[\u2581-\u258f\u2588]+")
"""Times, memory, fingerprints, and the bars whose heights follow the last digits."""


def _words_and_numbers(text: str) -> tuple[list[str], list[str]]:
    plain = _VARIES.sub("~", " ".join(text.split()))
    return _NUMBER.sub("0", plain).split(), _NUMBER.findall(plain)


def agrees(shown: str, output: str) -> bool:
    """Tell whether two outputs are the same up to times, memory and last digits."""
    (words, numbers), (others, values) = map(_words_and_numbers, (shown, output))
    pairs = zip(numbers, values, strict=False)
    return words == others and len(numbers) == len(values) and all(_near(a, b) for a, b in pairs)


def _near(shown: str, output: str) -> bool:
    number, other = (float(one.replace(",", "")) for one in (shown, output))
    # What was trained on another processor differs by an image or two, in per cent.
    room = max(2.0, 0.01 * abs(number)) if abs(number) > 4 else max(0.05 * abs(number), 2e-7)
    if "." in shown and "e" not in shown:
        room = max(room, 1.01 * 10.0 ** -len(shown.partition(".")[2]))  # one more of the last digit
    return abs(number - other) <= room


def test_outputs_that_differ_are_told_apart() -> None:
    assert agrees("head 67.6 5 ms 10.1 MB ██▅", "head  67.5 12 ms 9.3 MB █▅▅")
    assert agrees("8 2.9, 7 0.5", "8 3.0, 7 0.4")
    assert not agrees("8 2.9, 7 0.5", "8 2.9, 7 0.7")
    assert not agrees("head 67.6", "svf 67.6")
    assert not agrees("head 67.6", "head 47.6")
    assert not agrees("3 tensors changed", "30 tensors changed")
    assert not agrees("head 67.6", "head 67.6 1")


def test_the_readme_runs_in_order_and_prints_what_stands_there(
    shown: tuple[Path, dict[str, Any]],
) -> None:
    folder, _ = shown
    stored = (DOCS / "transcript.md").read_text(encoding="utf-8")
    ran = list(transcript.run_all(folder.parent))
    assert len(ran) >= 6
    for one in ran:
        assert one.exit_code == 0, one
        assert not one.line.shown or agrees(one.line.shown, one.output), one
        start = stored.index(f"$ {one.line.command}\n")
        kept = stored[start:].partition("\n```")[0].partition("\n")[2]
        assert agrees(kept, one.output), one
