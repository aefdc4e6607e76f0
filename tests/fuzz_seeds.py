"""Sound inputs of every format, small, and the commands that read them."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import adapter_files
import language
import pictures
import shapes
import torch
import warm
from safetensors.torch import save_file
from torch import nn

Words = tuple[str, ...]
NET = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from fuzz_seeds import Pixels, Plain
from shapes import SmallNet
"""


class Plain(nn.Module):
    """A classifier of three classes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, 2)
        self.norm = nn.BatchNorm2d(8)
        self.mix = nn.Linear(8, 8)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.mix(self.norm(self.conv(x)).relu().mean((2, 3))))


class Pixels(nn.Module):
    """A classifier of pixels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.classifier = nn.Conv2d(8, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.conv(x).relu())


@dataclass(frozen=True)
class Format:
    """A kind of input.

    Attributes
    ----------
    name : str
    build : callable
        Writes a folder of sound inputs.
    damaged : tuple of str
        Patterns of the files to damage.
    commands : tuple of words
        What reads them, started in the folder.
    kept : tuple of str
        What may be left by a command that failed, for --resume.
    """

    name: str
    build: Callable[[Path], None]
    damaged: Words
    commands: tuple[Words, ...]
    kept: Words = ()


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.detach().clone().contiguous() for k, v in tensors.items()}, path, {"format": "pt"}
    )


def _svftool(folder: Path, *words: str, **options: Any) -> None:
    ended = warm.run(words, folder, **options)
    assert ended.code == 0, (words, ended)
    for stream in warm.streams(folder):
        stream.unlink()


def _other(tensors: dict[str, torch.Tensor], size: float = 0.1) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        key: one + size * torch.randn_like(one) if one.is_floating_point() else one
        for key, one in tensors.items()
    }


def _dense(folder: Path) -> None:
    state = Plain().state_dict()
    _save(state, folder / "base.safetensors")
    _save(_other(state), folder / "tuned.safetensors")
    (folder / "net.py").write_text(NET)


def _index(folder: Path) -> None:
    state = Plain().state_dict()
    names = sorted(state)
    weight_map = {}
    for number, some in enumerate((names[:4], names[4:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        _save({name: state[name] for name in some}, folder / "model" / file)
        weight_map |= dict.fromkeys(some, file)
    size = sum(one.numel() * one.element_size() for one in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    _save(_other(state), folder / "tuned.safetensors")


def _pickles(folder: Path) -> None:
    state = Plain().state_dict()
    nested = {
        "state_dict": _other(state),
        "epoch": 3,
        "args": {"lr": 0.1},
        "best": [state["fc.bias"]],
    }
    torch.save(dict(state), folder / "zip.pt")
    torch.save(nested, folder / "nested.pth")
    torch.save(dict(state), folder / "old.pt", _use_new_zipfile_serialization=False)
    _save(_other(state), folder / "tuned.safetensors")


def write_factors(folder: Path) -> None:
    _dense(folder)
    _svftool(folder, "decompose", "base.safetensors", "-o", "factors")
    _svftool(folder, "extract", "base.safetensors", "tuned.safetensors", "-o", "t.svf.safetensors")
    pictures.write_pictures(folder / "data", count=2)


def _trained(folder: Path) -> None:
    write_factors(folder)
    words = ("--data", "data", "--model", "net.py:Plain", "--shots", "1", "--steps", "1")
    _svftool(folder, "finetune", "factors", "-o", "trained.svf.safetensors", *words)


def _spectral(folder: Path) -> None:
    """Write tuned files that hold more than singular values."""
    write_factors(folder)
    for name, form in (("entries", "entries:2"), ("scale", "svf+scale"), ("salt", "salt:1")):
        words = ("extract", "base.safetensors", "tuned.safetensors", "--as", form)
        _svftool(folder, *words, "-o", f"{name}.parts.svf.safetensors")


def _combined(folder: Path) -> None:
    write_factors(folder)
    _save(_other(Plain().state_dict(), 0.2), folder / "second.safetensors")


def _merged(folder: Path) -> None:
    _trained(folder)
    _svftool(folder, "merge", "factors", "trained.svf.safetensors", "-o", "merged.safetensors")


def _configured(folder: Path) -> None:
    _trained(folder)
    (folder / "trained.svf.safetensors").unlink()


def _gguf(folder: Path) -> None:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    fields = text("general.architecture") + struct.pack("<I", 8) + text("llama")
    fields += text("tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("bc")
    one = text("blk.0.q.weight") + struct.pack("<IQQIQ", 2, 64, 3, 2, 0)
    two = text("norm.weight") + struct.pack("<IQIQ", 1, 8, 0, 128)
    head = b"GGUF" + struct.pack("<IQQ", 3, 2, 2) + fields + one + two
    (folder / "model.gguf").write_bytes(head + bytes(-len(head) % 32) + bytes(160))


def _stop_in_decompose() -> None:
    from svftool.factors import ShardAssembly, ShardPlaces

    ShardPlaces.put_out = lambda *_: os._exit(0)  # type: ignore[method-assign]
    ShardAssembly.finish = lambda *_, **__: os._exit(0)  # type: ignore[method-assign]


def _stop_in_finetune() -> None:
    from svftool.training.workspace import Journal

    finish = Journal.finish

    def second(self: Journal, run: Any) -> None:
        if self.holds_work and list(self.folder.glob("records/*")):
            os._exit(0)
        finish(self, run)

    Journal.finish = second  # type: ignore[method-assign]


# Where ranks are fixed, layers go to their place at once; else they are spooled first.
_PLACED = ("decompose", "base.safetensors", "-o", "placed")
_SPOOLED = ("decompose", "base.safetensors", "-o", "spooled", "--rank", "energy:0.9")
_RESUMED = ("finetune", "factors", "-o", "runs", "--regime", "head,svf", "--data", "data")
_RESUMED += ("--model", "net.py:Plain", "--shots", "1", "--steps", "3", "--save-every", "2")


def _resumed(folder: Path) -> None:
    write_factors(folder)
    for words in _PLACED, _SPOOLED:
        _svftool(folder, *words, before=_stop_in_decompose)
    _svftool(folder, *_RESUMED, before=_stop_in_finetune)


def _adapter(folder: Path) -> None:
    _save({"a.q_proj.weight": torch.randn(6, 6), "wte.weight": torch.randn(9, 6)},
          folder / "base.safetensors")  # fmt: skip
    prefix = "base_model.model.a.q_proj.lora_"
    pair = {f"{prefix}A.weight": torch.randn(2, 6), f"{prefix}B.weight": torch.ones(6, 2)}
    _save(pair, folder / "adapter" / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none",
        "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 8}, "use_dora": False,
        "use_rslora": False, "fan_in_fan_out": False, "modules_to_save": None,
        "layers_to_transform": None, "layer_replication": None, "base_model_name_or_path": "base",
    }  # fmt: skip
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))


def _layouts(folder: Path) -> None:
    adapter_files.save(folder / "base.safetensors", adapter_files.base_state())
    made = {
        "kohya": adapter_files.kohya(2), "comfy": adapter_files.comfy(2),
        "diffusers": adapter_files.diffusers(2), "old": adapter_files.diffusers(2, old=True),
    }  # fmt: skip
    for name, state in made.items():
        metadata = {"ss_network_dim": "2", "ss_network_alpha": "2.0"} if name == "kohya" else None
        adapter_files.save(folder / f"{name}.lora.safetensors", state, metadata)


def _delta(folder: Path) -> None:
    _dense(folder)
    words = ("base.safetensors", "tuned.safetensors", "--as", "exact", "-o", "delta.safetensors")
    _svftool(folder, "extract", *words)


def _codes(folder: Path) -> None:
    torch.manual_seed(0)
    weights = {name: torch.randn(16, 8) for name in ("a.weight", "b.weight")}
    _save(weights, folder / "base.safetensors")
    stored: dict[str, torch.Tensor] = {"norm.weight": torch.ones(8)}
    for name, one in weights.items():
        stored[name] = one.to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = torch.rand(2, 2) + 0.5
    _save(stored, folder / "model" / "model.safetensors")
    config = {
        "model_type": "llama",
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 4]},
    }
    (folder / "model" / "config.json").write_text(json.dumps(config))


def _pipeline(folder: Path) -> None:
    (folder / "pipe").mkdir()
    index = {"_class_name": "Tiny", "scheduler": ["diffusers", "DDIM"], "flag": True}
    for name in ("unet", "vae"):
        index[name] = ["diffusers", "Model"]
        state = {"conv.weight": torch.randn(6, 4, 3, 3), "conv.bias": torch.zeros(6)}
        place = folder / "pipe" / name
        _save(state, place / "diffusion_pytorch_model.safetensors")
        (place / "config.json").write_text(json.dumps({"_class_name": name}))
    (folder / "pipe" / "scheduler").mkdir()
    (folder / "pipe" / "scheduler" / "scheduler_config.json").write_text("{}")
    (folder / "pipe" / "model_index.json").write_text(json.dumps(index))


def _timm(folder: Path) -> None:
    import timm

    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    _save(model.state_dict(), folder / "model" / "model.safetensors")
    config = {
        "architecture": "test_vit", "num_classes": 3, "num_features": 64, "global_pool": "token",
        "model_args": {"img_size": 32},
        "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3,
                           "interpolation": "bicubic", "crop_pct": 0.95, "crop_mode": "center",
                           "label_names": ["blue", "green", "red"]},
    }  # fmt: skip
    (folder / "model" / "config.json").write_text(json.dumps(config))
    pictures.write_pictures(folder / "data", count=1)


def _vit(folder: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    names = dict(enumerate(pictures.COLOURS))
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=16, patch_size=8, id2label=names, label2id={v: k for k, v in names.items()},
    )  # fmt: skip
    torch.manual_seed(0)
    ViTForImageClassification(config).save_pretrained(folder / "model")
    processor = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "do_normalize": True,
        "do_rescale": True, "do_center_crop": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "resample": 2, "rescale_factor": 1 / 255, "size": {"height": 16, "width": 16},
        "crop_size": {"height": 16, "width": 16}, "crop_pct": 0.875,
    }  # fmt: skip
    (folder / "model" / "preprocessor_config.json").write_text(json.dumps(processor))
    pictures.write_pictures(folder / "data", count=1)


def _llama(folder: Path) -> None:
    language.write_model(folder / "model")
    rows: list[Any] = [{"text": "the quick brown fox"}, {"prompt": "why? ", "completion": "no."}]
    language.write_texts(folder / "texts.jsonl", rows * 2)


def _pictures(folder: Path) -> None:
    _dense(folder)
    pictures.write_pictures(folder / "data", count=1)
    lines = ["path,label", *(f"data/{name}/00.png,{name}" for name in pictures.COLOURS)]
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    (folder / "classes.txt").write_text("blue\ngreen\nred\n")


def _masks(folder: Path, size: tuple[int, int] = (12, 16)) -> None:
    import numpy as np
    from PIL import Image

    _save(Pixels().state_dict(), folder / "base.safetensors")
    (folder / "net.py").write_text(NET)
    random = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / "data" / name).mkdir(parents=True)
    for index in range(2):
        labels = random.integers(0, 3, size, np.uint8)
        picture = np.repeat(labels[:, :, None] * 80, 3, 2)
        Image.fromarray(picture).save(folder / "data" / "images" / f"{index}.png")
        Image.fromarray(labels).save(folder / "data" / "masks" / f"{index}.png")
    (folder / "classes.txt").write_text("name,red,green,blue\na,0,0,0\nb,1,1,1\nc,2,2,2\n")
    (folder / "names.txt").write_text("a\nb\nc\n")


def _segformer(folder: Path) -> None:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    _masks(folder, (32, 32))
    config = SegformerConfig(
        depths=[1] * 4, hidden_sizes=[4] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8,
        mlp_ratios=[1] * 4, id2label=dict(enumerate("abc")), label2id={"a": 0, "b": 1, "c": 2},
    )  # fmt: skip
    torch.manual_seed(0)
    SegformerForSemanticSegmentation(config).save_pretrained(folder / "model")


def _few_shot(folder: Path) -> None:
    _save(shapes.SmallNet().state_dict(), folder / "base.safetensors")
    (folder / "net.py").write_text(NET)
    (folder / "pairs").mkdir()
    shapes.write_shapes(folder / "pairs")
    for place in folder.glob("pairs/*/[3-7].*"):
        place.unlink()


POLICY = """schema_version = 1
[tensors]
unmatched = "allow"
[[rule]]
layers = ["conv*", "fc*"]
allow = ["full fine-tune"]
reason = "why"
[rule.limits]
weight_drift = 0.5
[[rule]]
layers = "*"
deny = ["spectrum only"]
"""


def _policy(folder: Path) -> None:
    _dense(folder)
    (folder / "policy.toml").write_text(POLICY)


_EVALUATE = ("evaluate", "base.safetensors", "--model", "net.py:Plain")
_PIXELS = ("evaluate", "base.safetensors", "--task", "segmentation", "--model", "net.py:Pixels")
_ONE_STEP = ("--shots", "1", "--steps", "1", "--batch-size", "2")

_COMBINE = ("merge", "base.safetensors", "tuned.safetensors", "second.safetensors")

FORMATS = (
    Format("safetensors", _dense, ("base.safetensors", "tuned.safetensors"), (
        ("inspect", "base.safetensors", "tuned.safetensors", "--json", "--csv", "out.csv"),
        ("inspect", "base.safetensors", "--metrics", "all", "--html", "out.html"),
        ("decompose", "base.safetensors", "-o", "out"),
        ("info", "base.safetensors", "--check", "--all"),
        ("inspect", "base.safetensors", "tuned.safetensors", "--screen"),
        ("lineage", "base.safetensors", "tuned.safetensors", "--json"),
        ("extract", "base.safetensors", "tuned.safetensors", "-o", "out.svf.safetensors"),
    )),
    Format("index", _index, ("model/*.json", "model/*.json", "model/*.safetensors"), (
        ("inspect", "model", "tuned.safetensors"), ("decompose", "model", "-o", "out"),
        ("info", "model", "--check", "--json"),
    )),
    Format("pickle", _pickles, ("*.pt", "*.pth"), (
        ("inspect", "{}", "tuned.safetensors"), ("decompose", "{}", "-o", "out"),
        ("info", "{}"),
        ("extract", "{}", "tuned.safetensors", "-o", "out.svf.safetensors"),
    )),
    Format("factors", write_factors, ("factors/svf_config.json", "factors/*"), (
        ("merge", "factors", "t.svf.safetensors", "-o", "out"), ("inspect", "factors"),
        ("merge", "factors", "--without-base", "-o", "out.safetensors"),
        ("info", "factors", "--check"),
        ("inspect", "factors", "t.svf.safetensors"),
        ("extract", "factors", "tuned.safetensors", "-o", "out.svf.safetensors"),
    )),
    Format("tuned", _trained, ("t.svf.safetensors", "trained.svf.safetensors"), (
        ("merge", "factors", "{}", "-o", "out", "--verify"), ("inspect", "factors", "{}"),
        ("inspect", "{}"),
        ("merge", "factors", "t.svf.safetensors@0.5", "trained.svf.safetensors@0.5", "-o", "out"),
        ("merge", "factors", "t.svf.safetensors@0.5", "trained.svf.safetensors@0.5", "-o",
         "mix.svf.safetensors"),
        ("info", "{}", "--check"),
        ("predict", "factors", "data", "--tuned", "trained.svf.safetensors", "--model",
         "net.py:Plain"),
        ("evaluate", "factors", "--tuned", "{}", "--data", "data", "--model", "net.py:Plain"),
    )),
    Format("resumed", _resumed, (
        "placed.partial/**/*", "spooled.partial/layers/*", "runs.partial.runs/**/*",
    ), (
        (*_PLACED, "--resume"), (*_SPOOLED, "--resume"), (*_RESUMED, "--resume"),
    )),
    Format("adapter", _adapter, ("adapter/*.json", "adapter/*"), (
        ("inspect", "base.safetensors", "adapter"),
        ("inspect", "base.safetensors", "adapter", "--json"),
        ("info", "adapter", "--check"),
    )),
    Format("timm", _timm, ("model/config.json",), (
        ("evaluate", "model", "--data", "data"), ("decompose", "model", "-o", "out"),
    )),
    Format("vit", _vit, ("model/config.json", "model/preprocessor_config.json"), (
        ("predict", "model", "data", "-o", "out.csv"),
        ("evaluate", "model", "--data", "data"),
    )),
    Format("llama", _llama, ("model/config.json", "model/*.json", "texts.jsonl"), (
        ("evaluate", "model", "--task", "language", "--data", "texts.jsonl"),
        ("predict", "model", "texts.jsonl", "-o", "out.jsonl"),
    )),
    Format("segformer", _segformer, ("model/config.json",), (
        ("evaluate", "model", "--task", "segmentation", "--data", "data", "--head", "keep"),
        ("evaluate", "model", "--task", "segmentation", "--data", "data"),
    )),
    Format("images", _pictures, ("data/*/*.png", "data/*/*.png", "list.csv", "classes.txt"), (
        (*_EVALUATE, "--data", "data"), (*_EVALUATE, "--data", "list.csv"),
        ("predict", "base.safetensors", "data", "--model", "net.py:Plain", "-o", "out.csv"),
        (*_EVALUATE, "--data", "data", "--classes", "classes.txt", "--predictions", "out.jsonl"),
    )),
    Format("masks", _masks, ("data/masks/*.png", "data/images/*.png", "*.txt"), (
        (*_PIXELS, "--data", "data"), (*_PIXELS, "--data", "data", "--classes", "classes.txt"),
        (*_PIXELS, "--data", "data", "--classes", "names.txt", "--predictions", "out.jsonl"),
    )),
    Format("few-shot", _few_shot, ("pairs/*/*.png", "pairs/*/*.jpg"), (
        ("evaluate", "base.safetensors", "--task", "few-shot-segmentation", "--data", "pairs",
         "--model", "net.py:SmallNet", "--test-episodes", "2", "--image-size", "49",
         "--width", "8"),
    )),
    Format("policy", _policy, ("policy.toml",), (
        ("inspect", "base.safetensors", "tuned.safetensors", "--policy", "policy.toml"),
    )),
    Format("merged", _merged, ("merged.safetensors",), (
        ("evaluate", "merged.safetensors", "--data", "data", "--model", "net.py:Plain"),
        ("predict", "merged.safetensors", "data", "--model", "net.py:Plain"),
        ("info", "merged.safetensors"),
    )),
    Format("configuration", _configured, ("*.run.toml",), (
        ("finetune", "--config", "{}", "-o", "again"),
    )),
    Format("gguf", _gguf, ("model.gguf",), (
        ("info", "model.gguf"), ("info", "model.gguf", "--check", "--json"),
        ("inspect", "model.gguf"), ("decompose", "model.gguf", "-o", "out"),
    )),
    Format("layouts", _layouts, ("*.lora.safetensors",), (
        ("merge", "base.safetensors", "{}", "-o", "out.safetensors"),
        ("merge", "base.safetensors", "{}@0.5", "comfy.lora.safetensors", "-o", "out.safetensors"),
        ("convert", "{}", "-o", "out.safetensors", "--rank", "1"),
        ("convert", "{}", "-o", "out", "--layout", "peft", "--base", "base.safetensors"),
        ("inspect", "base.safetensors", "{}"), ("info", "{}", "--check"),
    )),
    Format("spectral", _spectral, ("*.parts.svf.safetensors",), (
        ("merge", "factors", "{}", "-o", "out", "--verify"), ("inspect", "factors", "{}"),
        ("inspect", "base.safetensors", "{}", "--fast"),
        ("merge", "factors", "{}@0.5", "t.svf.safetensors", "-o", "out"),
        ("convert", "{}", "--base", "factors", "-o", "out", "--rank", "2"),
        ("info", "{}", "--check"),
    )),
    Format("combined", _combined, (
        "second.safetensors", "tuned.safetensors", "t.svf.safetensors", "base.safetensors",
    ), (
        (*_COMBINE, "-o", "out.safetensors", "--method", "ties:density=0.5"),
        (*_COMBINE, "-o", "out", "--method", "tsv", "--verify", "--html", "page.html"),
        (*_COMBINE, "-o", "out.pth", "--method", "iso-c"),
        ("merge", "factors", "t.svf.safetensors", "tuned.safetensors", "-o", "out", "--method",
         "knots-ties"),
    )),
    Format("delta", _delta, ("delta.safetensors",), (
        ("merge", "base.safetensors", "delta.safetensors", "-o", "out.safetensors"),
        ("merge", "base.safetensors", "delta.safetensors", "-o", "out.pth", "--verify"),
        ("info", "delta.safetensors", "--check"),
    )),
    Format("codes", _codes, ("model/config.json", "model/*"), (
        ("inspect", "base.safetensors", "model"), ("decompose", "model", "-o", "out"),
        ("extract", "base.safetensors", "model", "--as", "lora", "--rank", "2", "-o", "out"),
        ("info", "model", "--check"),
    )),
    Format("pipeline", _pipeline, ("pipe/*.json", "pipe/**/*"), (
        ("inspect", "pipe"), ("decompose", "pipe", "-o", "out"), ("info", "pipe"),
    ), ("out.partial", "out.partial.lock")),
)  # fmt: skip
