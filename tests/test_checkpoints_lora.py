"""PEFT folders written by PEFT itself: every change of weight agrees with PEFT's own merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from svftool.adapters.peft import is_lora, open_lora
from svftool.errors import CheckpointError

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.square = nn.Linear(8, 8)
        self.wide = nn.Linear(8, 20)
        self.conv = nn.Conv2d(3, 6, 3)
        self.point = nn.Conv2d(6, 4, 1)
        self.conv1 = nn.Conv1d(4, 6, 3)
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)
        self.head = nn.Linear(20, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def adapter(folder: Path, **options: Any) -> tuple[Small, Path, nn.Module]:
    """Write an adapter with non-zero matrices; return base, folder, and PEFT's merged model."""
    torch.manual_seed(0)
    base = Small()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **options})
    model = peft.get_peft_model(base, config)
    for name, value in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            nn.init.normal_(value, std=0.3)
        elif "magnitude" in name:
            value.data *= 1.2
        elif "modules_to_save" in name:
            value.data += 1.0
    model.save_pretrained(folder)
    merged = model.merge_and_unload()
    plain = Small()
    plain.load_state_dict(before)
    return plain, folder, merged


CASES = {
    "linear": {"target_modules": ["square", "wide"]},
    "rslora": {"target_modules": ["wide"], "use_rslora": True},
    "patterns": {
        "target_modules": ["square", "wide", "head"],
        "rank_pattern": {"wide": 2},
        "alpha_pattern": {"wide": 9, "head": 1},
    },
    "conv": {"target_modules": ["conv", "point", "conv1"]},
    "embedding": {"target_modules": ["embed"]},
    "dora": {"target_modules": ["square", "wide"], "use_dora": True},
    "bias": {"target_modules": ["wide"], "lora_bias": True},
}


@pytest.mark.parametrize("case", CASES)
def test_changes_agree_with_pefts_merge(case: str, tmp_path: Path) -> None:
    base, folder, merged = adapter(tmp_path, **CASES[case])
    weights, expected = base.state_dict(), merged.state_dict()
    assert is_lora(folder)
    with open_lora(folder) as lora:
        changed = {*lora.layers, *lora.biases}
        assert changed == {k for k in weights if not torch.equal(weights[k], expected[k])}
        assert lora.unused == ()
        for name in changed:
            found = weights[name].double() + lora.change(name, weights[name])
            torch.testing.assert_close(found, expected[name].double(), rtol=1e-5, atol=1e-5)


def test_saved_modules_and_trained_biases_are_whole_tensors(tmp_path: Path) -> None:
    base, folder, merged = adapter(
        tmp_path, target_modules=["wide"], modules_to_save=["head"], bias="all"
    )
    with open_lora(folder) as lora:
        assert {"head.weight", "head.bias", "wide.bias"} <= set(lora.whole)
        found = lora.read(lora.whole["head.weight"])
    assert torch.equal(found, merged.state_dict()["head.weight"])
    assert not torch.equal(found, base.state_dict()["head.weight"])


def test_transposed_layers_of_gpt2(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=20, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["c_attn", "c_proj"]))
    for name, value in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(value, std=0.3)
    wrapped.save_pretrained(tmp_path)
    after = wrapped.merge_and_unload().state_dict()
    with open_lora(tmp_path) as lora:
        assert any("attn.c_proj" in name for name in lora.layers)  # square: the flag decides
        for name in lora.layers:
            found = before[name].double() + lora.change(name, before[name])
            torch.testing.assert_close(found, after[name].double(), rtol=1e-5, atol=1e-5)


def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    _, folder, _ = adapter(tmp_path, target_modules=["wide"])
    with open_lora(folder) as lora, pytest.raises(CheckpointError, match="another base"):
        lora.change("wide.weight", torch.zeros(20, 9))


def test_an_adapter_of_a_grouped_convolution_is_no_change_of_weight(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(Small(), peft.LoraConfig(r=4, target_modules=["grouped"]))
    model.save_pretrained(tmp_path)
    with open_lora(tmp_path) as lora, pytest.raises(CheckpointError, match="grouped convolution"):
        lora.change("grouped.weight", torch.zeros(8, 2, 3, 3))


@pytest.mark.parametrize(
    ("config", "message"),
    [("{", "expected PEFT's configuration"), ("[]", "expected an object"),
     ('{"peft_type": "LOHA"}', "expected 'LORA'")],
)  # fmt: skip
def test_other_adapters_and_broken_folders(tmp_path: Path, config: str, message: str) -> None:
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(CheckpointError, match=message):
        open_lora(tmp_path)


def test_half_a_pair_is_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    save_file(
        {"base_model.model.wide.lora_A.weight": torch.zeros(2, 8)},
        tmp_path / "adapter_model.safetensors",
    )
    with pytest.raises(
        CheckpointError, match=r"module 'wide' has lora_A, expected lora_A and lora_B"
    ):
        open_lora(tmp_path)


def test_an_initialisation_that_moves_the_base_is_said(tmp_path: Path) -> None:
    _, folder, _ = adapter(tmp_path, target_modules=["wide"], init_lora_weights="pissa")
    with open_lora(folder) as lora:
        assert any("also changes the base" in note for note in lora.notes)
