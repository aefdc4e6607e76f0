"""``svftool extract``: the best tuned file for a dense fine-tune, and what it cannot reach."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from svftool import decompose, merge, open_factors
from svftool.cli import app
from svftool.factors import write_tuned

runner = CliRunner()


def run(*args: object):
    return runner.invoke(app, [str(arg) for arg in args])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(3)
    tensors = {
        "a.weight": torch.randn(12, 8, generator=generator),
        "b.weight": torch.randn(6, 4, 3, 3, generator=generator),
        "b.bias": torch.randn(6, generator=generator),
        "head.weight": torch.randn(5, 8, generator=generator),
    }
    save_file(tensors, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


@pytest.fixture
def factors(base: Path, tmp_path: Path) -> Path:
    return decompose(base, tmp_path / "factors").output


@pytest.mark.parametrize("start", ["base", "factors"])
def test_a_pure_singular_value_tune_is_recovered(
    base: Path, factors: Path, tmp_path: Path, start: str
) -> None:
    with open_factors(factors) as store:
        S = {name: 1.3 * store.read_S(name) for name in store.layers}
        write_tuned(tmp_path / "t.svf.safetensors", store=store, S=S)
    tuned = merge(factors, [tmp_path / "t.svf.safetensors"], output=tmp_path / "t.safetensors")
    output = tmp_path / "x.svf.safetensors"
    result = run(
        "extract", {"base": base, "factors": factors}[start], tuned.output, "-o", output, "--json"
    )
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["error"] < 1e-5
    again = merge(factors, [output], output=tmp_path / "again.safetensors")
    one, two = load_file(again.output), load_file(tuned.output)
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in two)


def test_merging_gives_the_best_approximation_and_its_stated_error(
    base: Path, factors: Path, tmp_path: Path
) -> None:
    before = load_file(base)
    after = {name: value + 0.1 * torch.randn_like(value) for name, value in before.items()}
    save_file(after, tmp_path / "full.safetensors")
    output = tmp_path / "x.svf.safetensors"
    document = json.loads(
        run("extract", factors, tmp_path / "full.safetensors", "-o", output, "--json").stdout
    )
    merged = load_file(merge(factors, [output], output=tmp_path / "m.safetensors").output)
    for layer in document["layers"]:
        W, V, M = (t[layer["name"]].double().flatten(1) for t in (before, after, merged))
        U, _, Vh = torch.linalg.svd(W, full_matrices=False)
        best = W + U * ((U.T @ (V - W)) * Vh).sum(1) @ Vh  # U diag(diag(U'DV)) Vh on top of W
        assert torch.allclose(M, best, atol=1e-5)
        error = float((V - best).norm() / (V - W).norm())
        assert layer["error"] == pytest.approx(error, abs=1e-4)
    assert set(document["whole"]) == {"b.bias", "head.weight"}
    assert torch.equal(merged["b.bias"], after["b.bias"])


def test_a_head_of_another_shape_is_taken_along(base: Path, factors: Path, tmp_path: Path) -> None:
    after = load_file(base) | {"head.weight": torch.randn(3, 8), "extra": torch.ones(2)}
    save_file(after, tmp_path / "full.safetensors")
    output = tmp_path / "x.svf.safetensors"
    assert run("extract", factors, tmp_path / "full.safetensors", "-o", output).exit_code == 0
    merged = load_file(merge(factors, [output], output=tmp_path / "m.safetensors").output)
    assert merged.keys() == after.keys()
    assert all(torch.equal(merged[name], after[name]) for name in after)


def test_nothing_in_common_is_one_line(base: Path, factors: Path, tmp_path: Path) -> None:
    save_file({"z": torch.ones(3, 3)}, tmp_path / "other.safetensors")
    result = run(
        "extract", factors, tmp_path / "other.safetensors", "-o", tmp_path / "x.safetensors"
    )
    assert result.exit_code == 3
    assert len(result.stderr.strip().splitlines()) == 1
    assert "no tensor in common" in result.stderr
    assert not (tmp_path / "x.safetensors").exists()


def low(shape: tuple[int, ...], rank: int, generator: torch.Generator) -> torch.Tensor:
    m, n = shape[0], torch.Size(shape[1:]).numel()
    up, down = (torch.randn(*two, generator=generator) for two in ((m, rank), (rank, n)))
    return 0.1 * (up @ down).reshape(shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 2, None])
def test_where_singular_values_make_little_an_adapter_is_proposed(
    tmp_path: Path, dtype: torch.dtype, rank: int | None
) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = {"a.weight": (40, 32), "b.weight": (16, 8, 3, 3)}
    before = {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}
    after = {
        name: (value.float() + low(tuple(value.shape), rank or 99, generator)).to(dtype)
        for name, value in before.items()
    }
    paths = [tmp_path / f"{name}.safetensors" for name in ("before", "after")]
    for path, state in zip(paths, (before, after), strict=True):
        save_file(state, path)
    words = ["extract", *paths, "-o", tmp_path / "x.svf.safetensors"]
    document = json.loads(run(*words, "--json").stdout)
    assert document["error"] > 0.5
    text = " ".join(run(*words, "--force").stdout.split())
    if rank is None:  # as wide as the layers
        assert document["proposal"] is None
        assert "No low rank holds it either" in text
        return
    found = document["proposal"]["rank"]
    assert found <= rank
    assert f"A LoRA of rank {found} would lose" in text
    adapter = ["extract", *paths, "-o", tmp_path / "lora", "--as", "lora", "--rank", found]
    reached = json.loads(run(*adapter, "--json").stdout)["error"]
    assert reached == pytest.approx(document["proposal"]["error"], rel=0.02, abs=0.005)
    assert reached < 0.3


def test_nothing_is_proposed_where_singular_values_do(base: Path, tmp_path: Path) -> None:
    after = {name: 1.1 * value for name, value in load_file(base).items()}
    save_file(after, tmp_path / "t.safetensors")
    result = run("extract", base, tmp_path / "t.safetensors", "-o", tmp_path / "x.svf.safetensors")
    assert "LoRA" not in result.stdout


def test_other_forms_are_written_and_the_best_is_said(
    base: Path, factors: Path, tmp_path: Path
) -> None:
    tensors = load_file(base)
    scale = 1.0 + 0.3 * torch.rand(12, 1, generator=torch.Generator().manual_seed(5))
    save_file(tensors | {"a.weight": scale * tensors["a.weight"]}, tmp_path / "t.safetensors")
    output = tmp_path / "x.svf.safetensors"
    shown = run("extract", factors, tmp_path / "t.safetensors", "-o", output, "--as", "best")
    assert shown.exit_code == 0, shown.stderr
    rows = [line.split() for line in shown.stdout.splitlines()]
    assert next(row for row in rows if row[:1] == ["rows"])[1:] == ["18", "0.0%"]
    assert "cannot be made by rows (18 numbers)" in shown.stdout
    found = run(
        "extract", factors, tmp_path / "t.safetensors", "-o", output, "--as", "best", "--json",
        "--force",
    )  # fmt: skip
    document = json.loads(found.stdout)
    assert document["form"] == "rows"
    assert [one["form"] for one in document["candidates"] if one["chosen"]] == ["rows"]


@pytest.mark.parametrize("form", ["best:2", "core", "lora:4", "svf+bias", "entries:3:random"])
def test_forms_that_there_are_not(base: Path, tmp_path: Path, form: str) -> None:
    refused = run("extract", base, base, "-o", tmp_path / "x.svf.safetensors", "--as", form)
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: --as")
    assert len(refused.stderr.splitlines()) == 1
