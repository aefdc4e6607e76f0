"""What is wrong with a command line is one line, and is said before anything heavy is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import svftool
from svftool.auditing import METRICS
from svftool.choices.metrics import CHANGE, SPECTRUM
from svftool.cli import app

SAID = {
    "decompse x": "No such command 'decompse'. Did you mean 'decompose'?",
    "frobnicate": "No such command 'frobnicate'. See 'svftool --help'.",
    "--versoin": "--versoin: no such option. Did you mean '--version'?",
    "merge": "FACTORS: missing. See 'svftool merge --help'.",
    "merge f t": "--output: missing. See 'svftool merge --help'.",
    "merge f -o": "Option '-o' requires an argument.",
    "inspect": "BASE: missing. See 'svftool inspect --help'.",
    "inspect a -Z": "-Z: no such option. See 'svftool inspect --help'.",
    "inspect a b --fial-above x=1": "--fial-above: no such option. Did you mean '--fail-above'?",
    "inspect a --top 0": "--top: 0, expected at least 1.",
    "inspect a --json=1": "Option '--json' does not take a value.",
    "info a b": "Got unexpected extra argument(s) (b). See 'svftool info --help'.",
    "decompose a -o f --method grm": "--method: 'grm', expected one of auto, exact, randomized.",
    "finetune f -o r --data d --task clasification": "Did you mean 'classification'?",
    "finetune f -o r --data d --regimes svf": "--regimes: no such option. Did you mean '--regime'?",
}


@pytest.mark.parametrize("line", SAID)
def test_a_wrong_command_line_is_one_line(line: str) -> None:
    ended = CliRunner().invoke(app, line.split(), prog_name="svftool")
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.rstrip().endswith(SAID[line])


def test_nothing_at_all_is_answered_with_the_help() -> None:
    ended = CliRunner().invoke(app, [], prog_name="svftool")
    assert ended.exit_code == 2
    assert "Usage: svftool" in ended.stderr
    assert "error:" not in ended.stderr


WRONG = {
    "inspect B B --fail-above drift=0.1": "Did you mean 'weight_drift'?",
    "inspect B B --fail-above weight_drift=x": "no number after the metric",
    "inspect B B --fail-above cosine.base=1": "cosine compares both sides",
    "inspect B B --sort drif": "metric 'drif'",
    "inspect B B --metrics cosine,foo": "metric 'foo'",
    "inspect B B --policy nope.toml": "nope.toml: no such file, expected a policy in TOML",
    "inspect B B --annotate gitlab": "Did you mean 'github'?",
    "inspect B B --plot x.bmp": "suffix '.bmp', expected .png, .svg, .pdf",
    "inspect B B --image x.png": "--image is looked at by --feature-maps alone",
    "inspect B B --csv base.safetensors": "base.safetensors: ",
    "decompose B -o new --rank x": "rank 'x', expected 'full'",
    "decompose B -o new --rank energy:2": "rank 'energy:2'",
    "decompose B -o new --dtype int8": "--dtype: 'int8', expected one of float32",
    "decompose B -o new --max-shard-size many": "size 'many'",
    "extract B B -o new --as lora --rank x": "rank 'x', expected a count such as 64",
    "extract B B -o new --as lora --max-rank 0": "--max-rank: 0, expected at least 1",
    "extract B B -o new --as lora --layout koya": "Did you mean 'kohya'?",
    "extract B B -o new --as lora --dtype int8": "--dtype: 'int8', expected one of float32",
    "extract B B -o new --as lor": "Did you mean 'lora'?",
    "extract B B -o new --rank 4": "--rank is an option of --as lora",
    "convert B -o new --rank energy:2": "rank 'energy:2', expected a count such as 64",
    "convert B -o new --layout koya": "Did you mean 'kohya'?",
    "convert B -o new --dtype int8": "--dtype: 'int8', expected one of float32",
    "merge F -o new --dtype int8": "--dtype: 'int8', expected one of float32",
    "lineage B": "one checkpoint, expected two or more",
    "inspect B B --screen --fast": "--screen and --fast",
    "inspect B B --screen --metrics alpha": "metric 'alpha' is not measured by --screen",
    "finetune F -o new --data data --regime foo": "regime 'foo', expected one of head",
    "finetune F -o new --data data --lr -1": "--lr is -1.0, expected more than 0",
    "finetune F -o new --data data --steps 0": "--steps is 0, expected more than 0",
    "finetune F -o new --data data --steps 99999999999999999999": "--steps is over 1000000000",
    "finetune F -o new --data data --epochs 1e300": "--epochs is over 1000000000",
    "finetune F -o new --data data --steps 1 --epochs 1": "--steps and --epochs",
    "finetune F -o new --data data --shots 0": "--shots is 0, expected at least 1",
    "finetune F -o new --data data --train-rank x": "train rank 'x', expected 'top:N'",
    "finetune F -o new --data data --model x": "model 'x', expected 'auto'",
    "evaluate F --data data --model x": "model 'x', expected 'auto'",
    "predict F data --model x": "model 'x', expected 'auto'",
}
"""B is a checkpoint, F its factors, data a data set."""

QUICK = """
import io, json, sys
from contextlib import redirect_stderr
from svftool.cli import app
found = []
for line in json.load(sys.stdin):
    text = io.StringIO()
    with redirect_stderr(text):
        try:
            app(line.split(), prog_name="svftool")
        except SystemExit as end:
            found.append([end.code, text.getvalue(), "torch" in sys.modules])
json.dump(found, sys.stdout)
"""


def test_wrong_options_are_refused_before_torch_is_imported(tmp_path: Path) -> None:
    save_file({"layer.weight": torch.eye(4)}, tmp_path / "base.safetensors")
    svftool.decompose(tmp_path / "base.safetensors", tmp_path / "factors")
    (tmp_path / "data" / "one").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "data" / "one" / "0.png")
    places = {"B": "base.safetensors", "F": "factors"}
    lines = [" ".join(places.get(word, word) for word in line.split()) for line in WRONG]
    ran = subprocess.run(
        [sys.executable, "-c", QUICK],
        input=json.dumps(lines), cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    ended = dict(zip(WRONG, json.loads(ran.stdout), strict=True))
    for line, (code, text, heavy) in ended.items():
        assert (code, heavy) in ((2, False), (7, False)), (line, text)
        assert WRONG[line] in text, (line, text)
        assert len(text.splitlines()) == 1


def test_names_of_metrics_are_those_that_are_computed() -> None:
    kinds = {"spectrum": SPECTRUM, "change": CHANGE}
    for kind, names in kinds.items():
        assert sorted(names) == sorted(one.name for one in METRICS.values() if one.kind == kind)
