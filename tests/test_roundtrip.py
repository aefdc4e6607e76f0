"""Decompose, then merge: every tensor comes back bit for bit, and loads in its own library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from svftool import decompose, merge, open_checkpoint

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REAL = [
    "resnet20-12fca82f.th",
    "resnet56-4bfd9763.th",
    "squeezenet1_1_fp16.safetensors",
    "mobilenet_v2_035_features.safetensors",
    "stories260K",
]


def tensors_of(path: Path) -> dict[str, Tensor]:
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.infos}


def assert_bit_identical(found: Path, expected: Path) -> None:
    one, two = tensors_of(found), tensors_of(expected)
    assert list(one) == list(two)
    for name, tensor in two.items():
        assert (one[name].dtype, one[name].shape) == (tensor.dtype, tensor.shape), name
        bits, wanted = (t.contiguous().reshape(-1).view(torch.uint8) for t in (one[name], tensor))
        assert torch.equal(bits, wanted), name


def round_trip(base: Path, folder: Path, output: str, *, rank: str = "full") -> Path:
    factors = decompose(base, folder / f"factors-{rank}", rank=rank).output
    result = merge(factors, output=folder / f"{rank}-{output}", verify=True)
    assert not any(layer.changed for layer in result.layers)
    assert_bit_identical(result.output, base)
    return result.output


@pytest.mark.parametrize("rank", ["full", "4"])
@pytest.mark.parametrize("name", REAL)
def test_real_checkpoints(data: Path, tmp_path: Path, name: str, rank: str) -> None:
    base = data / "checkpoints" / name
    round_trip(base, tmp_path, "merged" if base.is_dir() else f"merged{base.suffix}", rank=rank)


def timm_network(name: str, **options: object) -> Callable[[], torch.nn.Module]:
    def build() -> torch.nn.Module:
        return pytest.importorskip("timm").create_model(name, **options)

    return build


TIMM = {
    "resnet50": timm_network("resnet50"),
    "convnext": timm_network("convnext_atto"),
    "swin": timm_network(
        "swin_tiny_patch4_window7_224", embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 6)
    ),
    "vit": timm_network("vit_base_patch16_224", embed_dim=96, depth=2, num_heads=3),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TIMM)
def test_timm_networks_load_strictly(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    network = TIMM[name]().to(dtype)
    base = tmp_path / "base.safetensors"
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, base, {"format": "pt"})
    merged = round_trip(
        base, tmp_path, "merged.safetensors", rank="8" if name == "resnet50" else "full"
    )
    TIMM[name]().to(dtype).load_state_dict(load_file(merged), strict=True)


def transformers_config(name: str):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
    wide = {**small, "intermediate_size": 96}
    return {
        "bert": lambda: transformers.BertConfig(**wide, architectures=["BertForMaskedLM"]),
        "gpt2": lambda: transformers.GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=96),
        "llama": lambda: transformers.LlamaConfig(
            **wide, num_key_value_heads=2, tie_word_embeddings=True
        ),
        "mixtral": lambda: transformers.MixtralConfig(
            **wide, num_key_value_heads=2, num_local_experts=4
        ),
        "vit": lambda: transformers.ViTConfig(
            **{k: v for k, v in wide.items() if k != "vocab_size"}, image_size=32, patch_size=8
        ),
    }[name]()


def transformers_class(name: str):
    transformers = pytest.importorskip("transformers")
    return {
        "bert": transformers.BertForMaskedLM,
        "gpt2": transformers.GPT2LMHeadModel,
        "llama": transformers.LlamaForCausalLM,
        "mixtral": transformers.MixtralForCausalLM,
        "vit": transformers.ViTForImageClassification,
    }[name]


@pytest.mark.parametrize("shard_size", ["50KB", "1GB"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "mixtral", "vit"])
def test_transformers_models_load_strictly(
    tmp_path: Path, name: str, dtype: torch.dtype, shard_size: str
) -> None:
    kind, base = transformers_class(name), tmp_path / "base"
    model = kind(transformers_config(name)).to(dtype)
    model.save_pretrained(base, max_shard_size=shard_size)
    assert (base / "model.safetensors.index.json").exists() == (shard_size == "50KB")
    merged = round_trip(base, tmp_path, "merged")
    assert {p.name for p in merged.iterdir()} == {p.name for p in base.iterdir()}
    loaded, report = kind.from_pretrained(merged, output_loading_info=True, dtype=dtype)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for (key, one), two in zip(
        loaded.state_dict().items(), model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, two), key
