"""Packed weights: against the format's own package, or its published formula entry by entry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_quantised import normal, opened
from torch import Tensor

from svftool.checkpoints import Checkpoint
from svftool.errors import CheckpointError


def codes(bits: int, *shape: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, shape, generator=draw)


def words(values: Tensor, bits: int) -> Tensor:
    """Pack along the last dimension, low bits first."""
    each = 32 // bits
    missing = -values.shape[-1] % each
    padded = torch.nn.functional.pad(values, (0, missing)).unflatten(-1, (-1, each))
    packed = (padded.long() << (bits * torch.arange(each))).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


# bitsandbytes.


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(48, 128), (7, 9), (48, 80)])
def test_bitsandbytes_4bit(
    shape: tuple[int, int], dtype: torch.dtype, kind: str, nested: bool, tmp_path: Path
) -> None:
    library = pytest.importorskip("bitsandbytes")
    W = normal(*shape).to(dtype)
    packed, state = library.functional.quantize_4bit(
        W, blocksize=64, quant_type=kind, compress_statistics=nested
    )
    parts = {f"a.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    expected = library.functional.dequantize_4bit(packed, state)
    with opened(tmp_path, {"a.weight": packed, **parts, "a.bias": torch.ones(3)}) as found:
        assert set(found.infos) == {"a.weight", "a.bias"}
        values = found.read("a.weight")
        # The package's CPU kernel starts a block at every row, its quantiser does not: where rows
        # are no whole number of blocks, only what was quantised can be held against the values.
        if shape != (48, 80):
            assert torch.equal(values.to(dtype), expected)
        step = found.step("a.weight")
        assert step is not None
        assert float(((values - W.float()).abs() / step).max()) < 0.56


def test_nf4_by_its_formula(tmp_path: Path) -> None:
    table = normal(16).sort().values
    q = codes(4, 4, 64)
    packed = (q.flatten()[::2] << 4 | q.flatten()[1::2]).to(torch.uint8).unsqueeze(1)
    facts = b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4, 64]}'
    tensors = {
        "a.weight": packed,
        "a.weight.absmax": normal(4).abs(),
        "a.weight.quant_map": table,
        "a.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(facts), dtype=torch.uint8),
    }
    with opened(tmp_path, tensors) as found:
        expected = table[q] * tensors["a.weight.absmax"].unsqueeze(1)
        assert torch.equal(found.read("a.weight"), expected)


@pytest.mark.parametrize("offset", [None, [1.0], 10**400, "x"], ids=lambda one: type(one).__name__)
def test_a_state_that_states_no_number_ends_in_one_line(offset: Any, tmp_path: Path) -> None:
    """A block may be larger than the tensor; what is stated is read as JSON and may be anything."""
    facts = {
        "shape": [4, 8], "blocksize": 10**12, "nested_blocksize": 10**12, "nested_offset": offset,
    }  # fmt: skip
    tensors = {
        "a.weight": torch.arange(16, dtype=torch.uint8).reshape(-1, 1),
        "a.weight.absmax": torch.zeros(1, dtype=torch.uint8),
        "a.weight.quant_map": torch.linspace(-1, 1, 16),
        "a.weight.nested_absmax": torch.ones(1),
        "a.weight.nested_quant_map": torch.linspace(-1, 1, 256),
    }
    state = "a.weight.quant_state.bitsandbytes__nf4"
    for folder, stated in (("bad", facts), ("good", {**facts, "nested_offset": 0.5})):
        (tmp_path / folder).mkdir()
        raw = torch.tensor(list(json.dumps(stated).encode()), dtype=torch.uint8)
        with opened(tmp_path / folder, {**tensors, state: raw}) as found:
            if folder == "good":
                assert found.read("a.weight").shape == (4, 8)
            else:
                with pytest.raises(CheckpointError, match="expected bitsandbytes nf4 with double"):
                    found.read("a.weight")


def test_bitsandbytes_int8(tmp_path: Path) -> None:
    library = pytest.importorskip("bitsandbytes")
    W = normal(24, 16)
    q, scale, _ = library.functional.int8_vectorwise_quant(W.half())
    expected = library.functional.int8_vectorwise_dequant(q, scale)
    tensors = {"a.weight": q, "a.SCB": scale, "a.weight_format": torch.tensor(0).to(torch.uint8)}
    with opened(tmp_path, tensors) as found:
        assert set(found.infos) == {"a.weight"}
        assert torch.equal(found.read("a.weight"), expected)


def test_int8_by_its_formula(tmp_path: Path) -> None:
    q = (codes(8, 5, 4) - 128).to(torch.int8)
    tensors = {"a.weight": q, "a.SCB": normal(5).abs()}
    with opened(tmp_path, tensors) as found:
        expected = q.double() * tensors["a.SCB"].double().unsqueeze(1) / 127
        torch.testing.assert_close(found.read("a.weight").double(), expected, rtol=3e-7, atol=0)


# GPTQ and AWQ.


@pytest.mark.parametrize("version", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("order", ["as stored", "sorted", None])
def test_gptq(order: str | None, bits: int, version: str | None, tmp_path: Path) -> None:
    rows, out, groups = 64, 32, 4
    q, zero = codes(bits, rows, out), codes(bits, groups, out, seed=1)
    scale = normal(groups, out).half()
    index = torch.arange(rows) // (rows // groups)
    if order == "as stored":
        index = index[torch.randperm(rows, generator=torch.Generator().manual_seed(0))]
    tensors = {
        "a.qweight": words(q.mT, bits).mT,
        "a.qzeros": words(zero, bits),
        "a.scales": scale,
        "a.bias": torch.ones(out),
    }
    if order is not None:
        tensors["a.g_idx"] = index.int()
    config: dict[str, Any] | None = None
    if version is not None:
        config = {"quant_method": "gptq", "bits": bits, "checkpoint_format": version}
    shift = 0 if version == "gptq_v2" else 1
    with opened(tmp_path, tensors, config) as found:
        assert set(found.infos) == {"a.weight", "a.bias"}
        W = torch.empty(out, rows)
        for i in range(rows):
            g = int(index[i])
            for o in range(out):
                z = (int(zero[g, o]) + shift) % 2**bits
                W[o, i] = (int(q[i, o]) - z) * float(scale[g, o])
        assert torch.equal(found.read("a.weight"), W)


@pytest.mark.parametrize("group", [-1, 2])
def test_a_group_that_gptq_does_not_have_is_refused(group: int, tmp_path: Path) -> None:
    tensors = {
        "a.qweight": words(codes(4, 16, 8).mT, 4).mT,
        "a.qzeros": words(codes(4, 2, 8), 4),
        "a.scales": normal(2, 8).half(),
        "a.g_idx": torch.tensor([0, 1] * 7 + [0, group]).int(),
    }
    with opened(tmp_path, tensors) as found, pytest.raises(CheckpointError, match="expected GPTQ"):
        found.read("a.weight")


def test_awq(tmp_path: Path) -> None:
    rows, out, groups = 32, 24, 2
    q, zero = codes(4, rows, out), codes(4, groups, out, seed=1)
    scale = normal(groups, out).half()
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def packed(values: Tensor) -> Tensor:
        return words(values.unflatten(-1, (-1, 8))[..., order].flatten(-2), 4)

    tensors = {"a.qweight": packed(q), "a.qzeros": packed(zero), "a.scales": scale}
    config = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}
    for stated in (None, config):
        with opened(tmp_path, tensors, stated) as found:
            spread = [one.repeat_interleave(16, 0).float() for one in (zero, scale)]
            assert torch.equal(found.read("a.weight"), ((q - spread[0]) * spread[1]).mT)
    with opened(tmp_path, tensors, {**config, "version": "gemv"}) as found:
        assert type(found) is Checkpoint


# compressed-tensors.


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("scales", [(20, 4), (20, 1), (1,)])
def test_compressed(scales: tuple[int, ...], zeros: bool, bits: int, tmp_path: Path) -> None:
    half = 2 ** (bits - 1)
    q = codes(bits, 20, 64)
    scale = normal(*scales).bfloat16()
    tensors = {
        "a.weight_packed": words(q, bits),
        "a.weight_scale": scale,
        "a.weight_shape": torch.tensor([20, 64]),
    }
    W = (q - half).float()
    spread = (
        scale.float() if len(scales) == 1 else scale.float().repeat_interleave(64 // scales[1], 1)
    )
    if zeros and len(scales) == 2:
        zero = codes(bits, *scales, seed=1)
        tensors["a.weight_zero_point"] = words(zero.mT, bits).mT
        W -= (zero - half).repeat_interleave(64 // scales[1], 1)
    with opened(tmp_path, tensors) as found:
        assert set(found.infos) == {"a.weight"}
        assert torch.equal(found.read("a.weight"), W * spread)


@pytest.mark.parametrize("kind", ["gptq", "awq", "compressed"])
def test_the_last_group_is_smaller_where_the_stated_size_does_not_divide_the_inputs(
    kind: str, tmp_path: Path
) -> None:
    """Forty inputs in groups of 32 have two scales, as groups of 20 would have."""
    q, zero, scale = codes(4, 40, 32), codes(4, 2, 32, seed=1), normal(2, 32).half()
    config: dict[str, Any] = {"quant_method": kind, "bits": 4, "group_size": 32}
    if kind == "gptq":
        packed = {"qweight": words(q.mT, 4).mT, "qzeros": words((zero - 1) & 15, 4)}
    elif kind == "awq":
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        turned = [one.unflatten(-1, (-1, 8))[..., order].flatten(-2) for one in (q, zero)]
        packed = dict(zip(("qweight", "qzeros"), (words(one, 4) for one in turned), strict=True))
    else:
        weights = {"num_bits": 4, "group_size": 32, "strategy": "group"}
        config = {"quant_method": kind, "config_groups": {"group_0": {"weights": weights}}}
        packed = {
            "weight_packed": words(q.mT, 4),
            "weight_zero_point": words(zero, 4).mT,
            "weight_shape": torch.tensor([32, 40]),
        }
    packed["weight_scale" if kind == "compressed" else "scales"] = (
        scale.mT if kind == "compressed" else scale
    )
    group = torch.arange(40) // 32
    expected = ((q - zero[group]) * scale.float()[group]).mT
    with opened(tmp_path, {f"a.{name}": one for name, one in packed.items()}, config) as found:
        assert torch.equal(found.read("a.weight"), expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_as_compressed_tensors_unpacks(bits: int, symmetric: bool, tmp_path: Path) -> None:
    library = pytest.importorskip("compressed_tensors")
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    args = library.quantization.QuantizationArgs(
        num_bits=bits, strategy="group", group_size=16, symmetric=symmetric
    )
    W, scale = normal(24, 64).bfloat16(), (normal(24, 4).abs() + 0.1).bfloat16()
    zero = (codes(bits, 24, 4) - 2 ** (bits - 1)).to(torch.int8)
    zero = torch.zeros_like(zero) if symmetric else zero
    forward = library.quantization.lifecycle.forward
    q = forward.quantize(x=W, scale=scale, zero_point=zero, args=args, dtype=torch.int8)
    tensors = {
        "a.weight_packed": helpers.pack_to_int32(q, bits),
        "a.weight_scale": scale,
        "a.weight_shape": torch.tensor(W.shape),
    }
    if not symmetric:
        tensors["a.weight_zero_point"] = helpers.pack_to_int32(zero, bits, packed_dim=0)
    expected = forward.dequantize(x_q=q, scale=scale, zero_point=zero, args=args)
    exact = forward.dequantize(x_q=q, scale=scale.float(), zero_point=zero, args=args)
    with opened(tmp_path, tensors) as found:
        values = found.read("a.weight")
        assert torch.equal(values, exact)
        # The package rounds the zero point taken off to bfloat16, 8 bits, before it multiplies.
        if symmetric:
            assert torch.equal(values.bfloat16(), expected)


# Four-bit floats.


@pytest.mark.parametrize("lead", [(3,), ()])
def test_mxfp4(lead: tuple[int, ...], tmp_path: Path) -> None:
    library = pytest.importorskip("transformers.integrations.mxfp4")
    blocks = codes(8, *lead, 6, 2, 16).to(torch.uint8)
    scales = (codes(4, *lead, 6, 2) + 118).to(torch.uint8)
    expected = library.convert_moe_packed_tensors(
        *(one if lead else one.unsqueeze(0) for one in (blocks, scales)), dtype=torch.float32
    )
    tensors = {"x.gate_up_proj_blocks": blocks, "x.gate_up_proj_scales": scales}
    with opened(tmp_path, tensors) as found:
        values = found.read("x.gate_up_proj")
        assert torch.equal(values, expected if lead else expected[0].mT)
        assert found.infos["x.gate_up_proj"].shape == values.shape


def test_nvfp4(tmp_path: Path) -> None:
    q = codes(4, 6, 32)
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    packed = (q[:, ::2] | q[:, 1::2] << 4).to(torch.uint8)
    scale, over = (normal(6, 2).abs() * 50).to(torch.float8_e4m3fn), torch.tensor([37.0])
    tensors = {"a.weight_packed": packed, "a.weight_scale": scale, "a.weight_global_scale": over}
    W = torch.where(q > 7, -table[q % 8], table[q % 8])
    with opened(tmp_path, tensors) as found:
        assert set(found.infos) == {"a.weight"}
        expected = W * (scale.float() / over).repeat_interleave(16, 1)
        assert torch.equal(found.read("a.weight"), expected)


# What is no format, or not all of one.


def gptq_like() -> dict[str, Tensor]:
    return {
        "a.qweight": words(codes(4, 32, 64), 4).mT,
        "a.qzeros": words(codes(4, 4, 32), 4),
        "a.scales": normal(4, 32).half(),
    }


WRONG: dict[str, dict[str, Tensor]] = {
    "no scales": {"a.scales": torch.ones(3, 3).half()},
    "zeros of other groups": {"a.qzeros": words(codes(4, 3, 32), 4)},
    "three bits": {"a.qzeros": words(codes(4, 4, 24), 4)},
    "an order of another length": {"a.g_idx": torch.zeros(9, dtype=torch.int32)},
    "codes of bytes": {"a.qweight": codes(8, 8, 32).to(torch.uint8)},
}


@pytest.mark.parametrize("kind", WRONG)
def test_parts_that_do_not_fit_stay_codes(kind: str, tmp_path: Path) -> None:
    with opened(tmp_path, gptq_like()) as found:
        assert list(found.infos) == ["a.weight"]
    with opened(tmp_path, gptq_like() | WRONG[kind]) as found:
        assert type(found) is Checkpoint
        assert found.infos["a.qweight"].dtype in (torch.int32, torch.uint8)


def test_a_weight_of_the_same_name_is_not_covered(tmp_path: Path) -> None:
    with opened(tmp_path, gptq_like() | {"a.weight": normal(4, 4)}) as found:
        assert type(found) is Checkpoint
