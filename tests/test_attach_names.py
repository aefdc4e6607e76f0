"""Names of the file and of the live model: prefixes, packed tensors, values as a last resort."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import svftool
from svftool.attaching import apply_regime, map_names, transformers_names
from svftool.checkpoints import open_checkpoint
from svftool.models import build_model
from tests.attaching import MemoryStore, randomise


class Wrapped(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))  # type: ignore[no-any-return]


def body() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("first", nn.Linear(6, 5))
    model.add_module("second", nn.Linear(5, 4))
    return model


NAMES = ["first.weight", "first.bias", "second.weight", "second.bias"]


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "image_encoder.net."])
def test_prefixes_of_the_file(prefix: str) -> None:
    found = map_names(body(), [prefix + name for name in NAMES])
    assert {name: place.live for name, place in found.placements.items()} == {
        prefix + name: name for name in NAMES
    }
    assert found.file_name("second.bias") == f"{prefix}second.bias"
    assert found.file_name("fc.weight") == f"{prefix}fc.weight"
    assert found.live_names(f"{prefix}fc.weight")[0] == "fc.weight"


@pytest.mark.parametrize("prefix", ["", "module."])
def test_prefixes_of_the_model(prefix: str) -> None:
    found = map_names(Wrapped(body()), [prefix + name for name in NAMES])
    assert found.placements[f"{prefix}first.weight"].live == "backbone.first.weight"
    assert found.file_name("head.weight") == f"{prefix}head.weight"
    assert "head.weight" in found.live_names(f"{prefix}head.weight")


def test_a_tuned_file_of_a_wrapped_model_fits_the_plain_checkpoint() -> None:
    model = Wrapped(body())
    attached = svftool.attach(model, MemoryStore(model.backbone))
    model.head.requires_grad_(True)
    assert set(attached.singular_values()) == {"first.weight", "second.weight"}
    assert set(attached.whole_tensors()) == {"head.weight", "head.bias"}


def test_names_that_say_nothing_are_placed_by_value() -> None:
    store = MemoryStore(
        body(), rename={n: f"encoder.{i}.{n.rpartition('.')[2]}" for i, n in enumerate(NAMES)}
    )
    attached = svftool.attach(body(), store)
    assert {name: place.live for name, place in attached.names.placements.items()} == {
        "encoder.0.weight": "first.weight",
        "encoder.2.weight": "second.weight",
    }


def test_equal_candidates_are_told_apart_by_their_names_or_not_at_all() -> None:
    twins = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    twins["b"].load_state_dict(twins["a"].state_dict())
    near = MemoryStore(twins, rename={"a.weight": "x.a.weight", "b.weight": "y.b.weight"})
    attached = svftool.attach(twins, near)
    assert attached.names.placements["y.b.weight"].live == "b.weight"
    svftool.detach(twins)
    far = MemoryStore(twins, ["a.weight"], rename={"a.weight": "q.weight", "b.weight": "r.weight"})
    with pytest.raises(svftool.FactorsError, match=r"no place in the model \(q\.weight\)"):
        svftool.attach(twins, far)


SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def _language(name: str, **options: Any) -> Callable[[], tuple[nn.Module, dict[str, Tensor]]]:
    def build() -> tuple[nn.Module, dict[str, Tensor]]:
        transformers = pytest.importorskip("transformers")
        config = getattr(transformers, f"{name}Config")(vocab_size=60, **options)
        kind = "SequenceClassification" if name == "Bert" else "CausalLM"
        model = getattr(transformers, f"AutoModelFor{kind}").from_config(config)
        return model, {"input_ids": torch.randint(0, 60, (2, 6))}

    return build


def _vision() -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(image_size=16, patch_size=8, **SMALL)
    model = transformers.AutoModelForImageClassification.from_config(config)
    return model, {"pixel_values": torch.randn(2, 3, 16, 16)}


TRANSFORMERS = {
    "llama": _language("Llama", num_key_value_heads=2, tie_word_embeddings=True, **SMALL),
    "mixtral": _language("Mixtral", num_key_value_heads=2, num_local_experts=3, **SMALL),
    "bert": _language("Bert", **SMALL),
    "gpt2": _language("GPT2", n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
    "vit": _vision,
}


def test_a_part_is_the_same_however_the_live_tensor_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    class PreTrainedModel(nn.Conv2d):
        """Taken for one of transformers, by its name."""

    def revert(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
        weight = state["weight"]
        return {"bias": state["bias"], "view": weight[:1], "copy": weight[1:].clone()}

    monkeypatch.setattr(transformers_names, "_revert", lambda: revert)
    model = PreTrainedModel(2, 4, 3).to(memory_format=torch.channels_last)
    assert not model.weight.is_contiguous()
    found = transformers_names.transformers_regions(model)
    expected = revert(model, model.state_dict())
    for name, (live, region) in found.items():
        assert torch.equal(region.of(model.state_dict()[live]), expected[name])
    assert found.keys() == expected.keys()


@pytest.mark.parametrize("include", [(), ("*.weight",)], ids=["default", "everything"])
@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_transformers_models_go_round(kind: str, include: tuple[str, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    made, inputs = TRANSFORMERS[kind]()
    made.save_pretrained(tmp_path / "base")
    svftool.decompose(tmp_path / "base", tmp_path / "factors", include=include)
    with open_checkpoint(tmp_path / "base") as checkpoint:
        model = build_model("auto", checkpoint=checkpoint)
    with torch.no_grad():
        original = model(**inputs).logits
    attached = svftool.attach(model, tmp_path / "factors")
    torch.testing.assert_close(model(**inputs).logits.detach(), original, rtol=1e-4, atol=1e-6)

    randomise(attached, 0.05)
    model(**inputs).logits.square().sum().backward()
    idle = [name for name, theta in attached.named_parameters() if not theta.grad.any()]
    # A token type that does not occur, and experts that no token was sent to, get no gradient.
    assert all("token_type" in name or "experts" in name for name in idle)
    with torch.no_grad():
        tuned = model(**inputs).logits
    assert (tuned - original).abs().max() > 1e-4

    svftool.save_tuned(model, tmp_path / "x.svf.safetensors")
    svftool.merge(
        tmp_path / "factors", [tmp_path / "x.svf.safetensors"], output=tmp_path / "merged"
    )
    model.save_pretrained(tmp_path / "saved")
    merged, saved = (load_file(tmp_path / n / "model.safetensors") for n in ("merged", "saved"))
    assert merged.keys() == saved.keys()
    assert all(torch.equal(merged[name], saved[name]) for name in merged)

    again, report = type(model).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**inputs).logits, tuned, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["mixtral", "llama"])
def test_what_is_trained_whole_is_written_as_the_file_holds_it(kind: str, tmp_path: Path) -> None:
    # Mixtral's experts are packed on loading; Llama's head is tied, and here the file has it twice.
    torch.manual_seed(0)
    made, inputs = TRANSFORMERS[kind]()
    made.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    if kind == "llama":
        tensors = load_file(file)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, file, metadata={"format": "pt"})
    svftool.decompose(tmp_path / "base", tmp_path / "factors")

    def attached() -> nn.Module:
        with open_checkpoint(tmp_path / "base") as checkpoint:
            model = build_model("auto", checkpoint=checkpoint)
        svftool.attach(model, tmp_path / "factors", exclude=["*experts*"])
        return model

    def logits(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(**inputs).logits

    with open_checkpoint(tmp_path / "base") as checkpoint:
        plain = build_model("auto", checkpoint=checkpoint)
    with svftool.open_factors(tmp_path / "factors") as store:
        assert apply_regime(plain, "full", store).whole_tensors().keys() == load_file(file).keys()
    model = attached()
    original = logits(model)
    svftool.save_tuned(model, tmp_path / "base.svf.safetensors")
    for name, parameter in model.named_parameters():
        if "experts" in name or "embed_tokens" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
            parameter.requires_grad_(True)
    svftool.save_tuned(model, tmp_path / "x.svf.safetensors")
    svftool.merge(
        tmp_path / "factors", [tmp_path / "x.svf.safetensors"], output=tmp_path / "merged"
    )
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == load_file(file).keys()
    again = type(made).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)
    other = attached()
    svftool.load_tuned(other, tmp_path / "x.svf.safetensors")
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-5, atol=1e-6)
    svftool.load_tuned(other, tmp_path / "base.svf.safetensors")
    torch.testing.assert_close(logits(other), original, rtol=1e-5, atol=1e-6)


def test_packed_experts_get_autograds_gradients(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made, inputs = TRANSFORMERS["mixtral"]()
    made.save_pretrained(tmp_path / "base")
    svftool.decompose(tmp_path / "base", tmp_path / "factors")
    with open_checkpoint(tmp_path / "base") as checkpoint:
        model = build_model("auto", checkpoint=checkpoint)
    attached = svftool.attach(model, tmp_path / "factors")
    model(**inputs).logits.square().sum().backward()
    live = "model.layers.1.mlp.experts.gate_up_proj"
    gradients = _dense_gradient(tmp_path, live, inputs)
    half = gradients.shape[1] // 2
    for e in range(3):
        for name, rows in (("w1", slice(0, half)), ("w3", slice(half, None))):
            key = f"model.layers.1.block_sparse_moe.experts.{e}.{name}.weight"
            factors = attached.layers[key].factors()
            inner = factors.U.T @ gradients[e, rows] @ factors.Vh.T
            torch.testing.assert_close(
                attached.layers[key].theta.grad, inner.diagonal() * factors.S, rtol=1e-3, atol=1e-6
            )


def _dense_gradient(folder: Path, live: str, inputs: dict[str, Tensor]) -> Tensor:
    with open_checkpoint(folder / "base") as checkpoint:
        model = build_model("auto", checkpoint=checkpoint)
    model(**inputs).logits.square().sum().backward()
    gradient = model.get_parameter(live).grad
    assert gradient is not None
    return gradient
