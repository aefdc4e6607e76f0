"""Equality is only said of what was compared: codes, shapes, what is missing, and zeros."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner, Result

from svftool import audit, decompose, extract, merge
from svftool.auditing import (
    BaseMatrix,
    Row,
    Tuned,
    choose_metrics,
    compare_spectra,
    compare_vectors,
    judged_row,
)
from svftool.auditing.gates import Gate, tripped
from svftool.cli import app
from svftool.numerics import ThreadPool
from svftool.report.inspect.document import csv_text
from svftool.report.json import to_json
from svftool.report.text import safe


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def write(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return path


def pair(folder: Path, base: dict[str, Tensor], tuned: dict[str, Tensor]) -> tuple[Path, Path]:
    return write(folder / "base.safetensors", base), write(folder / "tuned.safetensors", tuned)


def run(*args: object) -> Result:
    return CliRunner().invoke(app, ["inspect", *map(str, args)])


def document(*args: object) -> dict[str, Any]:
    found = run(*args, "--json", "-q")
    assert found.exit_code in (0, 10), found.output
    one: dict[str, Any] = json.loads(found.stdout)["comparisons"][0]
    return one


COMMON = {"a.weight": normal(8, 6), "norm.weight": torch.ones(6)}

CODES = {
    "fp8": ("b.weight", normal(8, 6).to(torch.float8_e4m3fn)),
    "fp8 vector": ("b.bias", normal(6).to(torch.float8_e5m2)),
    "GPTQ": ("b.qweight", integers(torch.int32, 8, 6)),
    "zeros of GPTQ": ("b.qzeros", integers(torch.int32, 6)),
    "blocks": ("b.w_blocks", integers(torch.uint8, 4, 2, 6)),
    "bitsandbytes": ("b.weight", integers(torch.int8, 8, 6)),
    "4 bits": ("b.weight", integers(torch.uint8, 48, 1)),
    "bytes": ("b.absmax", integers(torch.uint8, 48)),
    "long matrix": ("b.index", integers(torch.int64, 8, 6)),
    "bool matrix": ("b.mask", integers(torch.bool, 8, 6)),
    "complex": ("b.weight", torch.complex(normal(8, 6), normal(8, 6, seed=1))),
    "complex vector": ("b.freqs", torch.complex(normal(6), normal(6, seed=1))),
}


def other_codes(values: Tensor) -> Tensor:
    if values.dtype == torch.bool:
        return ~values
    if values.is_complex() or not values.is_floating_point():
        return values + 1
    return (values.float() + 1).to(values.dtype)


@pytest.mark.parametrize("kind", CODES)
def test_codes_are_compared_by_their_bytes(kind: str, tmp_path: Path) -> None:
    name, values = CODES[kind]
    files = pair(tmp_path, COMMON | {name: values}, COMMON | {name: other_codes(values)})
    one = document(*files)
    assert one["verdict"] == "changed"
    assert "1 tensor of codes differs in its bytes" in one["evidence"]
    assert one["coverage"] == {"compared": 3, "total": 3, "not_compared": []}
    assert [item["verdict"] for item in one["left_out"]] == ["changed"]
    assert run(*files, "--fail-above", "weight_drift=1e9").exit_code == 10
    same = document(files[0], files[0])
    assert same["verdict"] == "untouched"
    assert same["coverage"] == {"compared": 3, "total": 3, "not_compared": []}
    assert run(files[0], files[0], "--fail-above", "weight_drift=0").exit_code == 0


@pytest.mark.parametrize("kind", [kind for kind in CODES if "vector" not in kind])
@pytest.mark.parametrize("swapped", [False, True])
def test_codes_are_never_read_as_numbers(kind: str, swapped: bool, tmp_path: Path) -> None:
    name, values = CODES[kind]
    dense = COMMON | {name: normal(*values.shape).bfloat16()}
    sides = [dense, COMMON | {name: values}]
    files = pair(tmp_path, *(reversed(sides) if swapped else sides))
    found = run(*files)
    assert found.exit_code == 0, found.output
    one = document(*files)
    assert one["verdict"] == "undecided"
    assert [item["name"] for item in one["coverage"]["not_compared"]] == [name]
    assert "not comparable" in one["coverage"]["not_compared"][0]["reason"]
    assert name not in {row["name"] for row in one["layers"]}
    assert run(*files, "--fail-above", "weight_drift=1e9").exit_code == 10


def test_counters_and_masks_are_numbers_still(tmp_path: Path) -> None:
    more = {"steps": torch.tensor(3), "ids": torch.arange(5), "keep": torch.ones(4).bool()}
    files = pair(tmp_path, COMMON | more, COMMON | more | {"steps": torch.tensor(6)})
    rows = {row["name"]: row for row in document(*files)["layers"]}
    assert rows["steps"]["weight_drift"] == 1.0
    assert rows["ids"]["weight_drift"] == rows["keep"]["weight_drift"] == 0.0


GONE = {
    "emptied": {"b.weight": torch.empty(0)},
    "emptied rows": {"b.weight": torch.empty(0, 6)},
    "another shape": {"b.weight": normal(9, 6)},
    "transposed": {"b.weight": normal(6, 8)},
    "missing": {},
    "unmatched": {"b.weight": normal(8, 6, seed=5), "c.weight": normal(3, 3)},
}


@pytest.mark.parametrize("kind", GONE)
def test_nothing_is_untouched_where_something_was_not_compared(kind: str, tmp_path: Path) -> None:
    base = COMMON | {"b.weight": normal(8, 6, seed=5)}
    files = pair(tmp_path, base, COMMON | GONE[kind])
    one = document(*files)
    assert one["verdict"] == "undecided"
    assert one["evidence"].startswith("1 tensor not compared")
    coverage = one["coverage"]
    assert coverage["total"] == coverage["compared"] + 1
    gone = "c.weight" if kind == "unmatched" else "b.weight"
    assert [item["name"] for item in coverage["not_compared"]] == [gone]
    shown = run(*files).stdout
    assert "undecided: 1 tensor not compared" in shown
    assert "not one value differs" not in shown
    failed = run(*files, "--fail-above", "weight_drift=1e9")
    assert failed.exit_code == 10
    assert gone in failed.stderr


def test_a_change_says_what_was_not_compared(tmp_path: Path) -> None:
    base = COMMON | {"b.weight": normal(8, 6)}
    tuned = {"a.weight": COMMON["a.weight"] + normal(8, 6, seed=3), "norm.weight": torch.ones(6)}
    one = document(*pair(tmp_path, base, tuned))
    assert one["verdict"] not in ("untouched", "undecided")
    assert one["evidence"].endswith("undecided: 1 tensor not compared")


ALLOWED = {
    '[[rule]]\nlayers = "*"\ndeny = ["broken"]\n': 10,
    '[[rule]]\nlayers = "*"\nallow = ["untouched"]\n': 10,
    '[[rule]]\nlayers = "a.*"\nallow = ["untouched", "undecided"]\n': 10,
    '[[rule]]\nlayers = "b.*"\nallow = ["undecided"]\n': 0,
    '[[rule]]\nlayers = "*"\nallow = ["untouched", "undecided"]\n': 0,
    '[[rule]]\nlayers = "*"\n[tensors]\nunmatched = "allow"\n': 0,
    '[[rule]]\nlayers = "*"\nallow = ["undecided"]\n[tensors]\nunmatched = "deny"\n': 10,
}


@pytest.mark.parametrize("text", ALLOWED)
def test_a_policy_may_name_what_need_not_be_compared(text: str, tmp_path: Path) -> None:
    base = COMMON | {"b.weight": normal(8, 6)}
    policy = tmp_path / "policy.toml"
    policy.write_text(
        text if '"*"\nallow = ["und' not in text else text.replace('["', '["untouched", "')
    )
    files = pair(tmp_path, base, COMMON)
    assert run(*files, "--policy", policy).exit_code == ALLOWED[text]
    gates = ("--policy", policy, "--fail-above", "weight_drift=1")
    assert run(*files, *gates).exit_code == ALLOWED[text]


def test_a_policy_does_not_take_other_codes_for_allowed(tmp_path: Path) -> None:
    name, values = CODES["GPTQ"]
    files = pair(tmp_path, COMMON | {name: values}, COMMON | {name: values + 1})
    policy = tmp_path / "policy.toml"
    for text, code in (
        ('allow = ["untouched"]', 10),
        ('allow = ["untouched", "changed"]', 0),
        ("limits = { weight_drift = 1 }", 10),
    ):
        policy.write_text(f'[[rule]]\nlayers = "*"\n{text}\n')
        assert run(*files, "--policy", policy).exit_code == code, text


def test_what_the_user_leaves_out_trips_no_gate_and_is_not_called_untouched(tmp_path: Path) -> None:
    files = pair(tmp_path, COMMON, COMMON | {"norm.weight": torch.zeros(6)})
    for patterns in (("--include", "a.*"), ("--exclude", "norm.*")):
        assert run(*files, *patterns, "--fail-above", "weight_drift=0.1").exit_code == 0
        one = document(*files, *patterns)
        assert one["verdict"] == "undecided"
        assert [item["name"] for item in one["coverage"]["not_compared"]] == ["norm.weight"]


# Zeros that became something.


@pytest.mark.parametrize("shape", [(), (8,), (8, 8), (1, 8), (2, 8, 8)])
def test_zeros_that_became_something_trip_every_gate_of_a_change(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    base = COMMON | {"z": torch.zeros(shape)}
    files = pair(tmp_path, base, COMMON | {"z": torch.full(shape, 100.0)})
    assert run(*files, "--fail-above", "weight_drift=1e9").exit_code == 10
    row = next(row for row in document(*files)["layers"] if row["name"] == "z")
    assert row["weight_drift"] is None
    assert "weight_drift" in row["infinite"]
    for form in ("--html", "--csv", "--plot"):
        suffix = {"--plot": "svg"}.get(form, form[2:])
        assert run(*files, form, tmp_path / f"out.{suffix}").exit_code == 0


@pytest.mark.parametrize(
    "metric",
    ["weight_drift", "relative_drift", "max_log_ratio", "spectral_norm.change"],
)
def test_a_matrix_of_zeros_that_became_something_is_infinitely_far(metric: str) -> None:
    with ThreadPool(0) as pool:
        held = BaseMatrix(torch.zeros(6, 5), choose_metrics(None), vectors=True, pool=pool)
        row = judged_row(Row("z", "matrix"), held.against(Tuned(weight=torch.ones(6, 5))))
    value = row.value(metric)
    assert value is not None
    assert tripped([row], Gate(metric, 1e9))
    assert row.verdict is not None
    assert row.verdict.name != "untouched"


def test_an_expert_of_zeros_counts_in_the_drift_of_its_stack() -> None:
    base = torch.stack([normal(6, 5), torch.zeros(6, 5)])
    tuned = torch.stack([base[0], torch.full((6, 5), 100.0)])
    with ThreadPool(0) as pool:
        held = BaseMatrix(base, choose_metrics(None), vectors=True, pool=pool)
        found = held.against(Tuned(weight=tuned)).measured.change
    for name in ("weight_drift", "relative_drift"):
        expected = float((tuned - base).norm() / base.norm())
        assert found[name] == pytest.approx(expected, rel=1e-5), name


def test_zeros_that_stay_are_untouched(tmp_path: Path) -> None:
    file = write(tmp_path / "z.safetensors", COMMON | {"z.bias": torch.zeros(8)})
    assert document(file, file)["verdict"] == "untouched"
    assert run(file, file, "--fail-above", "weight_drift=0").exit_code == 0


# Tuned files.


def spectral(base: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    return {k: v * factor if v.ndim > 1 else v for k, v in base.items()}


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (3, 14, 12)])
@pytest.mark.parametrize("rank", ["4", "energy:0.8", "full"])
def test_a_tuned_file_of_truncated_factors_drifts_as_its_merge(
    shape: tuple[int, ...], rank: str, tmp_path: Path
) -> None:
    name = "experts.weight" if len(shape) == 3 else "l.weight"
    base = {name: normal(*shape), "norm.weight": torch.ones(12)}
    before, after = pair(tmp_path, base, spectral(base, 1.1))
    decompose(before, tmp_path / "f", rank=rank)
    extract(tmp_path / "f", after, output=tmp_path / "t.svf.safetensors")
    merged = tmp_path / "m.safetensors"
    merge(tmp_path / "f", [tmp_path / "t.svf.safetensors"], output=merged)
    one, two = (document(before, x)["layers"] for x in (tmp_path / "t.svf.safetensors", merged))
    for mine, theirs in zip(one, two, strict=True):
        for key in ("relative_drift", "weight_drift", "svf_share", "max_log_ratio"):
            if theirs["matrix"] is not None:
                assert mine[key] == pytest.approx(theirs[key], rel=1e-3), key


def test_tuned_files_of_different_ranks_are_compared(tmp_path: Path) -> None:
    base = {"l.weight": normal(20, 12), "k.weight": normal(9, 7)}
    before, after = pair(tmp_path, base, spectral(base, 1.1))
    files = []
    for rank in ("4", "full"):
        decompose(before, tmp_path / rank, rank=rank)
        files.append(tmp_path / f"{rank}.svf.safetensors")
        extract(tmp_path / rank, after, output=files[-1])
    for one in (document(*files), document(*reversed(files))):
        assert one["coverage"] == {"compared": 2, "total": 2, "not_compared": []}
        assert one["verdict"] == "spectrum only"
        assert all(row["relative_drift"] > 0.01 for row in one["layers"])


def test_what_two_tuned_files_hold_whole_is_compared(tmp_path: Path) -> None:
    base = {"l.weight": normal(20, 12), "head.weight": normal(5, 12), "head.bias": normal(5)}
    files = []
    for index, head in enumerate((normal(5, 12, seed=4), normal(5, 12, seed=5))):
        tuned = base | {"l.weight": base["l.weight"] * 1.1, "head.weight": head}
        tuned["head.bias"] = base["head.bias"] + 1.0
        before, after = pair(tmp_path, base, tuned)
        files.append(tmp_path / f"{index}.svf.safetensors")
        extract(before, after, output=files[-1])
    one = document(*files)
    rows = {row["name"]: row["verdict"] for row in one["layers"]}
    assert rows["head.weight"] == "unrelated"
    assert rows["head.bias"] == "untouched"
    assert one["unmatched"] == {"base": [], "tuned": []}
    assert document(files[0], files[0])["verdict"] == "untouched"
    alone = document(files[0])
    assert {item["name"] for item in alone["coverage"]["not_compared"]} >= {"head.weight"}


def test_a_layer_that_only_one_tuned_file_has_is_as_in_the_base_in_the_other(
    tmp_path: Path,
) -> None:
    base = {"l.weight": normal(20, 12), "k.weight": normal(9, 7)}
    files = []
    for name in base:
        before, after = pair(tmp_path, base, {name: base[name] * 1.5})
        files.append(tmp_path / f"{name}.svf.safetensors")
        extract(before, after, output=files[-1])
    rows = {row["name"]: row["relative_drift"] for row in document(*files)["layers"]}
    assert rows["k.weight"] == pytest.approx(0.5, rel=1e-4)
    assert rows["l.weight"] == pytest.approx(1 / 3, rel=1e-4)


# Sizes that do not square.


@pytest.mark.parametrize("size", [1e60, 1e90, 1e140])
def test_a_change_far_larger_than_its_base_is_measured(tmp_path: Path, size: float) -> None:
    """Squares of squares leave the floats long before the numbers do."""
    base = torch.eye(6, dtype=torch.float64)
    change = torch.diag(torch.tensor([size, size, 0, 0, 0, 0], dtype=torch.float64))
    before, after = pair(tmp_path, {"l.weight": base}, {"l.weight": base + change})
    (row,) = audit(before, [after]).comparisons[0].rows
    assert row.measured.change["weight_drift"] == pytest.approx(size * (2 / 6) ** 0.5)
    assert row.change_rank == 2


@pytest.mark.parametrize("size", [1e-200, 1e-160, 1e160, 1e200])
def test_very_large_and_small_numbers_are_compared(size: float) -> None:
    W, T = normal(6, 5).double(), normal(6, 5).double() + 0.1 * normal(6, 5, seed=1)
    metrics = choose_metrics(["all"])
    with ThreadPool(0) as pool:
        usual, extreme = (
            BaseMatrix(W * x, metrics, vectors=True, pool=pool).against(Tuned(weight=T * x))
            for x in (1.0, size)
        )
        alone = BaseMatrix(W * size, metrics, vectors=True, pool=pool).alone()
    for name in ("relative_drift", "weight_drift", "svf_share", "cosine", "max_log_ratio"):
        assert extreme.measured.change[name] == pytest.approx(usual.measured.change[name])
    expected = usual.measured.base["spectral_norm"]
    assert expected is not None
    assert extreme.measured.base["spectral_norm"] == pytest.approx(expected * size)
    assert alone.measured.base["log_norm"] == pytest.approx(extreme.measured.base["log_norm"])
    S, S_tuned = torch.linalg.svdvals(W), torch.linalg.svdvals(T)
    pairs = [compare_spectra(S * x, S_tuned * x, sides=None, metrics=metrics) for x in (1.0, size)]
    drifts = [found.measured.change["relative_drift"] for found in pairs]
    assert drifts[1] == pytest.approx(drifts[0])
    flat = [compare_vectors(W.flatten() * x, T.flatten() * x) for x in (1.0, size)]
    first, second = (found.measured.change["weight_drift"] for found in flat)
    assert second == pytest.approx(first)


def test_a_checkpoint_of_very_large_numbers_is_inspected(tmp_path: Path) -> None:
    base = {f"{i}.weight": normal(6, 5).double() * 10.0 ** (200 * i) for i in (-1, 0, 1)}
    files = pair(tmp_path, base, {name: value * 1.5 for name, value in base.items()})
    one = document(*files)
    assert one["verdict"] == "spectrum only"
    assert one["summary"]["total"]["weight_drift"] == pytest.approx(0.5)
    assert run(*files, "--html", tmp_path / "o.html", "--plot", tmp_path / "o.svg").exit_code == 0


# Names that steer what they are printed to.


UNSEEN = "\r\n\t\x1b\x85\x9b\u061c\u200b\u200e\u202e\u2028\u2029\u2066\ufeff\U000e0041\ud800"


@pytest.mark.parametrize("letter", UNSEEN)
def test_unseen_characters_are_escaped(letter: str) -> None:
    assert letter not in safe(f"a{letter}b")
    text = to_json({"name": f"a{letter}b"})
    assert letter not in text.replace("\n", "") or letter == "\n"
    assert json.loads(text) == {"name": f"a{letter}b"}
    assert text.isascii()


def test_letters_of_any_language_stay() -> None:
    assert safe("größe 重み é") == "größe 重み é"
    assert "重み" in to_json({"重み": 1})


@pytest.mark.parametrize(
    "start", ["\r=", "\n=", "\t=", " =", "=", "+", "-", "@", "\uff1d", "\x85="]
)
def test_a_name_starts_no_row_and_no_formula_of_a_spreadsheet(start: str, tmp_path: Path) -> None:
    name = f"{start}cmd|' /C calc'!A0"
    file = write(tmp_path / "n.safetensors", {"a\r=b": normal(3, 3), name: normal(4, 4)})
    text = csv_text(audit(file, [file]))
    assert not re.search(r"[\r\x85\u2028]", text)
    rows = list(csv.reader(io.StringIO(text)))
    assert len({len(row) for row in rows}) == 1
    assert len(rows) == 3
    assert not any(
        cell.lstrip().startswith(tuple("=+-@\uff1d")) for row in rows for cell in row[:3]
    )
