"""What a shell proposes after TAB: commands, options, values of closed sets; no help, no errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import typer
from typer.testing import CliRunner

from svftool.choices import regimes
from svftool.choices.dtypes import DTYPES
from svftool.choices.metrics import check_metric
from svftool.cli import NAMES, app, completion
from svftool.cli.values import taken_by
from svftool.numerics import decompose
from svftool.report.annotations import KINDS
from svftool.report.schemas import described
from svftool.tasks.option import TaskName
from svftool.tasks.options import TASKS
from svftool.version import __version__

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def proposed(line: str) -> list[str]:
    """Complete the last word of a line, which may be empty."""
    words = line.split(" ")
    asked = {"_SVFTOOL_COMPLETE": "complete_bash", "COMP_WORDS": line}
    asked["COMP_CWORD"] = str(len(words) - 1)
    result = CliRunner(env=asked).invoke(app, [], prog_name="svftool")
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout.split()


def test_commands() -> None:
    assert proposed("svftool ") == list(NAMES)
    assert proposed("svftool in") == ["inspect", "info"]


@pytest.mark.parametrize("name", NAMES)
def test_options_of_every_command(name: str) -> None:
    flags = {flag for one in COMMANDS[name].params for flag in one.opts if flag[:2] == "--"}
    assert flags <= set(proposed(f"svftool {name} --"))


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("finetune f --task ", get_args(TaskName)),
        ("predict f x --task seg", ["segmentation"]),
        ("finetune f --optimizer ", ["adamw", "sgd"]),
        ("finetune f --precision bf", ["bf16"]),
        ("finetune f --regime ", completion.REGIMES),
        (
            "finetune f --regime head,sv",
            ["head,svf", "head,svf+scale", "head,svf+bias", "head,svf+norm"],
        ),
        ("finetune f --regime svf,svf", ["svf,svf+scale", "svf,svf+bias", "svf,svf+norm"]),
        ("finetune f --log-with tens", ["tensorboard"]),
        ("finetune f --model ti", ["timm:"]),
        ("decompose f --device ", ["auto", "cpu", "cuda"]),
        ("decompose f --method ", get_args(decompose.Method)),
        ("decompose f --dtype ", DTYPES),
        ("decompose f --rank e", ["energy:0.99"]),
        ("inspect a b --metrics weight", ["weight_drift"]),
        ("inspect a b --metrics all", ["all"]),
        ("inspect a b --metrics cka,weight", ["cka,weight_drift"]),
        ("inspect a b --sort spectral_d", ["spectral_drift"]),
        ("inspect a b --fail-above rounding", ["rounding_floor="]),
        ("inspect a b --annotate git", ["github"]),
        ("schema ", described()),
        # Words before the last one that would answer, or be refused, if the line ran.
        ("--version in", ["inspect", "info"]),
        ("finetune f --help-all --res", ["--resume"]),
        ("finetune f --help --res", ["--resume"]),
        ("finetune f --config missing.toml --res", ["--resume"]),
        ("finetune f --no-such --task seg", ["segmentation"]),
    ],
)
def test_values(line: str, values: list[str]) -> None:
    assert proposed(f"svftool {line}") == list(values)


@pytest.mark.parametrize("task", TASKS)
def test_every_option_of_few_values_completes(task: str) -> None:
    command = COMMANDS["finetune"]
    taken = taken_by(command.callback)
    several = {one.opts[-1]: found for one in command.params if (found := taken[one.name].choices)}
    assert "--task" in several
    for flag, choices in several.items():
        assert proposed(f"svftool finetune f --task {task} {flag} ") == list(choices)


def test_what_is_proposed_is_taken() -> None:
    for regime in completion.REGIMES:
        regimes.parse_regime(regime)
    assert {one.partition(":")[0] for one in completion.REGIMES} == {
        one.partition(":")[0] for one in regimes.NAMES.split(", ")
    }
    for name in completion.metric(""):
        check_metric(name)
    assert set(KINDS) == {one.rstrip("=") for one in proposed("svftool inspect a --annotate ")}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell(shell: str) -> None:
    asked = {"_SVFTOOL_COMPLETE": f"source_{shell}"}
    result = CliRunner(env=asked).invoke(app, [], prog_name="svftool")
    assert result.exit_code == 0
    assert f"_SVFTOOL_COMPLETE=complete_{shell}" in result.stdout
    text = CliRunner().invoke(app, ["--help"]).stdout
    assert "--install-completion" in text
    assert "--show-completion" in text


def test_the_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"svftool {__version__}\n", "")


LIGHT = """
import os, sys
from svftool.cli import app
for words in ("finetune f --regime s", "inspect a --metrics w", "predict f x --task ", "schema "):
    line = "svftool " + words
    os.environ |= {"_SVFTOOL_COMPLETE": "complete_bash", "COMP_WORDS": line}
    os.environ["COMP_CWORD"] = str(line.count(" "))
    try:
        app([], prog_name="svftool")
    except SystemExit as end:
        assert end.code == 0
del os.environ["_SVFTOOL_COMPLETE"]
for words in (["schema"], ["schema", "demo"], ["--version"]):
    try:
        app(words)
    except SystemExit as end:
        assert end.code == 0
print([name for name in ("torch", "numpy", "scipy", "jsonschema") if name in sys.modules])
"""


def test_completion_and_schemas_import_nothing_heavy() -> None:
    ran = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"
    assert {"svf", "weight_drift", "segmentation"} <= set(ran.stdout.split())


def test_completion_is_installed_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    # What started the tests is no shell, so the shell is named.
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    shown = CliRunner().invoke(app, ["--show-completion", "bash"], prog_name="svftool")
    assert (shown.exit_code, shown.stderr) == (0, "")
    done = CliRunner().invoke(app, ["--install-completion", "bash"], prog_name="svftool")
    assert (done.exit_code, done.stderr) == (0, "")
    (script,) = tmp_path.rglob("svftool.sh")
    assert script.read_text().strip() == shown.stdout.strip()
    assert str(script) in (tmp_path / ".bashrc").read_text()
