"""Commands on quantised checkpoints: verdicts, factors, tuned files, dense merges."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_quantised import normal
from torch import Tensor

from svftool import audit, decompose, extract, merge
from svftool.checkpoints import open_checkpoint
from svftool.errors import NumericalError, UsageError

BLOCK = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 8]}}


def quantised(W: Tensor, form: str) -> dict[str, Tensor]:
    """Store a matrix as codes of a format."""
    name = "layers.0.fc.weight"
    if form == "fp8":
        top = W.reshape(W.shape[0] // 8, 8, -1, 8).abs().amax((1, 3)) / 448
        spread = top.repeat_interleave(8, 0).repeat_interleave(8, 1)
        return {name: (W / spread).to(torch.float8_e4m3fn), f"{name}_scale_inv": top}
    scale = W.abs().amax(1) / 127
    codes = (W / scale[:, None]).round().to(torch.int8)
    return {name: codes, f"{name}_scale": scale[:, None]}


def write(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(BLOCK), encoding="utf-8")
    return folder


@pytest.fixture
def weight() -> Tensor:
    return normal(32, 24)


REST = {"norm.weight": torch.ones(24).bfloat16()}


@pytest.mark.parametrize("form", ["fp8", "int8"])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_model_against_its_own_quantised_copy(
    form: str, swapped: bool, weight: Tensor, tmp_path: Path
) -> None:
    dense = write(tmp_path / "dense", {"layers.0.fc.weight": weight, **REST})
    codes = write(tmp_path / "codes", quantised(weight, form) | REST)
    pair = (codes, dense) if swapped else (dense, codes)
    (one,) = audit(pair[0], [pair[1]]).comparisons
    assert one.verdict is not None
    assert (one.verdict.name, one.verdict.confidence) == ("quantisation only", "high")
    (row,) = [row for row in one.rows if row.is_matrix]
    assert row.rounding_floor is not None
    drift = row.value("weight_drift")
    assert drift is not None
    assert row.rounding_floor == pytest.approx(drift, rel=0.5)
    assert not row.changed
    assert any("with a scale" in kind for kind in row.dtype)


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_a_change_above_the_floor_is_one(form: str, weight: Tensor, tmp_path: Path) -> None:
    other = weight + 0.3 * normal(32, 24, seed=1)
    dense = write(tmp_path / "dense", {"layers.0.fc.weight": weight, **REST})
    codes = write(tmp_path / "codes", quantised(other, form) | REST)
    (one,) = audit(dense, [codes]).comparisons
    assert one.verdict is not None
    assert one.verdict.name == "full fine-tune"
    low = weight + 0.5 * normal(32, 1, seed=2) @ normal(1, 24, seed=3)
    codes = write(tmp_path / "low", quantised(low, form) | REST)
    (one,) = audit(dense, [codes]).comparisons
    assert one.verdict is not None
    assert (one.verdict.name, one.verdict.rank) == ("low rank", 1)


def test_the_numbers_themselves_are_equal(weight: Tensor, tmp_path: Path) -> None:
    codes = write(tmp_path / "codes", quantised(weight, "fp8") | REST)
    with open_checkpoint(codes) as found:
        numbers = {name: found.read(name) for name in found.infos}
    plain = write(tmp_path / "plain", numbers)
    (one,) = audit(codes, [plain]).comparisons
    assert one.verdict is not None
    assert one.verdict.name == "untouched"
    assert one.coverage.compared == one.coverage.total == 2


def test_factors_and_merges_of_codes(weight: Tensor, tmp_path: Path) -> None:
    codes = write(tmp_path / "codes", quantised(weight, "fp8") | REST)
    decompose(codes, tmp_path / "factors")
    with open_checkpoint(codes) as found:
        values = found.read("layers.0.fc.weight")
    merge(tmp_path / "factors", [], output=tmp_path / "same", verify=True)
    written = load_file(tmp_path / "same" / "model.safetensors")
    assert set(written) == {"layers.0.fc.weight", "norm.weight"}
    assert torch.equal(written["layers.0.fc.weight"], values)
    assert torch.equal(written["norm.weight"], REST["norm.weight"])
    config = json.loads((tmp_path / "same" / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config
    tuned = write(tmp_path / "tuned", {"layers.0.fc.weight": values * 1.25, **REST})
    extract(tmp_path / "factors", tuned, output=tmp_path / "t.svf.safetensors")
    merge(tmp_path / "factors", [tmp_path / "t.svf.safetensors"], output=tmp_path / "m")
    written = load_file(tmp_path / "m" / "model.safetensors")
    torch.testing.assert_close(written["layers.0.fc.weight"], values * 1.25)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("without_base", [False, True])
def test_numbers_are_written_in_the_dtype_asked_for(
    dtype: torch.dtype, without_base: bool, weight: Tensor, tmp_path: Path
) -> None:
    codes = write(tmp_path / "codes", quantised(weight, "fp8") | REST | {"n": torch.tensor(3)})
    config = json.dumps(BLOCK | {"dtype": "float32"})
    (codes / "config.json").write_text(config, encoding="utf-8")
    decompose(codes, tmp_path / "factors")
    with open_checkpoint(codes) as found:
        values = found.read("layers.0.fc.weight")
    name = str(dtype).removeprefix("torch.")
    result = merge(
        tmp_path / "factors", [], output=tmp_path / "m", dtype=name, verify=True,
        without_base=without_base,
    )  # fmt: skip
    written = load_file(tmp_path / "m" / "model.safetensors")
    same = torch.equal(written["layers.0.fc.weight"], values.to(dtype))
    assert written["layers.0.fc.weight"].dtype == dtype
    assert same or without_base
    assert written["norm.weight"].dtype == dtype
    assert written["n"].dtype == torch.int64
    stated = json.loads((tmp_path / "m" / "config.json").read_text(encoding="utf-8"))
    assert stated == {"dtype": name}
    assert result.verified
    tuned = write(tmp_path / "tuned", {"layers.0.fc.weight": values * 1.25, **REST})
    extract(tmp_path / "factors", tuned, output=tmp_path / "t.svf.safetensors")
    merge(tmp_path / "factors", [tmp_path / "t.svf.safetensors"], output=tmp_path / "x", dtype=name)
    written = load_file(tmp_path / "x" / "model.safetensors")
    torch.testing.assert_close(written["layers.0.fc.weight"], (values * 1.25).to(dtype))


@pytest.mark.parametrize(("dtype", "name"), [("int8", "m"), ("bfloat16", "t.svf.safetensors")])
def test_dtypes_that_cannot_be_written(
    dtype: str, name: str, weight: Tensor, tmp_path: Path
) -> None:
    codes = write(tmp_path / "codes", quantised(weight, "fp8"))
    decompose(codes, tmp_path / "factors")
    with pytest.raises(UsageError, match="--dtype"):
        merge(tmp_path / "factors", [], output=tmp_path / name, dtype=dtype)
    assert not (tmp_path / name).exists()


def test_what_overflows_the_dtype_is_refused_or_clipped(tmp_path: Path) -> None:
    base = write(tmp_path / "base", {"a.weight": 1e5 * normal(8, 6), "b": torch.tensor([1e5])})
    decompose(base, tmp_path / "factors")
    with pytest.raises(NumericalError, match="overflow float16"):
        merge(tmp_path / "factors", [], output=tmp_path / "m", dtype="float16")
    result = merge(
        tmp_path / "factors", [], output=tmp_path / "m", dtype="float16", allow_overflow=True
    )
    assert result.clipped["b"] == 1
    assert result.unchanged == 0
    written = load_file(tmp_path / "m" / "model.safetensors")
    assert all(bool(value.isfinite().all()) for value in written.values())
