"""Models and tokenizers of bases that are stored as codes: built, tuned and measured."""

from __future__ import annotations

import json
import math
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from language import write_model, write_texts
from safetensors.torch import load_file, save_file

from svftool import audit, decompose, evaluate, finetune, merge
from svftool.checkpoints import open_checkpoint
from svftool.errors import CheckpointError
from svftool.files.gguf import gguf_parts, read_gguf_header, write_outline
from svftool.models import build_model
from svftool.stages.info import info
from svftool.tasks.tokens import load_tokenizer
from svftool.training import Settings

gguf: Any = pytest.importorskip("gguf")
quants: Any = pytest.importorskip("gguf.quants")
transformers: Any = pytest.importorskip("transformers")

SHAPES = {
    "token_embd.weight": (300, 64), "blk.0.attn_q.weight": (64, 64),
    "blk.0.attn_k.weight": (32, 64), "blk.0.attn_v.weight": (32, 64),
    "blk.0.attn_output.weight": (64, 64), "blk.0.ffn_gate.weight": (96, 64),
    "blk.0.ffn_up.weight": (96, 64), "blk.0.ffn_down.weight": (64, 96),
    "blk.0.attn_norm.weight": (64,), "blk.0.ffn_norm.weight": (64,), "output_norm.weight": (64,),
}  # fmt: skip
WEIGHTS = {
    name: np.random.default_rng(n).standard_normal(shape).astype(np.float32) * np.float32(0.1)
    for n, (name, shape) in enumerate(SHAPES.items())
}


def tokens() -> list[str]:
    """Return the letters that stand for bytes, and a few words, up to the vocabulary's size."""
    letters = import_module("transformers.convert_slow_tokenizer").bytes_to_unicode().values()
    return ["<|a|>", "<|b|>", *letters, "be", "or", *(f"word{n}" for n in range(300 - 260))]


def write(path: Path, *, parts: int = 1, words: list[str] | None = None) -> Path:
    """Write a llama with a tokenizer in its metadata, in one file or more."""
    writer = gguf.GGUFWriter(
        path, "llama", split_max_tensors=math.ceil(len(SHAPES) / parts) if parts > 1 else 0
    )
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    words = words or tokens()
    writer.add_token_list(words)
    writer.add_token_types([3, 3] + [1] * (len(words) - 2))
    writer.add_token_merges(["b e", "o r"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, values in WEIGHTS.items():
        kind = gguf.GGMLQuantizationType["Q4_1" if values.ndim > 1 else "F32"]
        writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_model_is_that_of_transformers_bit_for_bit(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    expected = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    )
    with open_checkpoint(path) as found:
        model = build_model("auto", checkpoint=found)
    assert type(model) is type(expected)
    assert model.config.tie_word_embeddings
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ids = torch.arange(9)[None]
    assert torch.equal(model(ids).logits, expected.eval()(ids).logits)


def test_the_tokenizer_comes_from_the_metadata(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    found = load_tokenizer(path)
    assert found("to be or not").input_ids == expected("to be or not").input_ids
    assert len(found) == len(expected) >= 300


def test_finetune_and_evaluate(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    texts = write_texts(tmp_path / "t.jsonl", [{"text": "to be or not to be"}] * 4)
    decompose(path, tmp_path / "f")
    options: dict[str, Any] = {"task": "language", "data": texts, "sequence_length": 16}
    result = finetune(
        tmp_path / "f",
        output=tmp_path / "t.svf.safetensors",
        evaluation=texts,
        settings=Settings(steps=2),
        **options,
    )
    (run,) = result.runs
    before = evaluate(path, **options)
    tuned = evaluate(tmp_path / "f", tuned=tmp_path / "t.svf.safetensors", **options)
    assert before.runs[0].metrics["perplexity"] == pytest.approx(run.before["perplexity"], rel=1e-3)
    assert tuned.runs[0].metrics["perplexity"] == pytest.approx(run.after["perplexity"], rel=1e-3)
    assert run.after["perplexity"] < run.before["perplexity"]


def test_a_folder_may_hold_the_configuration_and_the_tokenizer(tmp_path: Path) -> None:
    """A file beside the tokenizer of the original is tokenised by that."""
    write_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    path = write(tmp_path / "m.gguf")
    from svftool.stages.catalogue import ModelFacts

    with open_checkpoint(tmp_path) as found:
        assert found.format == "gguf"
        assert ModelFacts.of(found, None).folder == tmp_path
    (tmp_path / "tokenizer.json").unlink()
    with open_checkpoint(path) as found:
        assert ModelFacts.of(found, None).folder == path


def test_an_outline_says_the_same_without_the_vocabulary(tmp_path: Path) -> None:
    words = tokens() + [f"more{n}" for n in range(9000)]
    path = write(tmp_path / "m.gguf", words=words)
    write_outline([path], tmp_path / "outline.gguf")
    header, outline = read_gguf_header(path), read_gguf_header(tmp_path / "outline.gguf")
    assert header.metadata.keys() - outline.metadata.keys() == {
        "tokenizer.ggml.tokens", "tokenizer.ggml.token_type",
    }  # fmt: skip
    assert [(e.name, e.kind, e.shape) for e in outline.entries] == [
        (e.name, e.kind, e.shape) for e in header.entries
    ]
    library = import_module("transformers.modeling_gguf_pytorch_utils")
    expected = library.load_gguf_checkpoint(str(path))["config"]
    naming = import_module("svftool.checkpoints.quantised.gguf_names")
    assert naming.gguf_config(path, header) == expected
    assert expected["vocab_size"] == len(words)


# Files that are split.


@pytest.fixture
def split(tmp_path: Path) -> list[Path]:
    (tmp_path / "parts").mkdir()
    write(tmp_path / "parts" / "m.gguf", parts=3)
    return sorted((tmp_path / "parts").glob("*.gguf"))


def test_a_split_file_is_one(split: list[Path], tmp_path: Path) -> None:
    assert [one.name for one in split] == [f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    with open_checkpoint(write(tmp_path / "m.gguf")) as whole:
        for place in (*split, split[0].parent):
            with open_checkpoint(place) as found:
                assert found.infos.keys() == whole.infos.keys()
                assert all(torch.equal(found.read(n), whole.read(n)) for n in whole.infos)
                assert found.config == whole.config
    described = info(split[1])
    assert len(described.contents.tensors) == len(SHAPES)
    assert list(described.contents.files) == [one.name for one in split]


def test_a_part_that_is_missing_or_of_another_model(split: list[Path]) -> None:
    other = split[1].read_bytes()
    split[1].unlink()
    with pytest.raises(CheckpointError, match=r"1 of 3 files is missing \(m-00002-of-00003"):
        open_checkpoint(split[0])
    split[1].write_bytes(split[2].read_bytes())
    with pytest.raises(CheckpointError, match="each once"):
        open_checkpoint(split[0])
    split[1].write_bytes(other)
    assert gguf_parts(split[2]) == tuple(split)


# Other codes.


def int8(W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = W.abs().amax(1, keepdim=True) / 127
    return (W / scale).round().to(torch.int8), scale


def test_a_folder_of_codes_is_built_as_the_numbers_that_they_stand_for(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    dense = load_file(folder / "model.safetensors")
    coded, expected = {}, {}
    for name, value in dense.items():
        if value.ndim == 2 and "layers" in name:
            codes, scale = int8(value)
            coded |= {name: codes, f"{name}_scale": scale}
            expected[name] = codes.float() * scale
        else:
            coded[name] = expected[name] = value
    save_file(coded, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "made-here"}
    (folder / "config.json").write_text(json.dumps(config))
    with open_checkpoint(folder) as found:
        model = build_model("auto", checkpoint=found)
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    texts = write_texts(tmp_path / "t.jsonl", [{"text": "to be or not to be"}] * 3)
    decompose(folder, tmp_path / "f")
    result = finetune(
        tmp_path / "f", output=tmp_path / "t.svf.safetensors", task="language", data=texts,
        evaluation=texts, settings=Settings(steps=1), sequence_length=16,
    )  # fmt: skip
    assert result.runs[0].after["perplexity"] > 0


def test_a_base_against_its_own_blocks_is_quantisation_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    with open_checkpoint(path) as found:
        read = {name: found.read(name) for name in found.infos}
    noisy = {
        name: value + (0.002 * torch.randn(value.shape).clamp(-1, 1) if value.ndim > 1 else 0)
        for name, value in read.items()
    }
    save_file(read, tmp_path / "copy.safetensors")
    save_file(noisy, tmp_path / "near.safetensors")
    (same,) = audit(tmp_path / "copy.safetensors", [path]).comparisons
    assert same.verdict is not None
    assert same.verdict.name == "untouched"
    (near,) = audit(tmp_path / "near.safetensors", [path]).comparisons
    assert near.verdict is not None
    assert near.verdict.name == "quantisation only"


def test_pickled_codes_are_read_and_merged_without_their_scales(tmp_path: Path) -> None:
    torch.manual_seed(0)
    codes, scale = int8(torch.randn(16, 12))
    state = {"fc.weight": codes, "fc.weight_scale": scale, "fc.bias": torch.ones(16)}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "m.pth")
    with open_checkpoint(tmp_path / "m.pth") as found:
        assert set(found.infos) == {"fc.weight", "fc.bias"}
        assert found.infos["fc.weight"].storage
        assert torch.equal(found.read("fc.weight"), codes.float() * scale)
    decompose(tmp_path / "m.pth", tmp_path / "f")
    merge(tmp_path / "f", output=tmp_path / "d.pth", verify=True)
    dense = torch.load(tmp_path / "d.pth", weights_only=True)
    assert dense["epoch"] == 3
    assert set(dense["state_dict"]) == {"fc.weight", "fc.bias"}
    assert torch.equal(dense["state_dict"]["fc.weight"], codes.float() * scale)


def test_tensors_of_torchao_are_refused_in_one_line(tmp_path: Path) -> None:
    from svftool.checkpoints.pickle_file import _refusal

    asked = RuntimeError("Weights only load failed. Unsupported global: GLOBAL torchao.dtypes.AQT")
    error = _refusal(tmp_path / "m.pth", asked)
    assert "torchao that is not supported" in str(error)
    assert "\n" not in str(error)
