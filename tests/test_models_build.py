"""Model specs, strict loading, heads and preprocessing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from svftool.checkpoints import TensorInfo, open_checkpoint
from svftool.errors import MissingDependencyError, ModelError
from svftool.models import (
    DEFAULT_PREPROCESSING,
    Preprocessing,
    build,
    build_model,
    find_head,
    find_preprocessing,
    load_weights,
    propose,
)
from svftool.models.propose import proposals

FACTORY = """
from dataclasses import dataclass
from torch import nn
import neighbour

@dataclass
class Sizes:
    inputs: int = 4

def net():
    return nn.Sequential(nn.Linear(Sizes().inputs, neighbour.OUTPUTS))

def broken():
    raise ValueError("no such thing")

def number():
    return 3
"""


def save(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file({name: value.clone().contiguous() for name, value in tensors.items()}, path)
    return path


@pytest.fixture
def factory(tmp_path: Path) -> Path:
    (tmp_path / "nets.py").write_text(FACTORY)
    (tmp_path / "neighbour.py").write_text("OUTPUTS = 3")
    return tmp_path / "nets.py"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return save(
        tmp_path / "w.safetensors", {"0.weight": torch.ones(3, 4), "0.bias": torch.zeros(3)}
    )


def test_a_factory_in_a_file(factory: Path, weights: Path) -> None:
    with open_checkpoint(weights) as checkpoint:
        model = build_model(f"{factory}:net", checkpoint=checkpoint)
    assert torch.equal(model[0].weight, torch.ones(3, 4))
    assert not model.training


def test_a_factory_in_a_module(tmp_path: Path) -> None:
    path = save(tmp_path / "w.safetensors", nn.Identity().state_dict() | {})
    with open_checkpoint(path) as checkpoint:
        assert isinstance(build_model("torch.nn:Identity", checkpoint=checkpoint), nn.Identity)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet", "model 'resnet', expected 'auto', 'timm:NAME'"),
        ("timm:", "model 'timm:', expected"),
        ("timm:no_such_net", "timm has no model 'no_such_net'"),
        ("torchvision:no_such_net", "torchvision has no model 'no_such_net'"),
        ("no_such_module:net", "module 'no_such_module' failed to import"),
        ("missing.py:net", r"missing\.py: no such file"),
        ("{file}:other", "no factory 'other', it has Sizes, broken"),
        ("{file}:broken", r"broken failed \(ValueError: no such thing\)"),
        ("{file}:number", "number returned int, expected an nn.Module"),
        ("auto", r"no config\.json that names a model"),
    ],
)
def test_specs_that_name_no_model(spec: str, message: str, factory: Path, weights: Path) -> None:
    with (
        open_checkpoint(weights) as checkpoint,
        pytest.raises(ModelError, match=message.replace("nn.M", r"nn\.M")),
    ):
        build_model(spec.format(file=factory), checkpoint=checkpoint)


@pytest.mark.parametrize(
    ("spec", "package"), [("timm:resnet18", "timm"), ("torchvision:alexnet", "torchvision")]
)
def test_missing_libraries_name_the_extra(
    spec: str, package: str, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with (
        open_checkpoint(weights) as checkpoint,
        pytest.raises(MissingDependencyError, match=r"\[vision\]"),
    ):
        build_model(spec, checkpoint=checkpoint)


def test_every_difference_is_counted(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    path = save(
        tmp_path / "w.safetensors",
        {"0.weight": torch.ones(3, 4), "1.weight": torch.ones(5, 3), "2.weight": torch.ones(1)},
    )
    with open_checkpoint(path) as checkpoint, pytest.raises(ModelError) as caught:
        load_weights(model, checkpoint)
    text = str(caught.value)
    assert "2 missing: 0.bias, 1.bias" in text
    assert "1 unexpected: 2.weight" in text
    assert "1 of another shape: 1.weight (5, 3) (the model has (2, 3))" in text
    assert not torch.equal(model[0].weight, torch.ones(3, 4))


def test_wrapper_prefix_ties_and_batch_counters(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    state = {
        f"module.{name}": torch.full_like(value, 2)
        for name, value in model.state_dict().items()
        if name != "2.weight" and "num_batches" not in name
    }
    with open_checkpoint(save(tmp_path / "w.safetensors", state)) as checkpoint:
        load_weights(model, checkpoint)
    assert model[2].weight is model[0].weight
    assert torch.equal(model[2].weight, torch.full((3, 3), 2.0))


def test_half_precision_checkpoints_are_loaded_in_float32_unless_told(tmp_path: Path) -> None:
    state = {name: value.half() for name, value in nn.Linear(3, 2).state_dict().items()}
    with open_checkpoint(save(tmp_path / "w.safetensors", state)) as checkpoint:
        assert load_weights(nn.Linear(3, 2), checkpoint).weight.dtype == torch.float32
        kept = load_weights(nn.Linear(3, 2), checkpoint, dtype=None)
    assert kept.weight.dtype == torch.float16
    assert torch.equal(kept.weight, state["weight"])


@pytest.mark.parametrize("classes", [1000, 7])
@pytest.mark.parametrize("spec", ["timm:resnet10t", "torchvision:shufflenet_v2_x0_5"])
def test_library_models_take_the_checkpoints_number_of_classes(
    spec: str, classes: int, tmp_path: Path
) -> None:
    library, _, name = spec.partition(":")
    if library == "timm":
        made = pytest.importorskip("timm").create_model(name, num_classes=classes)
    else:
        made = pytest.importorskip("torchvision").models.get_model(name, num_classes=classes)
    path = save(tmp_path / "w.safetensors", made.state_dict())
    with open_checkpoint(path) as checkpoint:
        model = build_model(spec, checkpoint=checkpoint)
    x = torch.randn(1, 3, 64, 64)
    assert find_head(model) == "fc"
    torch.testing.assert_close(model(x), made.eval()(x))


def test_a_timm_folder_is_built_from_its_config(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    made = timm.create_model("resnet10t", num_classes=4)
    save(tmp_path / "model.safetensors", made.state_dict())
    config = {"architecture": "resnet10t", "num_classes": 4}
    config["pretrained_cfg"] = {
        "mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3], "input_size": [3, 96, 64],
        "interpolation": "bicubic", "crop_pct": 0.9,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    with open_checkpoint(tmp_path) as checkpoint:
        model = build_model("auto", checkpoint=checkpoint)
        found = find_preprocessing(checkpoint, model)
    assert model.num_classes == 4
    assert found == Preprocessing(
        (0.5, 0.4, 0.3), (0.1, 0.2, 0.3), (96, 64), "bicubic", 0.9, "config.json"
    )


def test_a_backbone_without_a_head(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    made = timm.create_model("resnet10t", num_classes=0)
    path = save(tmp_path / "w.safetensors", made.state_dict())
    with open_checkpoint(path) as checkpoint:
        model = build_model("timm:resnet10t", checkpoint=checkpoint)
    assert find_head(model) is None


def test_code_beside_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    save(tmp_path / "model.safetensors", {"x": torch.ones(2)})
    config = {
        "model_type": "odd",
        "architectures": ["OddModel"],
        "auto_map": {"AutoConfig": "code.OddConfig", "AutoModel": "code.OddModel"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')")
    with (
        open_checkpoint(tmp_path) as checkpoint,
        pytest.raises(ModelError, match="allow it with --trust-remote-code"),
    ):
        build_model("auto", checkpoint=checkpoint)
    assert not (tmp_path / "owned").exists()


def test_a_transformers_folder_with_other_tensors_lists_them(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=9,
    )
    made = transformers.AutoModelForCausalLM.from_config(config)
    made.save_pretrained(tmp_path)
    state = dict(made.state_dict())
    state["surplus.weight"] = state.pop("model.norm.weight")
    save(tmp_path / "model.safetensors", state)
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(ModelError) as caught:
        build_model("auto", checkpoint=checkpoint)
    assert "1 missing: model.norm.weight; 1 unexpected: surplus.weight" in str(caught.value)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (
            {
                "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 3,
                "size": {"height": 48, "width": 32},
            },
            Preprocessing((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), (48, 32), "bicubic", 1.0),
        ),
        (
            {
                "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_center_crop": True,
                "size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224},
            },
            Preprocessing((0.5,) * 3, (0.5,) * 3, (224, 224), "bilinear", 0.875),
        ),
        (
            {"do_normalize": False, "size": 30, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
            Preprocessing((0.0,) * 3, (1.0,) * 3, (30, 30), "bilinear", 1.0),
        ),
    ],
)  # fmt: skip
def test_preprocessor_files(
    facts: dict[str, object], expected: Preprocessing, tmp_path: Path
) -> None:
    save(tmp_path / "model.safetensors", {"x": torch.ones(2)})
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(facts))
    with open_checkpoint(tmp_path) as checkpoint:
        found = find_preprocessing(checkpoint)
    assert found.source == "preprocessor_config.json"
    assert (found.mean, found.std, found.size) == (expected.mean, expected.std, expected.size)
    assert (found.interpolation, found.crop_pct) == (expected.interpolation, expected.crop_pct)


def test_without_facts_preprocessing_is_imagenets(weights: Path) -> None:
    with open_checkpoint(weights) as checkpoint:
        assert find_preprocessing(checkpoint) == DEFAULT_PREPROCESSING


def test_a_broken_preprocessor_file(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", {"x": torch.ones(2)})
    (tmp_path / "preprocessor_config.json").write_text("{")
    with (
        open_checkpoint(tmp_path) as checkpoint,
        pytest.raises(ModelError, match=r"preprocessor_config\.json: unreadable"),
    ):
        find_preprocessing(checkpoint)


@pytest.mark.parametrize(
    ("file", "name", "head"),
    [
        ("resnet20-12fca82f.th", "resnet20", "linear"),
        ("squeezenet1_1_fp16.safetensors", "squeezenet1_1", "classifier.1"),
        ("mobilenet_v2_035_features.safetensors", "mobilenet_v2_035", None),
        ("resnet18_to_layer3.safetensors", "resnet18_to_layer3", None),
    ],
)
def test_real_checkpoints(data: Path, file: str, name: str, head: str | None) -> None:
    with open_checkpoint(data / "checkpoints" / file) as checkpoint:
        model = build_model(f"{data}/models.py:{name}", checkpoint=checkpoint)
    assert find_head(model) == head
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def weights_of(model: nn.Module) -> Any:
    """Stand in for a checkpoint of a model on the meta device: names and shapes are all it has."""
    infos = {
        name: TensorInfo(name, value.dtype, tuple(value.shape), "")
        for name, value in model.state_dict().items()
    }
    return SimpleNamespace(infos=infos, prefix="", live_name=lambda name, _: name)


def proposed(model: nn.Module) -> list[str]:
    return proposals(weights_of(model), {"timm": build_timm, "torchvision": build_torchvision})


def build_timm(name: str, checkpoint: Any) -> nn.Module:
    return build._build_timm(name, checkpoint, {})


build_torchvision = build._build_torchvision


@pytest.mark.parametrize(
    ("library", "name", "classes"),
    [
        ("torchvision", "resnet18", 5),
        ("torchvision", "mobilenet_v2", 1000),
        ("torchvision", "vgg11", 1000),
        ("timm", "resnet26d", 1000),
        ("timm", "vit_tiny_patch16_224", 3),
        ("timm", "efficientnet_b0", 1000),
    ],
)
def test_the_model_whose_tensors_a_checkpoint_has_is_proposed(
    monkeypatch: pytest.MonkeyPatch, library: str, name: str, classes: int
) -> None:
    monkeypatch.setattr(propose, "SECONDS", 600.0)  # what is found, not how soon
    pytest.importorskip("timm")
    models = pytest.importorskip("torchvision.models")
    import timm

    create = timm.create_model if library == "timm" else models.get_model
    with torch.device("meta"):
        model = create(name, num_classes=classes)
    assert f"{library}:{name}" in proposed(model)


def test_no_model_is_proposed_that_differs_in_one_tensor() -> None:
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        model = models.resnet18()
        model.extra = nn.Linear(2, 2)
        assert proposed(model) == []
        assert proposed(nn.Linear(3, 3)) == []


def test_the_search_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        weights = weights_of(models.resnet18())
    built: list[str] = []

    def build_none(name: str, _: Any) -> nn.Module:
        built.append(name)
        return nn.Linear(1, 1)

    monkeypatch.setattr(propose, "MOST", 3)
    assert proposals(weights, {"torchvision": build_none}) == []
    assert built[0] == "resnet18"
    assert len(built) == 3
    monkeypatch.setattr(propose, "SECONDS", -1.0)
    assert proposals(weights, {"torchvision": build_none}) == []
    assert len(built) == 3


def test_a_wrong_model_names_three_tensors_a_count_and_the_one_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "proposals", lambda *_: ["timm:a", "torchvision:b"])
    path = save(tmp_path / "w.safetensors", {f"{i}.weight": torch.ones(1) for i in range(9)})
    for spec in ("torch.nn:Identity", "auto"):
        with open_checkpoint(path) as checkpoint, pytest.raises(ModelError) as caught:
            build_model(spec, checkpoint=checkpoint)
        assert str(caught.value).endswith(" Its tensors are those of timm:a and torchvision:b.")
        assert "\n" not in str(caught.value)
        if spec != "auto":
            assert "9 unexpected: 0.weight, 1.weight, 2.weight and 6 more" in str(caught.value)
