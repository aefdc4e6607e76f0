"""Quantised storage is read as numbers: bit-equal to each format's own dequantiser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from svftool.checkpoints import Checkpoint, open_checkpoint


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def opened(
    folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None
) -> Checkpoint:
    """Write a folder with these tensors and this quantization_config, and open it."""
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    if config is not None:
        text = json.dumps({"quantization_config": config})
        (folder / "config.json").write_text(text, encoding="utf-8")
    return open_checkpoint(folder)


def fp8(scale: Tensor, *shape: int, dtype: torch.dtype = torch.float8_e4m3fn) -> dict[str, Tensor]:
    codes = (normal(*shape) * 30).to(dtype)
    return {"a.weight": codes, "a.weight_scale_inv": scale, "norm.weight": torch.ones(5)}


def blockwise(codes: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """The published formula, entry by entry: each is multiplied with its block's scale."""
    W = codes.float()
    for i in range(W.shape[0]):
        for j in range(W.shape[1]):
            W[i, j] *= scale[i // block[0], j // block[1]].float()
    return W


STATED: dict[str, dict[str, Any]] = {
    "top": {"quant_method": "fp8", "weight_block_size": [8, 4]},
    "nested": {"config_groups": {"group_0": {"weights": {"block_structure": [8, 4]}}}},
    "text": {"config_groups": {"group_0": {"weights": {"block_structure": "8x4"}}}},
}


@pytest.mark.parametrize("stated", STATED)
def test_fp8_with_a_scale_a_block(stated: str, tmp_path: Path) -> None:
    tensors = fp8(normal(3, 3).abs(), 20, 9)
    with opened(tmp_path, tensors, STATED[stated]) as found:
        assert set(found.infos) == {"a.weight", "norm.weight"}
        assert found.infos["a.weight"].dtype == torch.float32
        assert "8 x 4" in found.infos["a.weight"].storage
        expected = blockwise(tensors["a.weight"], tensors["a.weight_scale_inv"], (8, 4))
        assert torch.equal(found.read("a.weight"), expected)
        assert any("fp8" in note or "float8" in note for note in found.notes)


SCALES = {
    "tensor": ((), lambda W, s: W * s),
    "tensor of one": ((1,), lambda W, s: W * s),
    "row": ((16, 1), lambda W, s: W * s),
    "row as a vector": ((16,), lambda W, s: W * s.unsqueeze(1)),
    "column groups": ((16, 3), lambda W, s: W * s.repeat_interleave(4, 1)),
    "even blocks": ((2, 3), lambda W, s: W * s.repeat_interleave(8, 0).repeat_interleave(4, 1)),
}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
@pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv", "scale_weight"])
@pytest.mark.parametrize("kind", SCALES)
def test_scales(
    kind: str, name: str, scale: torch.dtype, dtype: torch.dtype, tmp_path: Path
) -> None:
    shape, expected = SCALES[kind]
    tensors = {"a.weight": (normal(16, 12) * 30).to(dtype), f"a.{name}": normal(*shape).to(scale)}
    block = (
        {"weight_block_size": [8, 4]} if kind == "even blocks" else {"weight_block_size": [1, 4]}
    )
    with opened(tmp_path, tensors, block) as found:
        assert list(found.infos) == ["a.weight"]
        W = expected(tensors["a.weight"].float(), tensors[f"a.{name}"].float())
        assert torch.equal(found.read("a.weight"), W)


def test_a_zero_point_is_taken_off(tmp_path: Path) -> None:
    codes, zero = (normal(6, 4) * 30).to(torch.int8), (normal(6, 1) * 9).to(torch.int8)
    tensors = {"a.weight": codes, "a.weight_scale": normal(6, 1), "a.weight_zero_point": zero}
    with opened(tmp_path, tensors) as found:
        expected = (codes.float() - zero.float()) * tensors["a.weight_scale"]
        assert torch.equal(found.read("a.weight"), expected)


def test_as_transformers_reads_fp8(tmp_path: Path) -> None:
    reference = pytest.importorskip("transformers.integrations.finegrained_fp8")
    tensors = fp8(normal(2, 3).abs(), 16, 12)
    expected = reference.Fp8Dequantize(None)._dequantize_one(
        tensors["a.weight"], tensors["a.weight_scale_inv"], torch.float32
    )
    with opened(tmp_path, tensors, {"weight_block_size": [8, 4]}) as found:
        assert torch.equal(found.read("a.weight"), expected)


LEFT = {
    "no scale": {"a.weight": normal(8, 6).to(torch.float8_e4m3fn)},
    "a scale of another shape": {
        "a.weight": normal(8, 6).to(torch.float8_e4m3fn),
        "a.weight_scale": torch.ones(5, 7),
    },
    "two scales": {
        "a.weight": normal(8, 6).to(torch.float8_e4m3fn),
        "a.weight_scale": torch.ones(1),
        "a.weight_scale_inv": torch.ones(1),
    },
    "blocks of two possible sizes": {
        "a.weight": normal(192, 6).to(torch.float8_e4m3fn),
        "a.weight_scale_inv": torch.ones(2, 1),
    },
    "a vector": {"a.weight": normal(8).to(torch.float8_e4m3fn), "a.weight_scale": torch.ones(1)},
    "whole numbers": {"a.weight": torch.ones(8, 6).to(torch.int8)},
}


@pytest.mark.parametrize("kind", LEFT)
def test_what_is_not_understood_stays_codes(kind: str, tmp_path: Path) -> None:
    with opened(tmp_path, LEFT[kind]) as found:
        assert type(found) is Checkpoint
        assert set(found.infos) == set(LEFT[kind])
        assert found.infos["a.weight"].dtype == LEFT[kind]["a.weight"].dtype
