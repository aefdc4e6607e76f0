"""LoRA on parameters and on stacks of experts: every change is the one that PEFT's merge makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from svftool import audit, extract
from svftool.auditing import counterparts, open_source
from svftool.errors import CheckpointError
from svftool.progress import SILENT

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = {"vocab_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
STACKS = ["experts.gate_up_proj", "experts.down_proj"]


def mixtral(inner: int = 24, **options: Any) -> nn.Module:
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            hidden_size=16,
            intermediate_size=inner,
            num_key_value_heads=1,
            num_local_experts=4,
            **SMALL,
            **options,
        )
    )


def gpt_oss(inner: int) -> nn.Module:
    return transformers.GptOssForCausalLM(
        transformers.GptOssConfig(
            hidden_size=16,
            intermediate_size=inner,
            head_dim=8,
            num_key_value_heads=1,
            num_local_experts=4,
            **SMALL,
        )
    )


def llama4() -> nn.Module:
    return transformers.Llama4ForCausalLM(
        transformers.Llama4TextConfig(
            hidden_size=16,
            intermediate_size=24,
            intermediate_size_mlp=24,
            head_dim=8,
            num_key_value_heads=1,
            num_local_experts=4,
            interleave_moe_layer_step=1,
            pad_token_id=0,
            **SMALL,
        )
    )


def saved(model: nn.Module, folder: Path, **options: Any) -> tuple[Path, Path, Path]:
    """Save a model, an adapter of it and PEFT's merge of the two, all in float64."""
    torch.manual_seed(0)
    base, adapter, merged = folder / "base", folder / "adapter", folder / "merged"
    model.double().save_pretrained(base)
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": [], **options})
    wrapped = peft.get_peft_model(model, config)
    for name, value in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(value, std=0.3)
    wrapped.save_pretrained(adapter)
    wrapped.merge_and_unload().save_pretrained(merged)
    return base, adapter, merged


CASES = {
    "experts": (mixtral, {"target_parameters": STACKS}),
    "with modules and the router": (
        mixtral,
        {"target_parameters": [*STACKS, "gate.weight"], "target_modules": ["q_proj"]},
    ),
    "one stack": (mixtral, {"target_parameters": ["experts.down_proj"]}),
    "one layer": (mixtral, {"target_parameters": ["layers.1.mlp.experts.down_proj"]}),
    "square": (lambda: mixtral(16), {"target_parameters": ["experts.down_proj"]}),
    "gate and up square": (lambda: mixtral(8), {"target_parameters": STACKS}),
    "patterns": (
        mixtral,
        {
            "target_parameters": STACKS,
            "rank_pattern": {"experts.down_proj": 3},
            "alpha_pattern": {"experts.down_proj": 5, "experts.gate_up_proj": 9},
            "use_rslora": True,
        },
    ),
    "in by out": (lambda: gpt_oss(24), {"target_parameters": STACKS}),
    "in by out and square": (lambda: gpt_oss(16), {"target_parameters": ["experts.down_proj"]}),
    "square beside another": (lambda: gpt_oss(16), {"target_parameters": STACKS}),
    "llama 4": (llama4, {"target_parameters": STACKS}),
    "llama 4, square": (llama4, {"target_parameters": ["experts.down_proj"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_changes_of_parameters_agree_with_pefts_merge(case: str, tmp_path: Path) -> None:
    make, options = CASES[case]
    base, adapter, merged = saved(make(), tmp_path, **options)
    before = load_file(base / "model.safetensors")
    after = load_file(merged / "model.safetensors")
    with open_source(base) as one, open_source(adapter) as other:
        side = counterparts(one, other, SILENT)
        assert side.tuned_only == side.base_only == ()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed
        assert {name for name in before if side.holds(name)} == changed
        for name in changed:
            found = side.read(name, before[name])
            assert found is not None
            assert found.whole_change is not None
            expected = after[name] - before[name]
            torch.testing.assert_close(found.whole_change, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", [mixtral, lambda: gpt_oss(24)])
def test_inspect_finds_the_same_in_an_adapter_and_in_its_merge(make: Any, tmp_path: Path) -> None:
    base, adapter, merged = saved(make(), tmp_path, target_parameters=STACKS)
    (one, two) = audit(base, [adapter, merged]).comparisons
    for a, b in zip(one.rows, two.rows, strict=True):
        assert a.name == b.name
        assert a.verdict is not None
        assert b.verdict is not None
        if a.view is not None and b.verdict.text != "untouched":
            for name in ("weight_drift", "svf_share", "relative_drift", "effective_rank"):
                assert a.measured.change.get(name) == pytest.approx(b.measured.change.get(name))
            assert a.verdict.text == b.verdict.text
    assert any(row.view == "batch" for row in one.rows) == (make is not mixtral)


def test_extract_takes_an_adapter_of_experts(tmp_path: Path) -> None:
    base, adapter, merged = saved(mixtral(), tmp_path, target_parameters=STACKS)
    ours = extract(base, adapter, output=tmp_path / "one.svf.safetensors")
    theirs = extract(base, merged, output=tmp_path / "two.svf.safetensors")
    assert ours.error == pytest.approx(theirs.error, rel=1e-6)
    assert ours.error > 0.1


def test_an_adapter_of_other_experts_is_refused(tmp_path: Path) -> None:
    _, adapter, _ = saved(mixtral(), tmp_path / "a", target_parameters=STACKS)
    base, _, _ = saved(mixtral(20), tmp_path / "b", target_parameters=STACKS)
    with pytest.raises(CheckpointError, match="make no change of its parameters") as error:
        audit(base, [adapter])
    assert "\n" not in str(error.value)


def test_square_experts_need_the_model_type(tmp_path: Path) -> None:
    base, adapter, _ = saved(gpt_oss(16), tmp_path, target_parameters=["experts.down_proj"])
    (base / "config.json").unlink()
    with pytest.raises(CheckpointError, match="which way round"):
        audit(base, [adapter])


class Twins(nn.Module):
    """Two parameters of one shape: which pair is whose is not written in the adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.first = nn.Parameter(torch.randn(6, 8))
        self.inner.second = nn.Parameter(torch.randn(6, 8))
        self.inner.other = nn.Parameter(torch.randn(6, 9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize(
    ("targets", "message"),
    [(["inner.first", "inner.second"], "in 2 ways"), (["inner.second", "inner.other"], "")],
)
def test_plain_parameters(targets: list[str], message: str, tmp_path: Path) -> None:
    model = Twins()
    base = tmp_path / "base.safetensors"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(before, base)
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=targets)
    wrapped = peft.get_peft_model(model, config)
    for name, value in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(value, std=0.3)
    wrapped.save_pretrained(tmp_path / "adapter")
    after = wrapped.merge_and_unload().state_dict()
    with open_source(base) as one, open_source(tmp_path / "adapter") as other:
        if message:
            with pytest.raises(CheckpointError, match=message):
                counterparts(one, other, SILENT)
            return
        side = counterparts(one, other, SILENT)
        for name in targets:
            found = side.read(name, before[name])
            assert found is not None
            assert isinstance(found.change, torch.Tensor)
            assert found.change.abs().max() > 0.1
            torch.testing.assert_close(
                found.change, (after[name] - before[name]).double(), rtol=1e-4, atol=1e-5
            )


def test_wrappers_of_no_target_are_counted(tmp_path: Path) -> None:
    base, adapter, _ = saved(
        mixtral(), tmp_path, target_parameters=STACKS, target_modules=["q_proj"]
    )
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_parameters"] = None
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (found,) = audit(base, [adapter]).comparisons
    reasons = {one.name: one.reason for one in found.unmatched_tuned}
    assert sum("experts" in name for name in reasons) == 6
    assert {"part of no LoRA layer", "not in the base"} == set(reasons.values())
