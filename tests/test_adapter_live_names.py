"""Adapters of models whose modules transformers renames as it loads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from svftool.adapters.live_names import live_names
from svftool.checkpoints import open_checkpoint
from svftool.cli import app
from svftool.stages.convert import convert
from svftool.stages.decompose import decompose
from svftool.stages.merge import merge

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers.core_model_loading")

pytestmark = pytest.mark.filterwarnings("ignore")

KINDS = {
    "ViT": {
        "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
        "intermediate_size": 12, "patch_size": 4,
    },
    "Swin": {
        "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "image_size": 16, "patch_size": 2,
        "window_size": 2,
    },
}  # fmt: skip


def model(kind: str) -> Any:
    config = getattr(transformers, f"{kind}Config")(**KINDS[kind], num_labels=3)
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForImageClassification")(config)


def load(kind: str, path: Path) -> Any:
    return getattr(transformers, f"{kind}ForImageClassification").from_pretrained(path).eval()


def queries(state: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in state if name.endswith(("query.weight", "q_proj.weight"))]


def check(found: Path, expected: Path) -> None:
    one, other = (load_file(path / "model.safetensors") for path in (found, expected))
    assert one.keys() == other.keys()
    for name, value in other.items():
        torch.testing.assert_close(one[name], value, rtol=1e-5, atol=1e-6)


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    name = str(request.param)
    model(name).save_pretrained(tmp_path / "base")
    return name


def test_an_adapter_of_peft_is_merged_by_the_names_of_the_live_model(
    tmp_path: Path, kind: str
) -> None:
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj"],
        modules_to_save=["layernorm_after"],
        init_lora_weights=False,
    )
    live = peft.get_peft_model(load(kind, tmp_path / "base"), config)
    live.save_pretrained(tmp_path / "adapter")
    live.merge_and_unload().save_pretrained(tmp_path / "expected")
    merge(tmp_path / "base", [tmp_path / "adapter"], output=tmp_path / "out")
    check(tmp_path / "out", tmp_path / "expected")
    words = ["inspect", str(tmp_path / "base"), str(tmp_path / "adapter"), "--json"]
    (found,) = json.loads(CliRunner().invoke(app, words).stdout)["comparisons"]
    assert found["summary"]["tensors"]["unmatched_tuned"] == 0
    assert sum(found["summary"]["verdicts"].values()) > found["summary"]["verdicts"]["untouched"]


def test_peft_finds_the_modules_of_what_is_written(tmp_path: Path, kind: str) -> None:
    state = load_file(tmp_path / "base" / "model.safetensors")
    names = queries(state)
    assert names
    for name in names:
        state[name] = state[name] + torch.randn(state[name].shape) * 0.3
        bias = name.replace("weight", "bias")
        state[bias] = state[bias] + 0.1
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    (tuned / "config.json").write_bytes((tmp_path / "base" / "config.json").read_bytes())
    save_file(state, tuned / "model.safetensors", {"format": "pt"})
    words = ["extract", str(tmp_path / "base"), str(tuned), "--as", "lora", "-o"]
    found = CliRunner().invoke(app, [*words, str(tmp_path / "x"), "--rank", "16"])
    assert found.exit_code == 0, found.stderr
    assert "named as the live model of transformers" in found.stderr
    adapted = peft.PeftModel.from_pretrained(load(kind, tmp_path / "base"), tmp_path / "x").eval()
    size = KINDS[kind]["image_size"]
    pixels = torch.randn(2, 3, size, size)
    expected = load(kind, tuned)(pixels).logits
    torch.testing.assert_close(adapted(pixels).logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(load(kind, tmp_path / "base")(pixels).logits, expected, atol=1e-5)
    merge(tmp_path / "base", [tmp_path / "x"], output=tmp_path / "again")
    check(tmp_path / "again", tuned)


def test_a_tuned_file_is_converted_to_the_names_of_the_live_model(
    tmp_path: Path, kind: str
) -> None:
    from svftool.factors import open_factors, write_tuned

    decompose(tmp_path / "base", output=tmp_path / "f")
    with open_factors(tmp_path / "f") as store:
        S = {name: store.read_S(name) * 1.1 for name in store.layers}
        write_tuned(tmp_path / "t.svf.safetensors", store=store, S=S)
    convert(tmp_path / "t.svf.safetensors", output=tmp_path / "x", base=tmp_path / "f")
    state = load_file(tmp_path / "x" / "adapter_model.safetensors")
    assert any(".attention.q_proj." in name for name in state)
    assert not any(".query." in name for name in state)


@pytest.mark.parametrize(
    "facts",
    [
        {"architectures": None},
        {"architectures": ["Nothing"]},
        {"architectures": ["logging"]},
        {"model_type": None, "architectures": ["LlamaForCausalLM"]},
        {"num_hidden_layers": 10**9, "depths": [10**9]},
        {"hidden_size": "x", "embed_dim": "x"},
    ],
)
def test_of_a_model_that_is_not_known_the_files_names_are_kept(
    tmp_path: Path, facts: dict[str, Any]
) -> None:
    model("ViT").save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    with open_checkpoint(tmp_path / "base") as file:
        assert live_names(file.infos, config).names
        assert not live_names(file.infos, {**config, **facts}).names
        assert not live_names(file.infos, None).names
