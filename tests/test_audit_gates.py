"""Gates and policies: what each rule held, what holds nothing, and who is told."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import torch
from model_names import NAMES, named
from safetensors.torch import save_file
from typer.testing import CliRunner

from svftool.auditing import AuditResult, Comparison, Measured, Row, Unread, Verdict
from svftool.auditing.gatekeeper import Gatekeeper, close
from svftool.choices.metrics import metric_names
from svftool.cli import app
from svftool.errors import GateError, UsageError
from svftool.report.inspect import document
from svftool.report.inspect.gates import github, junit

POLICY = Path(__file__).parents[1] / "examples" / "audit-policy.toml"


def row(name: str, verdict: str, *, drift: float | None = 0.0, matrix: bool = True) -> Row:
    """Return a row as an audit has it, made of its name and verdict."""
    change = {"weight_drift": drift, "relative_drift": drift, "intruders": 0.0 if matrix else None}
    change |= {"svf_share": None if verdict == "untouched" else 0.5}
    return Row(
        name,
        view="matrix" if matrix else None,
        measured=Measured(change=change),
        verdict=Verdict(verdict, "high", "for a test"),
    )


def result(*rows: Row, lost: tuple[Unread, ...] = ()) -> AuditResult:
    one = Comparison(Path("base"), Path("tuned"), ("checkpoint",) * 2, rows, unmatched_base=lost)
    return AuditResult((one,), ("weight_drift", "relative_drift", "svf_share", "intruders"))


def keeper(tmp_path: Path, text: str = "", gates: tuple[str, ...] = ()) -> Gatekeeper:
    if not text:
        return Gatekeeper.read(gates, None)
    path = tmp_path / "policy.toml"
    path.write_text(text)
    return Gatekeeper.read(gates, path)


# A rule that holds nothing.


@pytest.mark.parametrize(
    ("rule", "passes"),
    [
        ('layers = "a.*"\nallow = ["untouched"]', True),
        ('layers = "encoder.*"\nallow = ["untouched"]', False),
        ('layers = "encoder.*"\nallow = ["untouched"]\noptional = true', True),
        ('layers = "*.bias"\nlimits = { intruders = 2 }', False),
        ('layers = "*.bias"\nlimits = { intruders = 2 }\noptional = true', True),
        ('layers = "*"\ndeny = ["broken"]\nlimits = { alpha = 6 }', False),
        ('layers = "*"\nlimits = { svf_share = 0.9 }', True),
    ],
)
def test_a_rule_that_holds_nothing_fails_unless_it_is_optional(
    tmp_path: Path, rule: str, passes: bool
) -> None:
    rows = row("a.weight", "untouched"), row("a.bias", "untouched", matrix=False)
    gate = keeper(tmp_path, f"[[rule]]\n{rule}\n")
    held = gate.hold(result(*rows))
    assert held[0].passed == passes
    if passes:
        close(held)
        return
    with pytest.raises(GateError, match=r"expected at least one.*optional = true"):
        close(held)


@pytest.mark.parametrize(
    ("gate", "matched"),
    [("weight_drift=0.1", 2), ("intruders=2", 1), ("alpha=6", 0), ("effective_rank.change=9", 0)],
)
def test_a_threshold_counts_what_it_held(tmp_path: Path, gate: str, matched: int) -> None:
    rows = row("a.weight", "untouched"), row("a.bias", "untouched", matrix=False)
    held = keeper(tmp_path, gates=(gate,)).hold(result(*rows))
    assert [one.matched for one in held] == [matched, 2]
    assert held[0].passed == bool(matched)


# Offenders.


def test_an_offender_is_told_once_and_every_rule_counts_its_own(tmp_path: Path) -> None:
    text = '[[rule]]\nallow = ["untouched"]\nreason = "shared"\n[[rule]]\ndeny = ["low rank"]\n'
    rows = row("a.weight", "low rank", drift=0.3), row("b.weight", "untouched")
    found = result(*rows)
    held = keeper(tmp_path, text, ("spectral_drift=0.1",)).hold(found)
    assert [len(one.offenders) for one in held] == [1, 1, 1, 0]
    written = document(found, held=held)
    assert [one["name"] for one in written["failed"]] == ["a.weight"]
    assert [(one["matched"], one["passed"]) for one in written["gates"]] == [
        (2, False), (2, False), (2, False), (2, True),
    ]  # fmt: skip
    assert written["gates"][0]["rule"] == "spectral_drift ≤ 0.1"
    assert written["gates"][1]["offenders"] == [
        {"name": "a.weight", "found": "low rank", "reason": "shared"}
    ]


@pytest.mark.parametrize(
    ("end", "rule", "passes"),
    [
        ("", "", False),
        ("", '[[rule]]\nlayers = "head.*"\nallow = ["undecided"]\n', True),
        ('[tensors]\nunmatched = "allow"\n', "", True),
        ('[tensors]\nunmatched = "deny"\n', "", False),
    ],
)
def test_what_only_one_side_has_is_denied_unless_the_policy_names_it(
    tmp_path: Path, end: str, rule: str, passes: bool
) -> None:
    gate = keeper(tmp_path, f'[[rule]]\nlayers = "a.*"\ndeny = ["broken"]\n{rule}{end}')
    held = gate.hold(
        result(row("a.weight", "untouched"), lost=(Unread("head.weight", "not in the fine-tune"),))
    )
    assert all(one.passed for one in held) == passes
    assert ("unmatched ones: allow" in held[-1].rule) == ("allow" in end)


# The example.


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("change", ["low rank", "spectrum only", "unrelated", "full fine-tune"])
def test_the_example_policy_holds_on_the_names_of_usual_models(family: str, change: str) -> None:
    names = named(family)
    blocks = [
        name for name, count in names.items()
        if count > 1 and re.search(r"(layer|layers|h|blocks|stages)\.?_?\d", name)
    ]  # fmt: skip
    rows = [
        row(name, change if name in blocks else "untouched", drift=0.1, matrix=count > 1)
        for name, count in names.items()
    ]
    held = Gatekeeper.read((), POLICY).hold(result(*rows))
    assert all(not one.missed for one in held)
    assert held[0].matched >= len(blocks) > 0
    assert all(one.passed for one in held) == (change in ("low rank", "spectrum only"))
    refused = {item.name for item in held[0].offenders}
    assert refused == (set() if held[0].passed else set(blocks))


def test_the_example_policy_takes_a_new_head_and_no_missing_layer() -> None:
    rows = [row("layer1.0.conv1.weight", "untouched")]
    head = Unread("fc.weight", "shape (1000, 512) in the base, (7, 512) in the fine-tune")
    gate = Gatekeeper.read((), POLICY)
    assert all(one.passed for one in gate.hold(result(*rows, lost=(head,))))
    gone = Unread("layer4.0.conv1.weight", "not in the fine-tune")
    assert not all(one.passed for one in gate.hold(result(*rows, lost=(gone,))))


def test_the_example_policy_fails_on_names_that_it_does_not_know() -> None:
    held = Gatekeeper.read((), POLICY).hold(result(row("a.kernel", "untouched")))
    assert "matched no tensor" in held[0].missed


# Who is told.


def failing(tmp_path: Path) -> Any:
    text = '[[rule]]\nlayers = "a,b:*"\nallow = ["untouched"]\n[[rule]]\ndeny = ["broken"]\n'
    rows = row("a,b:\n100%::error::x", "low rank"), row("c", "untouched")
    return keeper(tmp_path, text).hold(result(*rows))


def test_commands_of_a_workflow_are_a_line_each_and_escaped(tmp_path: Path) -> None:
    lines = github(failing(tmp_path)).splitlines()
    kinds = [re.fullmatch(r"::(error|notice) title=([^,:]*)::(.*)", line) for line in lines]
    assert [one[1] for one in kinds if one] == ["error", "notice"]
    assert "100%25" in lines[0]
    assert "1 of 1 tensor%0A" in lines[0]


def test_the_file_for_junit_has_a_case_for_each_rule(tmp_path: Path) -> None:
    root = ET.fromstring(junit(failing(tmp_path)))
    assert (root.get("tests"), root.get("failures")) == ("3", "1")
    cases = list(root.iter("testcase"))
    assert len(cases) == 3
    assert [case.find("failure") is not None for case in cases] == [True, False, False]


def test_the_command_tells_both_and_keeps_its_document_whole(tmp_path: Path) -> None:
    base, report = tmp_path / "a.safetensors", tmp_path / "gates.xml"
    save_file({"a.weight": torch.eye(4)}, base)
    arguments = ["inspect", str(base), str(base), "--fail-above", "weight_drift=0.1", "--json"]
    told = [*arguments, "--annotate", "github", "--annotate", f"junit={report}"]
    found = CliRunner().invoke(app, told)
    assert found.exit_code == 0, found.stderr
    assert [one["matched"] for one in json.loads(found.stdout)["gates"]] == [1, 1]
    assert "::notice title=" in found.stderr
    assert ET.fromstring(report.read_bytes()).get("failures") == "0"
    assert CliRunner().invoke(app, told).exit_code == 2
    wrong = CliRunner().invoke(app, [*arguments, "--annotate", "githb"])
    assert wrong.exit_code == 2
    assert "Did you mean 'github'?" in wrong.stderr


# Names that do not exist.


@pytest.mark.parametrize("name", metric_names())
def test_every_metric_that_lacks_a_letter_is_guessed(name: str) -> None:
    with pytest.raises(UsageError, match=rf"Did you mean '{re.escape(name)}'\?") as caught:
        Gatekeeper.read((f"{name[:2] + name[3:]}=1",), None)
    assert len(str(caught.value)) < 400


WRONG: Mapping[str, str] = {
    '[[rule]]\nallow = ["lowrank"]': "low rank",
    '[[rule]]\ndeny = ["unrelatd"]': "unrelated",
    "[[rule]]\nlimits = { drift = 1 }": "weight_drift",
    '[[rule]]\nlayer = "x"': "layers",
    '[[rule]]\n[tensors]\nunmatched = "alow"': "allow",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_misspelt_word_of_a_policy_is_guessed(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match=rf"policy\.toml: .*Did you mean '{WRONG[text]}'\?"):
        keeper(tmp_path, text)


def test_drift_alone_is_the_drift_of_weights() -> None:
    with pytest.raises(UsageError, match=r"Did you mean 'weight_drift'\?"):
        Gatekeeper.read(("drift=0.1",), None)


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (("finetune", "x", "-o", "y", "--data", "z", "--task", "languag"), "language"),
        (("finetune", "x", "-o", "y", "--data", "z", "--sampling", "balance"), "balanced"),
        (("decompose", "BASE", "-o", "y", "--method", "exat"), "exact"),
        (("decompose", "BASE", "-o", "y", "--dtype", "bfloat"), "bfloat16"),
        (("inspect", "BASE", "BASE", "--sort", "drift"), "weight_drift"),
        (("inspect", "BASE", "BASE", "--metrics", "cka,alpa"), "alpha"),
        (("inspect", "BASE", "BASE", "--fail-above", "drift=0.1"), "weight_drift"),
        (("inspect", "BASE", "BASE", "--device", "cudda"), "cuda"),
    ],
)
def test_a_wrong_value_of_an_option_is_guessed(
    tmp_path: Path, arguments: tuple[str, ...], meant: str
) -> None:
    base = tmp_path / "a.safetensors"
    save_file({"a.weight": torch.eye(4)}, base)
    given = [str(base) if one == "BASE" else one for one in arguments]
    given = [str(tmp_path / "y") if one == "y" else one for one in given]
    found = CliRunner(env={"COLUMNS": "200"}).invoke(app, given)
    assert found.exit_code == 2
    assert f"Did you mean '{meant}'?" in found.stderr


@pytest.mark.parametrize(("text", "meant"), [("svf+biass", "svf+bias"), ("ful", "full")])
def test_a_misspelt_regime_is_guessed(text: str, meant: str) -> None:
    from svftool.choices.regimes import parse_regime

    with pytest.raises(UsageError, match=re.escape(f"Did you mean {meant!r}?")):
        parse_regime(text)
