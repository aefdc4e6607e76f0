"""GGUF is read as gguf and transformers read it, bit for bit."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from svftool.checkpoints import Checkpoint, open_checkpoint
from svftool.checkpoints.quantised.gguf_steps import steps
from svftool.errors import CheckpointError

gguf: Any = pytest.importorskip("gguf")
quants: Any = pytest.importorskip("gguf.quants")

KINDS = sorted(kind.name for kind in quants._type_traits)


def write(path: Path, tensors: dict[str, tuple[np.ndarray, str]], arch: str = "other") -> Path:
    """Write raw blocks, each with its kind."""
    writer = gguf.GGUFWriter(path, arch)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def blocks(kind: str, rows: int = 3) -> np.ndarray:
    """Return rows of two blocks of any bytes: every byte is a code of some number."""
    _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return np.random.default_rng(0).integers(0, 256, (rows, 2 * size), dtype=np.uint8)


def bits(values: Tensor) -> Tensor:
    return values.view(torch.int32)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_that_the_package_decodes(kind: str, tmp_path: Path) -> None:
    data = blocks(kind)
    expected = quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    with open_checkpoint(write(tmp_path / "m.gguf", {"a.weight": (data, kind)})) as found:
        info = found.infos["a.weight"]
        assert (info.storage, info.dtype) == ("" if kind == "BF16" else kind, torch.float32)
        assert found.format == "gguf"
        assert torch.equal(bits(found.read("a.weight")), bits(torch.from_numpy(expected.copy())))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("rows", [128, 300, 1000])
@pytest.mark.parametrize("kind", ["Q4_1", "Q6_K"])
def test_large_tensors_are_decoded_in_parts(
    kind: str, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svftool.checkpoints.quantised.gguf_file._ROWS", 2)
    data = blocks(kind, rows)
    expected = quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    with open_checkpoint(write(tmp_path / "m.gguf", {"a.weight": (data, kind)})) as found:
        assert torch.equal(bits(found.read("a.weight")), bits(torch.from_numpy(expected.copy())))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_plain_numbers_come_in_float32(kind: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    data = quants.quantize(values, gguf.GGMLQuantizationType[kind])
    with open_checkpoint(write(tmp_path / "m.gguf", {"a.weight": (data, kind)})) as found:
        expected = quants.dequantize(data, gguf.GGMLQuantizationType[kind])
        assert torch.equal(found.read("a.weight"), torch.from_numpy(expected.copy()))
        assert found.step("a.weight") is None


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_the_step_is_how_far_rounding_moves(kind: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32)
    data = quants.quantize(values, gguf.GGMLQuantizationType[kind])
    with open_checkpoint(write(tmp_path / "m.gguf", {"a.weight": (data, kind)})) as found:
        step = found.step("a.weight")
        assert step is not None
        moved = (found.read("a.weight") - torch.from_numpy(values)).abs() / step
        # Those of an even number of levels clip the largest value of a block by up to a step.
        assert float(moved.max()) <= (1.01 if kind in ("Q4_0", "Q5_0") else 0.52)
        assert float(moved.max()) > 0.4


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_the_step_is_that_of_the_values(kind: str) -> None:
    data = blocks(kind, 20)
    values = torch.from_numpy(quants.dequantize(data, gguf.GGMLQuantizationType[kind]).copy())
    size = 16 if kind in ("Q2_K", "Q3_K", "Q6_K") else 32
    raw = torch.from_numpy(data).reshape(40, -1)
    step = steps(kind, raw, values.reshape(40, -1)).reshape(-1, size)
    groups = values.reshape(-1, size)
    good = groups.isfinite().all(dim=1) & (groups.amax(1) > groups.amin(1))
    apart = groups[good].double().sort(dim=1).values.diff(dim=1)
    counts = apart / step[good].double().amax(dim=1, keepdim=True)
    assert int(good.sum()) > 100
    scale = groups[good].double().abs().amax(1, keepdim=True) / step[good].double().amax(1, True)
    assert bool(((counts - counts.round()).abs() <= 1e-6 * (1 + scale)).all())


def llama(folder: Path) -> tuple[Path, Any]:
    """Write a small llama as llama.cpp names and turns it, and return what transformers loads."""
    transformers = pytest.importorskip("transformers")
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(40)
    draw = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (40, 64), "blk.0.attn_q.weight": (64, 64),
        "blk.0.attn_k.weight": (32, 64), "blk.0.attn_v.weight": (32, 64),
        "blk.0.attn_output.weight": (64, 64), "blk.0.ffn_gate.weight": (96, 64),
        "blk.0.ffn_up.weight": (96, 64), "blk.0.ffn_down.weight": (64, 96),
        "blk.0.attn_norm.weight": (64,), "blk.0.ffn_norm.weight": (64,),
        "output_norm.weight": (64,), "rope_freqs.weight": (8,),
    }  # fmt: skip
    for name, shape in shapes.items():
        values = draw.standard_normal(shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q4_1 if len(shape) > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    library = import_module("transformers.modeling_gguf_pytorch_utils")
    stated = library.load_gguf_checkpoint(str(folder / "m.gguf"))["config"]
    config = transformers.AutoConfig.for_model(**stated)
    model = transformers.AutoModelForCausalLM.from_config(config)
    loaded = library.load_gguf_checkpoint(
        str(folder / "m.gguf"), return_tensors=True, model_to_load=model
    )
    return folder / "m.gguf", loaded["tensors"]


def test_names_and_values_are_those_of_transformers(tmp_path: Path) -> None:
    path, expected = llama(tmp_path)
    with open_checkpoint(path) as found:
        assert set(found.infos) == set(expected)
        assert "model.layers.0.self_attn.q_proj.weight" in found.infos
        for name, values in expected.items():
            assert torch.equal(found.read(name), values), name
            assert found.infos[name].shape == tuple(values.shape)
        q = "model.layers.0.self_attn.q_proj.weight"
        step = found.step(q)
        assert step is not None
        # The steps are turned as the values are: each row of blocks has its own.
        whole = found.read(q).reshape(64, 2, 32) / step.reshape(64, 2, 32)
        apart = whole.sort(dim=-1).values.diff(dim=-1)
        assert bool(((apart - apart.round()).abs() < 1e-3).all())
        assert list(found.passed_over) == ["rope_freqs.weight"]
        assert any("rope_freqs.weight" in note for note in found.warnings)


def test_an_unknown_architecture_keeps_the_names_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"x.weight": (blocks("Q8_0"), "Q8_0")}, "unheard-of")
    with open_checkpoint(path) as found:
        assert list(found.infos) == ["x.weight"]
        assert any("unheard-of" in note for note in found.notes)


def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"x.weight": (blocks("Q4_1"), "Q4_1")})
    whole = path.read_bytes()
    path.write_bytes(whole[:-80])
    with pytest.raises(CheckpointError, match="cut off"):
        open_checkpoint(path)
    path.write_bytes(whole)
    opened: Checkpoint = open_checkpoint(path)
    path.write_bytes(whole[:-80])
    with opened, pytest.raises(CheckpointError, match="reading failed"):
        opened.read("x.weight")
