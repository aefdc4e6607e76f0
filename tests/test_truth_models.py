"""Settings beside a checkpoint are data: they run no code, reach no network, and fail in a line."""

from __future__ import annotations

import io
import json
import pickle
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from svftool import audit
from svftool.checkpoints import open_checkpoint
from svftool.errors import ModelError, SvftoolError
from svftool.models import build_model, find_preprocessing
from svftool.tasks.tokens import load_tokenizer

transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")


class Planted:
    """Leaves a file where it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.place,))


SMALL = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1} | {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
"""Sizes of a language model that is built in no time."""


def folder(place: Path, config: Any, **files: Any) -> Path:
    place.mkdir(exist_ok=True)
    save_file({"fc.weight": torch.ones(4, 4)}, place / "model.safetensors")
    (place / "config.json").write_text(json.dumps(config))
    for name, value in files.items():
        (place / f"{name}.json").write_text(json.dumps(value))
    return place


def refuse(place: Path, match: str) -> None:
    with open_checkpoint(place) as opened, pytest.raises(ModelError, match=match) as caught:
        build_model("auto", checkpoint=opened)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "unheard_of", "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}},
        {"model_type": "unheard_of", "auto_map": {"AutoConfig": "evil.C"}, "architectures": []},
        {"model_type": "unheard", "auto_map": {"AutoConfig": "evil.C"}, "architectures": ["M"]},
        {"auto_map": {"AutoConfig": "evil.C"}, "architectures": ["AutoModelForCausalLM"]},
        {"architectures": ["M"], "auto_map": {"AutoModel": "evil.M", "AutoConfig": "evil.C"}},
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            **SMALL,
            "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.LlamaForCausalLM"},
        },
    ],
)
def test_code_beside_a_checkpoint_is_neither_run_nor_asked_about(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = folder(tmp_path / "evil", config)
    (place / "evil.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w').close()\n")

    def asked(*_: Any) -> str:
        raise AssertionError("the terminal was asked")

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    refuse(place, r"\S")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["hf-hub:timm/resnet18", "local-dir:/tmp", "hf_hub:a/b", 5, ""])
def test_an_architecture_is_a_plain_name(name: Any, tmp_path: Path) -> None:
    refuse(folder(tmp_path, {"architecture": name}), "plain name of a timm model")


@pytest.mark.parametrize(
    "key", ["checkpoint_path", "cache_dir", "pretrained", "pretrained_cfg_overlay", "kwargs", "x"]
)
def test_timm_gets_no_argument_that_is_not_of_the_network(key: str, tmp_path: Path) -> None:
    planted = tmp_path / "planted.pth"
    planted.write_bytes(pickle.dumps(Planted(tmp_path / "owned")))
    config = {"architecture": "resnet10t", "model_args": {key: str(planted)}}
    refuse(folder(tmp_path, config), f"model_args holds {key}")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("resnet10t", {"in_chans": 1, "global_pool": "max", "drop_rate": 0.1}),
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 1, "class_token": True}),
        ("vgg11", {"drop_rate": 0.1}),
        ("efficientnet_b0", {"drop_path_rate": 0.1}),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 2}),
    ],
)
def test_arguments_of_the_network_are_taken(
    name: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    model = timm.create_model(name, num_classes=3, **arguments)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    config = {"architecture": name, "num_classes": 3, "model_args": arguments}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with open_checkpoint(tmp_path) as opened:
        assert build_model("auto", checkpoint=opened).num_classes == 3


@pytest.mark.parametrize(
    "config",
    [
        {"architecture": "resnet10t", "num_classes": "many"},
        {"architecture": "resnet10t", "num_classes": 10**12},
        {"architecture": "resnet10t", "num_classes": [5]},
        {"architecture": "resnet10t", "num_classes": -1},
        {"architecture": "resnet10t", "model_args": [1]},
        {"architecture": "resnet10t", "model_args": "all"},
        {"architecture": "resnet10t", "pretrained_cfg": "best"},
        {"model_type": 5, "architectures": 5},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": [None]},
        {"architectures": ["Trainer"]},
        {"architectures": ["M"], "auto_map": ["evil.M"]},
        {"architectures": ["M"], "auto_map": {"AutoModel": []}},
        {"model_type": "llama", **SMALL, "hidden_size": "wide"},
    ],
)
def test_config_values_of_other_types_are_one_line(config: Any, tmp_path: Path) -> None:
    refuse(folder(tmp_path, config), r"\S")


@pytest.mark.parametrize(
    "facts",
    [
        {"size": {"height": "tall", "width": 3}},
        {"size": [3]},
        {"size": 100000},
        {"size": 0},
        {"size": -4},
        {"size": True},
        {"size": float("inf")},
        {"size": 1e300},
        {"resample": [3]},
        {"image_mean": [0.5] * 2, "image_std": [0.5] * 2},
        {"image_mean": [float("nan")] * 3, "image_std": [0.5] * 3},
        {"image_mean": [0.5] * 3, "image_std": [0.0] * 3},
        {"image_mean": [0.5] * 3},
        {"image_mean": "grey", "image_std": [1] * 3},
        {"crop_size": 10**9, "do_center_crop": True},
        {"image_processor_type": "ConvNextImageProcessor", "crop_pct": "most", "size": 64},
        {"rescale_factor": float("nan")},
        [1],
        5,
        None,
    ],
)
def test_preprocessor_values_of_other_types_are_one_line(facts: Any, tmp_path: Path) -> None:
    place = folder(tmp_path, {}, preprocessor_config=facts)
    with (
        open_checkpoint(place) as opened,
        pytest.raises(ModelError, match=r"preprocessor_config\.json") as caught,
    ):
        find_preprocessing(opened)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "facts",
    [
        {"mean": [0.5] * 4, "std": [0.5] * 4},
        {"mean": [0.5] * 3},
        {"mean": [0.5] * 3, "std": "wide"},
        {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": 5},
        {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 10**7, 10**7]},
        {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": "most"},
        {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": -1},
        {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "magic"},
    ],
)
def test_values_of_a_timm_configuration_are_one_line(facts: Any, tmp_path: Path) -> None:
    place = folder(tmp_path, {"architecture": "resnet10t", "pretrained_cfg": facts})
    with open_checkpoint(place) as opened, pytest.raises(ModelError, match=r"config\.json"):
        find_preprocessing(opened)


@pytest.mark.parametrize(
    "extra",
    [
        {"attn_implementation": "a/b"},
        {"_attn_implementation": "a/b@main:c"},
        {"attn_implementation": {"text_config": "a/b"}},
        {"text_config": {"experts_implementation": "a/b"}},
    ],
)
def test_kernels_of_the_hub_are_code(extra: dict[str, Any], tmp_path: Path) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SMALL, **extra}
    refuse(folder(tmp_path, config), "takes the kernel 'a/b")


# No value of any settings file reaches the network, runs code, or asks on the terminal.


TIMM = ("hf-hub:a/b", "hf_hub:a/b", "local-dir:{bait}", "{bait}")
TRANSFORMERS = ("{bait}", "a/b", "a/b--evil.C", "evil.C")
"""What values may name: the hub by its spellings, a folder with a planted pickle, code."""

OF_TIMM = ("architecture", "pretrained_cfg", "hf_hub_id")

KEYS = {
    "config.json": (
        "architecture",
        "pretrained_cfg.hf_hub_id",
        "pretrained_cfg.url",
        "pretrained_cfg.file",
        "pretrained_cfg.source",
        "hf_hub_id",
        "_name_or_path",
        "name_or_path",
        "base_model_name_or_path",
        "model_type",
        "tokenizer_class",
        "architectures.0",
        "auto_map.AutoConfig",
        "auto_map.AutoModel",
        "auto_map.AutoModelForCausalLM",
        "auto_map.AutoTokenizer",
        "backbone",
        "transformers_weights",
        "attn_implementation",
        "_attn_implementation",
        "quantization_config.quant_method",
    ),
    "tokenizer_config.json": (
        "tokenizer_class",
        "auto_map.AutoTokenizer",
        "name_or_path",
        "vocab_file",
        "tokenizer_file",
        "fix_mistral_regex",
    ),
    "preprocessor_config.json": (
        "image_processor_type",
        "processor_class",
        "feature_extractor_type",
        "auto_map.AutoImageProcessor",
        "_name_or_path",
    ),
    "processor_config.json": ("processor_class", "auto_map.AutoProcessor"),
    "generation_config.json": ("_from_model_config", "custom_generate"),
    "adapter_config.json": ("base_model_name_or_path", "auto_mapping.parent_library", "revision"),
}


@pytest.fixture
def sealed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note every attempt to reach another machine or the user, and let none through."""
    touched: list[str] = []

    def noted(kind: str) -> Any:
        def refuse(*given: Any, **_: Any) -> Any:
            touched.append(f"{kind}: {given[1:2] or given}")
            raise OSError(f"{kind} is sealed off")

        return refuse

    monkeypatch.setattr(socket.socket, "connect", noted("connect"))
    monkeypatch.setattr(socket, "getaddrinfo", noted("getaddrinfo"))
    monkeypatch.setattr("builtins.input", noted("input"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 99))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return touched


def planted(tmp_path: Path) -> tuple[Path, Path]:
    """Make a folder with code and a pickle that leave a mark where they run."""
    place, mark = tmp_path / "m", tmp_path / "owned"
    place.mkdir()
    bait = tmp_path / "bait"
    bait.mkdir()
    for where in (place, bait):
        (where / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass C: pass\n")
        (where / "pytorch_model.bin").write_bytes(pickle.dumps(Planted(mark)))
    (bait / "config.json").write_text('{"architecture": "resnet10t"}')
    return place, mark


def with_value(facts: dict[str, Any], key: str, value: str) -> dict[str, Any]:
    outer, _, inner = key.partition(".")
    if not inner:
        return {**facts, outer: value}
    held = facts.get(outer, {})
    return {**facts, outer: [value] if inner == "0" else {**held, inner: value}}


def read_everything(place: Path) -> None:
    """Read a folder in every way that takes settings from it."""
    ways = [
        lambda opened: build_model("auto", checkpoint=opened),
        find_preprocessing,
        lambda _: load_tokenizer(place),
    ]
    if (place / "adapter_config.json").exists():
        with suppress(SvftoolError):
            audit(place / "model.safetensors", [place])
        return
    with open_checkpoint(place) as opened:
        for way in ways:
            with suppress(SvftoolError):
                way(opened)


@pytest.mark.parametrize("file", KEYS)
def test_no_value_reaches_the_network_or_runs_code(
    file: str, tmp_path: Path, sealed: list[str]
) -> None:
    place, mark = planted(tmp_path)
    language = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SMALL}
    vision = {"architecture": "test_vit", "pretrained_cfg": {"input_size": [3, 32, 32]}}
    own = {
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
        "preprocessor_config.json": {"image_processor_type": "ViTImageProcessor"},
        "adapter_config.json": {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]},
    }
    save_file({"fc.weight": torch.ones(4, 4)}, place / "model.safetensors")
    if file == "adapter_config.json":
        save_file({"a": torch.ones(2, 2)}, place / "adapter_model.safetensors")
    for key in KEYS[file]:
        config, values = (vision, TIMM) if key.startswith(OF_TIMM) else (language, TRANSFORMERS)
        facts = {
            "config.json": config,
            **({} if file == "config.json" else {file: own.get(file, {})}),
        }
        for text in values:
            value = text.format(bait=tmp_path / "bait")
            for name, held in facts.items():
                changed = with_value(held, key, value) if name == file else held
                (place / name).write_text(json.dumps(changed))
            read_everything(place)
            assert not sealed, (key, value, sealed)
            assert not mark.exists(), (key, value)


def test_the_seal_notices(sealed: list[str]) -> None:
    from huggingface_hub import HfApi

    with suppress(Exception):
        HfApi().model_info("a/b")
    assert sealed
    with suppress(OSError):
        input("y?")
    assert any("input" in one for one in sealed)
