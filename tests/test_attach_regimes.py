"""Regimes: which parameters each sets free, and nothing else."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from svftool.attaching import apply_regime, parse_regime
from svftool.attaching.peft_warnings import peft_warnings
from svftool.choices.regimes import check_sizes
from svftool.errors import MissingDependencyError, ModelError, UsageError
from tests.attaching import MemoryStore


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("conv", nn.Conv2d(3, 6, 3))
    model.add_module("norm", nn.BatchNorm2d(6))
    model.add_module("depthwise", nn.Conv2d(6, 12, 3, groups=6))
    model.add_module("flat", nn.Flatten())
    model.add_module("fc", nn.Linear(48, 5))
    return model.eval()


SETS = {
    "head": {"head": ["fc.weight", "fc.bias"]},
    "svf": {
        "head": ["fc.weight", "fc.bias"],
        "singular_values": ["conv.svf_weight", "depthwise.svf_weight"],
    },
    "bias": {
        "head": ["fc.weight", "fc.bias"],
        "bias": ["conv.bias", "norm.bias", "depthwise.bias"],
    },
    "norm": {"head": ["fc.weight", "fc.bias"], "norm": ["norm.weight", "norm.bias"]},
    "svf+bias": {
        "head": ["fc.weight", "fc.bias"],
        "singular_values": ["conv.svf_weight", "depthwise.svf_weight"],
        "bias": ["conv.bias", "norm.bias", "depthwise.bias"],
    },
    "svf+norm": {
        "head": ["fc.weight", "fc.bias"],
        "singular_values": ["conv.svf_weight", "depthwise.svf_weight"],
        "norm": ["norm.weight", "norm.bias"],
    },
    "full": {
        "head": ["fc.weight", "fc.bias"],
        "backbone": [
            "conv.weight", "conv.bias", "norm.weight", "norm.bias", "depthwise.weight",
            "depthwise.bias",
        ],
    },
    "lora:2": {
        "head": ["fc.modules_to_save.default.weight", "fc.modules_to_save.default.bias"],
        "lora": ["conv.lora_A.default.weight", "conv.lora_B.default.weight"],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_a_regime_trains_its_set_and_nothing_else(name: str) -> None:
    model = network()
    store = MemoryStore(model, ["conv.weight", "depthwise.weight", "fc.weight"])
    trainable = apply_regime(model, name, store, head="fc")
    names = {p: n.removeprefix("base_model.model.") for n, p in trainable.model.named_parameters()}
    found = {
        group: sorted(names[p].removesuffix(".parts.0.theta") for p in parameters)
        for group, parameters in trainable.groups.items()
    }
    assert found == {group: sorted(members) for group, members in SETS[name].items()}
    free = {p for p in trainable.model.parameters() if p.requires_grad}
    assert free == {p for parameters in trainable.groups.values() for p in parameters}
    assert trainable.trainable_parameters == sum(p.numel() for p in free)

    trainable.model(torch.randn(2, 3, 6, 6)).square().sum().backward()
    assert all(p.grad is not None for p in free)
    frozen = [p for p in trainable.model.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in frozen)


def test_before_training_every_regime_computes_the_base() -> None:
    x = torch.randn(2, 3, 6, 6)
    expected = network()(x)
    for name in SETS:
        model = network()
        trainable = apply_regime(model, name, MemoryStore(model), head="fc")
        torch.testing.assert_close(trainable.model(x), expected, rtol=1e-5, atol=1e-5)


def test_what_is_saved_follows_the_regime() -> None:
    for name, expected in (
        ("head", {"fc.weight", "fc.bias"}),
        ("svf+norm", {"fc.weight", "fc.bias", "norm.weight", "norm.bias"}),
        ("lora:2", set()),
    ):
        model = network()
        trainable = apply_regime(model, name, MemoryStore(model), head="fc")
        assert set(trainable.whole_tensors()) == expected
        wanted = {"conv.weight", "depthwise.weight"} if "svf" in name else set()
        assert set(trainable.singular_values()) == wanted


def test_without_a_head_the_last_layer_gets_singular_values() -> None:
    model = network()
    trainable = apply_regime(model, "svf", MemoryStore(model))
    assert set(trainable.groups) == {"singular_values"}
    assert "fc.weight" in trainable.singular_values()
    with pytest.raises(ModelError, match=r"'head' trains nothing: no head is named.*--head-name"):
        apply_regime(network(), "head", MemoryStore(network()))
    plain = nn.Sequential(nn.Linear(3, 2, bias=False))
    with pytest.raises(ModelError, match=r"no bias parameters and no norm par.*no head is named"):
        apply_regime(plain, "norm+bias", MemoryStore(plain))


def test_globs_limit_svf_and_lora() -> None:
    for name in ("svf", "lora:2"):
        model = network()
        store = MemoryStore(model)
        with pytest.raises(ModelError, match="none of 3 decomposed layers"):
            apply_regime(model, name, store, head="fc", include=["fc.*"])
    model = network()
    with pytest.raises(ModelError, match="LoRA adapts none"):
        apply_regime(model, "lora:2", MemoryStore(model), head="fc", exclude=["conv.*"])


def test_what_peft_refuses_is_one_line() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(
        vocab_size=9, hidden_size=8, state_size=2, num_hidden_layers=1
    )
    model = transformers.MambaForCausalLM(config)
    store = MemoryStore(model, ["backbone.layers.0.mixer.out_proj.weight"])
    with pytest.raises(
        ModelError, match=r"LoRA: PEFT refuses a layer \(.*Mamba.*--exclude"
    ) as caught:
        apply_regime(model, "lora:1", store)
    assert "\n" not in str(caught.value)


def test_what_peft_warns_of_is_said_in_plain_words(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=1, eos_token_id=1
    )
    for include, message in (["*attn*"], ""), ([], "'svftool merge' takes no such adapter"):
        model = transformers.GPT2LMHeadModel(config)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trainable = apply_regime(model, "lora:1", MemoryStore(model), include=include)
        assert message in trainable.said
        assert bool(message) == bool(trainable.said)
    with peft_warnings() as said:
        warnings.warn("Ephemeral  GPU\noffloading", stacklevel=1)
        warnings.warn("fan_in_fan_out is set to False but", stacklevel=1)
    assert said == ["PEFT: 'Ephemeral GPU offloading'"]


def test_a_rank_that_no_layer_has_is_refused() -> None:
    matrices = [(1, 64, 32, 32), (1, 8, 8, 8)]
    check_sizes(parse_regime("lora:32"), matrices)  # the smaller layer takes more than it needs
    for name in ("lora:33", "lora:5000", "lora:9000x"):
        with pytest.raises(UsageError, match=r"the largest, 64 x 32, has 32, expected no more"):
            check_sizes(parse_regime(name), matrices)
    model = network()
    with pytest.raises(UsageError, match="regime lora:49: rank 49, more than any layer has"):
        apply_regime(model, "lora:49", MemoryStore(model))


def test_options_reach_attach() -> None:
    model = network()
    trainable = apply_regime(
        model, "svf", MemoryStore(model), parametrisation="shift", train_rank=2
    )
    assert {p.shape for p in trainable.groups["singular_values"]} == {(2,)}


def test_layers_without_the_singular_values_of_a_band_stay_as_they_are() -> None:
    model, x = network(), torch.randn(2, 3, 6, 6)
    store = MemoryStore(model)
    ranks = sorted({one.rank for one in store.layers.values()})
    expected = model(x)
    trainable = apply_regime(model, "svf", store, train_rank=f"{ranks[-2]}-{ranks[-1]}")
    having = [one for one in store.layers.values() if one.rank > ranks[-2]]
    assert trainable.trainable_parameters == len(having) * (ranks[-1] - ranks[-2])
    without = len(store.layers) - len(having)
    assert f"{without} of {len(store.layers)} layers" in trainable.said
    torch.testing.assert_close(trainable.model(x), expected, rtol=1e-4, atol=1e-5)
    trainable.model(x).sum().backward()
    assert all(p.grad is not None for p in trainable.groups["singular_values"])
    layers = trainable.attachment.layers
    assert all(torch.equal(values, layers[name].S_base)
               for name, values in trainable.singular_values().items())  # fmt: skip


def test_adapters_are_saved_as_a_peft_folder(tmp_path: Path) -> None:
    model = network()
    trainable = apply_regime(model, "lora:2", MemoryStore(model), head="fc")
    trainable.model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    model = network()
    with pytest.raises(MissingDependencyError, match=r"pip install .*\[train\]"):
        apply_regime(model, "lora:2", MemoryStore(model), head="fc")


@pytest.mark.parametrize(
    "name", ["", "everything", "lora", "lora:0", "lora:x", "svf+svf", "svf+full"]
)
def test_regimes_that_do_not_exist(name: str) -> None:
    with pytest.raises(UsageError, match="expected one of head, svf"):
        parse_regime(name)
