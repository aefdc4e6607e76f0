"""``svftool decompose`` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from svftool.cli import app

runner = CliRunner()


def run(*args: object):
    return runner.invoke(app, [str(arg) for arg in args])


def test_writes_factors_and_shows_what_was_left_whole(tiny_checkpoint, tmp_path: Path) -> None:
    result = run("decompose", tiny_checkpoint(), "-o", tmp_path / "f")
    assert result.exit_code == 0, result.stderr
    assert "layers decomposed" in result.stdout
    assert "token embedding" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert {p.name for p in (tmp_path / "f").iterdir()} == {"svf.safetensors", "svf_config.json"}


def test_json_document_holds_the_promised_keys(tiny_checkpoint, tmp_path: Path) -> None:
    result = run("decompose", tiny_checkpoint(), "-o", tmp_path / "f", "--json")
    document = json.loads(result.stdout)
    assert {"schema_version", "command", "layers", "skipped", "seconds"} <= document.keys()
    assert {"peak_memory_bytes", "output"} <= document.keys()
    assert document["command"] == "decompose"
    for layer in document["layers"]:
        assert {
            "name",
            "shape",
            "view",
            "matrix",
            "rank",
            "dtype",
            "method",
            "reconstruction_error",
            "orthogonality_error",
            "seconds",
        } <= layer.keys()
        assert layer["reconstruction_error"] <= 1e-6
        assert layer["orthogonality_error"] <= 1e-5
    names = {one["name"] for one in document["layers"]} | {
        one["name"] for one in document["skipped"]
    }
    assert len(names) == len(document["layers"]) + len(document["skipped"]) == 15


def test_dry_run_shows_the_plan_and_writes_nothing(tiny_checkpoint, tmp_path: Path) -> None:
    base = tiny_checkpoint()
    result = run("decompose", base, "-o", tmp_path / "f", "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "Nothing was written" in result.stdout
    assert list(tmp_path.iterdir()) == [base]
    planned = json.loads(run("decompose", base, "-o", tmp_path / "f", "--dry-run", "--json").stdout)
    done = json.loads(run("decompose", base, "-o", tmp_path / "f", "--json").stdout)
    assert [one["name"] for one in planned["layers"]] == [one["name"] for one in done["layers"]]
    written = (tmp_path / "f" / "svf.safetensors").stat().st_size
    assert planned["output_bytes"] <= written <= planned["output_bytes"] + 10_000


@pytest.mark.parametrize(
    ("rank", "expected"), [("full", 8), ("3", 3), ("0.25", 2), ("energy:0.5", None)]
)
def test_rank_rules(tiny_checkpoint, tmp_path: Path, rank: str, expected: int | None) -> None:
    base = tiny_checkpoint()
    document = json.loads(
        run("decompose", base, "-o", tmp_path / "f", "--rank", rank, "--json").stdout
    )
    layer = next(one for one in document["layers"] if one["name"] == "linear.weight")
    if expected is not None:
        assert layer["rank"] == expected
        return
    from safetensors.torch import load_file

    energy = torch.linalg.svdvals(load_file(base)["linear.weight"].double()).square()
    shares = energy.cumsum(0) / energy.sum()
    assert shares[layer["rank"] - 1] >= 0.5
    assert layer["rank"] == 1 or shares[layer["rank"] - 2] < 0.5


def test_include_and_exclude(tiny_checkpoint, tmp_path: Path) -> None:
    args = ["--include", "linear*", "--include", "embed*", "--exclude", "*.bias", "--json"]
    document = json.loads(run("decompose", tiny_checkpoint(), "-o", tmp_path / "f", *args).stdout)
    assert [one["name"] for one in document["layers"]] == ["embed_tokens.weight", "linear.weight"]


def test_batch_view(tiny_checkpoint, tmp_path: Path) -> None:
    base = tiny_checkpoint("e.safetensors", {"moe.w": torch.randn(3, 6, 4)})
    document = json.loads(
        run("decompose", base, "-o", tmp_path / "f", "--view", "moe.*=batch", "--json").stdout
    )
    assert document["layers"][0]["matrix"] == [3, 6, 4]
    assert document["layers"][0]["view"] == "batch"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_factors_say_their_error(tiny_checkpoint, tmp_path: Path, dtype: str) -> None:
    document = json.loads(
        run("decompose", tiny_checkpoint(), "-o", tmp_path / "f", "--dtype", dtype, "--json").stdout
    )
    errors = [one["reconstruction_error"] for one in document["layers"]]
    assert 1e-5 < max(errors) < 1e-2


def test_non_finite_layers_are_all_named_or_skipped(tiny_checkpoint, tmp_path: Path) -> None:
    good, nan, inf = torch.randn(4, 4), torch.randn(4, 4), torch.randn(4, 4)
    nan[0, 0], inf[1, 1] = float("nan"), float("inf")
    base = tiny_checkpoint("bad.safetensors", {"good.w": good, "nan.w": nan, "inf.w": inf})
    result = run("decompose", base, "-o", tmp_path / "f")
    assert result.exit_code == 5
    assert "'nan.w' (1 NaN)" in result.stderr.replace("\n", " ")
    assert "'inf.w' (1 infinite)" in result.stderr.replace("\n", " ")
    assert "--skip-bad" in result.stderr
    assert list(tmp_path.iterdir()) == [base]
    document = json.loads(
        run("decompose", base, "-o", tmp_path / "f", "--skip-bad", "--json").stdout
    )
    assert [one["name"] for one in document["layers"]] == ["good.w"]
    assert run("merge", tmp_path / "f", "-o", tmp_path / "m.safetensors", "--verify").exit_code == 0


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--rank", "lots"], 2, "rank 'lots'"),
        (["--dtype", "int8"], 2, "--dtype: 'int8', expected one of"),
        (["--method", "guess"], 2, "--method: 'guess', expected one of"),
        (["--view", "x"], 2, "--view: 'x', expected GLOB=batch"),
        (["--include", "nothing*"], 2, "nothing*"),
        (["--max-shard-size", "many"], 2, "many"),
    ],
)
def test_usage_errors_are_one_line(tiny_checkpoint, tmp_path: Path, args, code, message) -> None:
    base = tiny_checkpoint()
    result = run("decompose", base, "-o", tmp_path / "f", *args)
    assert result.exit_code == code
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == [base]


def test_existing_output_is_kept_without_force(tiny_checkpoint, tmp_path: Path) -> None:
    base, output = tiny_checkpoint(), tmp_path / "f"
    assert run("decompose", base, "-o", output).exit_code == 0
    before = (output / "svf_config.json").read_bytes()
    result = run("decompose", base, "-o", output, "--rank", "2")
    assert result.exit_code == 2
    assert "--force" in result.stderr
    assert (output / "svf_config.json").read_bytes() == before
    assert run("decompose", base, "-o", output, "--rank", "2", "--force").exit_code == 0
    assert (output / "svf_config.json").read_bytes() != before


def test_stdout_holds_the_result_alone(tiny_checkpoint, tmp_path: Path) -> None:
    torch.save({"state_dict": {"module.w": torch.randn(4, 4)}}, tmp_path / "base.pth")
    result = run("decompose", tmp_path / "base.pth", "-o", tmp_path / "f", "--json")
    json.loads(result.stdout)
    assert "state_dict" in result.stderr
    assert run("decompose", tmp_path / "base.pth", "-o", tmp_path / "g", "-q").stderr == ""


def test_shards(tiny_checkpoint, tmp_path: Path) -> None:
    run("decompose", tiny_checkpoint(), "-o", tmp_path / "f", "--max-shard-size", "1KB")
    names = {path.name for path in (tmp_path / "f").iterdir()}
    assert "svf.safetensors.index.json" in names
    assert len([name for name in names if name.endswith(".safetensors")]) > 1
    assert run("merge", tmp_path / "f", "-o", tmp_path / "m", "--verify").exit_code == 0
