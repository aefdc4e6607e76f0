"""`svftool info`: what each kind of file is said to be, what does not hold together; no torch."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from svftool import CheckpointError
from svftool.cli import app
from svftool.files.gguf import read_gguf_header
from svftool.stages.decompose import decompose
from svftool.stages.extract import extract
from svftool.stages.info import info

SHAPES = {"a.weight": (6, 4), "b.weight": (4, 6), "b.bias": (4,)}


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def sharded(folder: Path, **index: Any) -> Path:
    folder.mkdir()
    parts = {"model-00001-of-00002": ["a.weight"], "model-00002-of-00002": ["b.weight", "b.bias"]}
    for stem, names in parts.items():
        save_file({n: state()[n] for n in names}, folder / f"{stem}.safetensors", {"format": "pt"})
    weight_map = {n: f"{stem}.safetensors" for stem, names in parts.items() for n in names}
    document = {"metadata": {"total_size": 208}, "weight_map": weight_map} | index
    (folder / "model.safetensors.index.json").write_text(json.dumps(document))
    return folder


def gguf_text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def gguf(path: Path, *, cut: int = 0) -> Path:
    fields = gguf_text("general.architecture") + struct.pack("<I", 8) + gguf_text("llama")
    words = gguf_text("tokens") + struct.pack("<IIQ", 9, 8, 2) + gguf_text("a") + gguf_text("bc")
    one = gguf_text("blk.0.q.weight") + struct.pack("<IQQIQ", 2, 64, 3, 2, 0)
    two = gguf_text("norm.weight") + struct.pack("<IQIQ", 1, 8, 0, 128)
    head = b"GGUF" + struct.pack("<IQQ", 3, 2, 2) + fields + words + one + two
    data = bytes(128 + 32)
    content = head + bytes(-len(head) % 32) + data
    path.write_bytes(content[: len(content) - cut])
    return path


def test_a_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(state(), file, {"format": "pt"})
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    found = info(tmp_path)
    assert (found.kind, found.contents.format, found.storage) == ("checkpoint", "safetensors", None)
    assert {one.name: one.shape for one in found.contents.tensors} == SHAPES
    assert found.parameters == 52
    assert found.contents.config == {"model_type": "llama"}
    assert found.contents.problems == []


def test_a_pickle(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "model.pt")
    found = info(tmp_path / "model.pt")
    assert (found.kind, found.contents.format, found.parameters) == ("checkpoint", "pickle", 52)


def test_factors_and_a_tuned_file(tmp_path: Path) -> None:
    base, tuned = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    save_file(state(), base)
    save_file({name: 1.1 * value for name, value in state().items()}, tuned)
    decompose(base, tmp_path / "f", rank="2")
    extract(tmp_path / "f", tuned, output=tmp_path / "t.svf.safetensors")
    factors = info(tmp_path / "f", check=True)
    assert (factors.kind, factors.facts["layers"], factors.facts["rank"]) == ("factors", 2, "2")
    assert factors.contents.problems == []
    assert len(factors.digests["svf.safetensors"]) == 64
    small = info(tmp_path / "t.svf.safetensors")
    assert (small.kind, small.facts["layers"]) == ("tuned file", 2)
    assert small.facts["factors_fingerprint"] == factors.facts["fingerprint"]


def test_factors_that_changed_are_found_by_reading_them(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "base.safetensors")
    decompose(tmp_path / "base.safetensors", tmp_path / "f")
    file = tmp_path / "f" / "svf.safetensors"
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(bytes(content))
    assert info(tmp_path / "f").contents.problems == []
    (problem,) = info(tmp_path / "f", check=True).contents.problems
    assert "expected" in problem


ADAPTERS = {
    "peft": (["base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"], "LoRA"),
    "kohya": (["lora_unet_q.lora_down.weight", "lora_unet_q.lora_up.weight"], "LoRA"),
    "comfy": (["diffusion_model.q.lora_A.weight", "diffusion_model.q.lora_B.weight"], "LoRA"),
    "diffusers": (["unet.q.lora_A.weight", "unet.q.lora_B.weight"], "LoRA"),
    None: (["q.hada_w1_a", "q.hada_w1_b"], "LoHa"),
}


@pytest.mark.parametrize("layout", ADAPTERS)
def test_an_adapter_file_is_known_by_its_keys(tmp_path: Path, layout: str | None) -> None:
    names, kind = ADAPTERS[layout]
    file = tmp_path / "adapter.safetensors"
    save_file({names[0]: torch.zeros(3, 8), names[1]: torch.zeros(8, 3)}, file)
    found = info(file)
    assert (found.kind, found.facts["adapter"], found.facts["layout"]) == ("adapter", kind, layout)
    assert found.facts["ranks"] == ([3] if kind == "LoRA" else [])


QUANTISED = {
    "GPTQ": {"q.qweight": torch.int32, "q.qzeros": torch.int32, "q.g_idx": torch.int32},
    "bitsandbytes int8": {"q.weight": torch.int8, "q.SCB": torch.float32},
    "fp8 with block scales": {
        "q.weight": torch.float8_e4m3fn,
        "q.weight_scale_inv": torch.float32,
    },
    "MXFP4": {"q_blocks": torch.uint8, "q_scales": torch.uint8},
    "8-bit or narrower floats without scales": {"q.weight": torch.float8_e5m2},
}


@pytest.mark.parametrize("scheme", QUANTISED)
def test_how_values_are_quantised(tmp_path: Path, scheme: str) -> None:
    tensors = {name: torch.zeros(4, 4).to(dtype) for name, dtype in QUANTISED[scheme].items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert info(tmp_path).storage == scheme
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "x"}}')
    assert info(tmp_path).storage in (f"x ({scheme})", "x")


def test_gguf(tmp_path: Path) -> None:
    found = info(gguf(tmp_path / "m.gguf"))
    assert (found.kind, found.contents.format) == ("checkpoint", "gguf")
    facts = [(one.name, one.dtype, one.shape, one.nbytes) for one in found.contents.tensors]
    assert facts == [
        ("blk.0.q.weight", "Q4_0", (3, 64), 108),
        ("norm.weight", "F32", (8,), 32),
    ]
    assert found.contents.metadata == {"general.architecture": "llama", "tokens": "[2 values]"}
    assert found.storage == "GGUF, Q4_0"
    assert info(tmp_path).contents.tensors == found.contents.tensors


def test_gguf_that_is_cut_off(tmp_path: Path) -> None:
    (problem,) = info(gguf(tmp_path / "m.gguf", cut=8)).contents.problems
    assert "norm.weight: ends at byte" in problem
    whole = gguf(tmp_path / "w.gguf").read_bytes()
    for end in range(4, 180, 7):
        (tmp_path / "c.gguf").write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match=r"c\.gguf: "):
            read_gguf_header(tmp_path / "c.gguf")


def test_a_sharded_folder_that_holds_together(tmp_path: Path) -> None:
    found = info(sharded(tmp_path / "m"))
    assert found.contents.problems == []
    assert len(found.contents.files) == 2


def test_everything_that_does_not_hold_together_is_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "size", metadata={"total_size": 5})
    assert "total_size is 5, the tensors have 208 bytes" in info(folder).contents.problems[0]

    folder = sharded(tmp_path / "lost")
    (folder / "model-00002-of-00002.safetensors").unlink()
    found = info(folder)
    assert "model-00002-of-00002.safetensors: no such file" in found.contents.problems[0]
    assert [one.name for one in found.contents.tensors] == ["a.weight"]

    folder = sharded(tmp_path / "cut")
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    problems = "\n".join(info(folder).contents.problems)
    assert "cut off" in problems
    assert "b.weight" in problems

    folder = sharded(tmp_path / "extra")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"]["b.bias"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "1 tensor is in the shards and not in it: b.bias" in info(folder).contents.problems[0]


def test_tied_names(tmp_path: Path) -> None:
    table = {"model.embed_tokens.weight": torch.zeros(4, 2)}
    save_file(
        table, tmp_path / "model.safetensors", {"lm_head.weight": "model.embed_tokens.weight"}
    )
    assert info(tmp_path).tied == [("lm_head.weight", "model.embed_tokens.weight")]
    save_file(table, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    assert info(tmp_path).tied == [("lm_head.weight", "model.embed_tokens.weight")]


def test_the_command(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(state(), file, {"format": "pt"})
    result = CliRunner().invoke(app, ["info", str(file)])
    assert result.exit_code == 0
    assert "checkpoint (safetensors, 1 file), 3 tensors, 52 parameters, 208 B" in " ".join(
        result.stdout.split()
    )
    file.write_bytes(file.read_bytes() + b"rest")
    result = CliRunner().invoke(app, ["info", str(file), "--json"])
    document = json.loads(result.stdout)
    assert result.exit_code == 3
    assert "4 of them behind" in document["problems"][0]
    assert result.stderr.startswith(f"error: {file}: ")
    assert "4 of them behind" in result.stderr
    result = CliRunner().invoke(app, ["info", str(tmp_path / "missing")])
    assert result.exit_code == 3


QUICK = """
import sys
from svftool.cli import app
try:
    app(sys.argv[1:])
except SystemExit as end:
    print(end.code, "torch" in sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("info MODEL --json", 0),
    ],
)
def test_cheap_answers_come_without_torch(tmp_path: Path, line: str, code: int) -> None:
    save_file(state(), tmp_path / "model.safetensors")
    words = line.replace("MODEL", "model.safetensors").split()
    ran = subprocess.run(
        [sys.executable, "-c", QUICK, *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.stderr.splitlines()[-1] == f"{code} False", ran.stderr
