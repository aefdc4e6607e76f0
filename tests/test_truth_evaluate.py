"""A dense folder is measured wherever its factors are: one map of names for both."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from svftool.checkpoints import open_checkpoint
from svftool.errors import ModelError
from svftool.models import build_model, is_read_whole
from svftool.stages.catalogue import head_classes
from svftool.stages.loading import _load_rest, _renamed
from svftool.tasks.base import Prepared

transformers = pytest.importorskip("transformers")

State = dict[str, Tensor]
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
}
VISION = {**SMALL, "image_size": 16, "patch_size": 8, "num_labels": 3}
TASK: Any = SimpleNamespace(classes=None)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def gpt2() -> nn.Module:
    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


def llama(**options: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **options))


def neox() -> nn.Module:
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SMALL))


def mixtral() -> nn.Module:
    sizes = {**SMALL, "num_local_experts": 2, "num_key_value_heads": 2}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))


def bert() -> nn.Module:
    return transformers.BertLMHeadModel(transformers.BertConfig(**SMALL, is_decoder=True))


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VISION))


def without(prefix: str) -> Callable[[State], State]:
    return lambda state: {name.removeprefix(prefix): value for name, value in state.items()}


def beside(**values: Tensor) -> Callable[[State], State]:
    return lambda state: {**state, **{n.replace("__", "."): v for n, v in values.items()}}


def gamma_and_beta(state: State) -> State:
    names = {".LayerNorm.weight": ".LayerNorm.gamma", ".LayerNorm.bias": ".LayerNorm.beta"}
    for old, new in names.items():
        state = {name.replace(old, new): value for name, value in state.items()}
    return state


def masks_of_gpt2(state: State) -> State:
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32).tril() for i in range(2)}
    return {**without("transformer.")(state), **masks}


def stored_twice(state: State) -> State:
    return {**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}


WAYS: dict[str, tuple[Callable[[], nn.Module], Callable[[State], State]]] = {
    "no prefix": (gpt2, without("transformer.")),
    "stored masks": (gpt2, masks_of_gpt2),
    "tied": (lambda: llama(tie_word_embeddings=True), dict),
    "tied and stored": (lambda: llama(tie_word_embeddings=True), stored_twice),
    "stored frequencies": (
        llama,
        beside(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4)),
    ),
    "masks and frequencies": (
        neox,
        beside(
            gpt_neox__layers__0__attention__bias=torch.ones(1, 1, 8, 8),
            gpt_neox__layers__0__attention__masked_bias=torch.tensor(-1e9),
            gpt_neox__layers__0__attention__rotary_emb__inv_freq=torch.ones(4),
        ),
    ),
    "packed experts": (mixtral, dict),
    "gamma and beta": (bert, gamma_and_beta),
    "stored positions": (bert, beside(bert__embeddings__position_ids=torch.arange(512)[None])),
    "renamed layers": (vit, dict),
    "renamed, no prefix": (vit, without("vit.")),
}


def folder_of(place: Path, model: nn.Module, change: Callable[[State], State]) -> Path:
    model.save_pretrained(place)  # type: ignore[operator]
    file = place / "model.safetensors"
    state = {name: value.clone().contiguous() for name, value in change(load_file(file)).items()}
    save_file(state, file, {"format": "pt"})
    return place


@pytest.mark.parametrize("way", WAYS)
def test_a_dense_folder_is_measured_as_its_factors_are(way: str, tmp_path: Path) -> None:
    make, change = WAYS[way]
    with open_checkpoint(folder_of(tmp_path, make(), change)) as checkpoint:
        of_factors = build_model("auto", checkpoint=checkpoint)
        dense = build_model("auto", checkpoint=checkpoint, strict=False)
        whole = is_read_whole("auto", checkpoint)
        names = _load_rest(Prepared(dense), TASK, checkpoint, set(dense.state_dict()), whole=whole)
    assert names == []
    expected = of_factors.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in dense.state_dict().items())


@pytest.mark.parametrize("way", ["no prefix", "stored masks", "renamed layers"])
def test_names_that_a_factory_knows_otherwise_are_found(way: str, tmp_path: Path) -> None:
    """A model of one's own that holds transformers' is not read by transformers."""
    make, change = WAYS[way]
    model = make()
    with open_checkpoint(folder_of(tmp_path, model, change)) as checkpoint:
        known = set(model.state_dict())
        own = {name for name in checkpoint.infos if name not in known}
        assert own
        assert _renamed(model, checkpoint, known) == own


def test_a_tensor_without_place_is_still_refused(tmp_path: Path) -> None:
    other = beside(model__layers__0__extra__weight=torch.ones(4, 4))
    with open_checkpoint(folder_of(tmp_path, llama(), other)) as checkpoint:
        assert _renamed(llama(), checkpoint, set(llama().state_dict())) == set()
        with pytest.raises(ModelError, match=r"1 unexpected: model\.layers\.0\.extra\.weight"):
            build_model("auto", checkpoint=checkpoint, strict=False)
    net = nn.Sequential(nn.Linear(3, 2))
    save_file({**net.state_dict(), "1.weight": torch.ones(2, 2)}, tmp_path / "n.safetensors")
    with open_checkpoint(tmp_path / "n.safetensors") as checkpoint:
        assert not is_read_whole("net.py:net", checkpoint)
        with pytest.raises(ModelError, match=r"1 tensor has no place in the model: 1\.weight"):
            _load_rest(Prepared(net), TASK, checkpoint, set(net.state_dict()))


def test_a_timm_folder_is_not_read_whole(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet10t"}))
    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        assert not is_read_whole("auto", checkpoint)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({}, None),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, None),
        ({"id2label": {"1": "b", "0": "a"}}, ("a", "b")),
        ({"id2label": {str(i): f"c{i}" for i in range(12)}}, tuple(f"c{i}" for i in range(12))),
        ({"id2label": {"1": "a", "2": "b"}}, None),
        ({"id2label": ["a", "b"]}, None),
        ({"label_names": ["a", "b"]}, ("a", "b")),
        ({"label_names": ["n1", "n2"], "label_descriptions": {"n1": "cat"}}, ("n1, cat", "n2")),
    ],
)
def test_a_config_names_the_heads_classes(config: Any, names: Any) -> None:
    assert head_classes(config) == names
