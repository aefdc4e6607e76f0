"""``svftool merge`` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from svftool import decompose, open_factors
from svftool.cli import app
from svftool.factors import write_tuned

runner = CliRunner()


def run(*args: object):
    return runner.invoke(app, [str(arg) for arg in args])


@pytest.fixture
def base(tiny_checkpoint) -> Path:
    return tiny_checkpoint()


@pytest.fixture
def factors(base: Path, tmp_path: Path) -> Path:
    return decompose(base, tmp_path / "factors").output


@pytest.fixture
def tuned(factors: Path, tmp_path: Path) -> Path:
    path = tmp_path / "t.svf.safetensors"
    with open_factors(factors) as store:
        S = {name: 1.2 * store.read_S(name) for name in store.layers}
        write_tuned(path, store=store, S=S, whole={"head.weight": torch.ones(2, 8)})
    return path


def test_shows_what_changed(factors: Path, tuned: Path, tmp_path: Path) -> None:
    result = run("merge", factors, tuned, "-o", tmp_path / "m.safetensors", "--verify")
    assert result.exit_code == 0, result.stderr
    assert "20.00%" in result.stdout
    assert "added: head.weight" in result.stdout
    assert "verified" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_json_document_holds_the_promised_keys(factors: Path, tuned: Path, tmp_path: Path) -> None:
    result = run("merge", factors, tuned, "-o", tmp_path / "m.safetensors", "--json")
    document = json.loads(result.stdout)
    assert document["command"] == "merge"
    assert {"layers", "unchanged", "added", "replaced", "verified", "output"} <= document.keys()
    assert document["verified"] is None
    assert document["added"] == ["head.weight"]
    for layer in document["layers"]:
        assert {"name", "changed", "relative_change", "rounding_loss"} <= layer.keys()
        assert layer["relative_change"] == pytest.approx(0.2, rel=1e-3)
    written = load_file(tmp_path / "m.safetensors")
    assert document["unchanged"] == len(written) - len(document["layers"]) - 1


def test_weights_are_read_from_the_file_name(factors: Path, tuned: Path, tmp_path: Path) -> None:
    result = run("merge", factors, f"{tuned}@0.5", "-o", tmp_path / "m.safetensors", "--json")
    changes = [one["relative_change"] for one in json.loads(result.stdout)["layers"]]
    assert changes == pytest.approx([0.1] * len(changes), rel=1e-3)
    result = run("merge", factors, f"{tuned}@half", "-o", tmp_path / "n.safetensors")
    assert result.exit_code == 2
    assert "weight 'half'" in result.stderr


@pytest.mark.parametrize(
    ("arrange", "code", "message"),
    [
        (lambda f, t, w: ["merge", w / "nowhere", "-o", w / "m"], 4, "no svf_config.json"),
        (lambda f, t, w: ["merge", f, w / "none.safetensors", "-o", w / "m"], 4, "no such file"),
        (lambda f, t, w: ["merge", f, w / "tiny.safetensors", "-o", w / "m"], 4, "a tuned file"),
        (lambda f, t, w: ["merge", f, "-o", w / "m", "--base", w / "x.safetensors"], 3, "no such"),
        (lambda f, t, w: ["merge", f, "-o", w / "m", "--base", f, "--without-base"], 2, "one of"),
        (lambda f, t, w: ["merge", f, "-o", w / "m.pth", "--without-base"], 2, "pickle"),
        (lambda f, t, w: ["merge", f, "-o", f], 2, "the same as the input"),
        (lambda f, t, w: ["merge", f, "-o", f / "m"], 2, "inside the input"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    factors: Path, tuned: Path, tmp_path: Path, arrange, code: int, message: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    result = run(*arrange(factors, tuned, tmp_path))
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_nothing_and_says_so(
    factors: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(os, "pwrite", full)
    result = run("merge", factors, tuned, "-o", tmp_path / "m.safetensors")
    assert result.exit_code == 8
    assert len(result.stderr.strip().splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before
