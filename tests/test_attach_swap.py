"""Saving what was trained, and swapping tuned files on a live model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import svftool
from svftool.errors import CheckpointError, FactorsError, ModelError, UsageError
from tests.attaching import randomise


def network(seed: int = 0, classes: int = 5) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential()
    model.add_module("conv", nn.Conv2d(3, 6, 3, padding=1))
    model.add_module("norm", nn.BatchNorm2d(6))
    model.add_module("flat", nn.Flatten())
    model.add_module("middle", nn.Linear(6 * 16, 8))
    model.add_module("fc", nn.Linear(8, classes))
    return model.eval()


@pytest.fixture
def factors(tmp_path: Path) -> Path:
    """Return factors of `network`, whose file names tensors as data-parallel training does."""
    state = {f"module.{name}": value for name, value in network().state_dict().items()}
    save_file(state, tmp_path / "base.safetensors")
    svftool.decompose(tmp_path / "base.safetensors", tmp_path / "factors")
    return tmp_path / "factors"


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def tuned(factors: Path, path: Path, seed: int, *, head: bool = False) -> nn.Sequential:
    """Write a tuned file and return the live model that it was saved from."""
    model = network()
    attached = svftool.attach(model, factors)
    randomise(attached, seed=seed)
    if head:
        model.fc.requires_grad_(True)
        with torch.no_grad():
            model.fc.weight.mul_(seed + 2.0)
    svftool.save_tuned(model, path, task="test", classes=["a", "b"], training={"steps": 3})
    return model


def test_a_tuned_file_holds_what_was_trained(factors: Path, tmp_path: Path) -> None:
    model = tuned(factors, tmp_path / "x.svf.safetensors", 1, head=True)
    found = svftool.read_tuned(tmp_path / "x.svf.safetensors")
    assert set(found.S) == {"module.conv.weight", "module.middle.weight"}
    assert set(found.whole) == {"module.fc.weight", "module.fc.bias"}
    assert torch.equal(found.whole["module.fc.weight"], model.fc.weight)
    assert (found.task, found.classes, found.training) == ("test", ("a", "b"), {"steps": 3})


def test_saving_does_not_overwrite_unless_told(factors: Path, tmp_path: Path) -> None:
    model = tuned(factors, tmp_path / "x.svf.safetensors", 1)
    before = (tmp_path / "x.svf.safetensors").read_bytes()
    with pytest.raises(UsageError):
        svftool.save_tuned(model, tmp_path / "x.svf.safetensors")
    assert (tmp_path / "x.svf.safetensors").read_bytes() == before
    svftool.save_tuned(model, tmp_path / "x.svf.safetensors", force=True)
    assert svftool.read_tuned(tmp_path / "x.svf.safetensors").task is None


def test_merge_of_the_file_is_the_live_models_state_bit_for_bit(
    factors: Path, tmp_path: Path
) -> None:
    model = tuned(factors, tmp_path / "x.svf.safetensors", 1, head=True)
    svftool.merge(factors, [tmp_path / "x.svf.safetensors"], output=tmp_path / "m.safetensors")
    merged = load_file(tmp_path / "m.safetensors")
    live = model.state_dict()
    assert {name.removeprefix("module.") for name in merged} == set(live)
    for name, value in merged.items():
        assert torch.equal(value, live[name.removeprefix("module.")]), name


def test_experts_swap_on_one_model(factors: Path, tmp_path: Path, x: Tensor) -> None:
    one = tuned(factors, tmp_path / "one.svf.safetensors", 1, head=True)
    two = tuned(factors, tmp_path / "two.svf.safetensors", 2)
    model = network()
    svftool.attach(model, factors)
    svftool.load_tuned(model, tmp_path / "one.svf.safetensors")
    torch.testing.assert_close(model(x), one(x))
    svftool.load_tuned(model, tmp_path / "two.svf.safetensors")
    torch.testing.assert_close(model(x), two(x))
    assert torch.equal(model.fc.weight, network().fc.weight)
    svftool.load_tuned(model, tmp_path / "one.svf.safetensors")
    torch.testing.assert_close(model(x), one(x))


def test_loading_undoes_what_was_trained_live(factors: Path, tmp_path: Path, x: Tensor) -> None:
    two = tuned(factors, tmp_path / "two.svf.safetensors", 2)
    trained = tuned(factors, tmp_path / "one.svf.safetensors", 1, head=True)
    svftool.load_tuned(trained, tmp_path / "two.svf.safetensors")
    torch.testing.assert_close(trained(x), two(x))


def test_saving_after_loading_gives_the_same_values(factors: Path, tmp_path: Path) -> None:
    tuned(factors, tmp_path / "one.svf.safetensors", 1)
    model = network()
    svftool.attach(model, factors)
    svftool.load_tuned(model, tmp_path / "one.svf.safetensors")
    svftool.save_tuned(model, tmp_path / "again.svf.safetensors")
    found, expected = (
        svftool.read_tuned(tmp_path / f"{name}.svf.safetensors") for name in ("again", "one")
    )
    for name, values in expected.S.items():
        torch.testing.assert_close(found.S[name], values, rtol=2e-7, atol=0.0)


def test_a_new_head_comes_along(factors: Path, tmp_path: Path, x: Tensor) -> None:
    model = network()
    svftool.attach(model, factors)
    model.fc = nn.Linear(8, 3)
    svftool.save_tuned(model, tmp_path / "x.svf.safetensors")
    other = network()
    svftool.attach(other, factors)
    svftool.load_tuned(other, tmp_path / "x.svf.safetensors")
    assert other.fc.out_features == 3
    assert torch.equal(other(x), model(x))


def test_changed_statistics_are_saved(factors: Path, tmp_path: Path, x: Tensor) -> None:
    model = network()
    svftool.attach(model, factors)
    model.train()(x)
    svftool.save_tuned(model, tmp_path / "x.svf.safetensors")
    whole = svftool.read_tuned(tmp_path / "x.svf.safetensors").whole
    assert torch.equal(whole["module.norm.running_mean"], model.norm.running_mean)


def test_a_file_of_another_base_is_refused(factors: Path, tmp_path: Path, x: Tensor) -> None:
    save_file(network(seed=9).state_dict(), tmp_path / "other.safetensors")
    svftool.decompose(tmp_path / "other.safetensors", tmp_path / "other")
    model = network(seed=9)
    svftool.attach(model, tmp_path / "other")
    svftool.save_tuned(model, tmp_path / "x.svf.safetensors")
    ours = network()
    svftool.attach(ours, factors)
    expected = ours(x)
    with pytest.raises(FactorsError, match="was trained on the base"):
        svftool.load_tuned(ours, tmp_path / "x.svf.safetensors")
    assert torch.equal(ours(x), expected)


def test_layers_that_are_not_attached_are_named(factors: Path, tmp_path: Path) -> None:
    tuned(factors, tmp_path / "x.svf.safetensors", 1)
    model = network()
    svftool.attach(model, factors, exclude=["*conv*"])
    with pytest.raises(FactorsError, match=r"module\.conv\.weight \(not attached\)"):
        svftool.load_tuned(model, tmp_path / "x.svf.safetensors")


def test_plain_models_and_missing_files(tmp_path: Path, factors: Path) -> None:
    with pytest.raises(ModelError, match=r"Call svftool\.attach first"):
        svftool.load_tuned(network(), tmp_path / "x.svf.safetensors")
    model = network()
    svftool.attach(model, factors)
    with pytest.raises((FactorsError, CheckpointError)):
        svftool.load_tuned(model, tmp_path / "missing.svf.safetensors")


def test_a_wrapped_model_is_found(factors: Path, tmp_path: Path) -> None:
    model = network()
    svftool.attach(model, factors)
    svftool.save_tuned(nn.Sequential(model), tmp_path / "x.svf.safetensors")
    assert "module.conv.weight" in svftool.read_tuned(tmp_path / "x.svf.safetensors").S


@pytest.mark.parametrize(
    "changes",
    [
        {"module.norm.weight": (3,)},
        {"module.norm.running_var": (6, 1)},
        {"module.fc.weight": (5, 7)},
        {"module.fc.weight": (4, 8)},
        {"module.fc.bias": (4,)},
        {"module.fc.weight": (4, 8), "module.fc.bias": (3,)},
        {"module.fc.weight": ()},
    ],
)
def test_tensors_of_another_shape_are_refused(
    factors: Path, tmp_path: Path, x: Tensor, changes: dict[str, tuple[int, ...]]
) -> None:
    path = tmp_path / "x.svf.safetensors"
    tuned(factors, path, 1, head=True)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    values = load_file(path) | {name: torch.ones(shape) for name, shape in changes.items()}
    save_file(values, path, metadata=metadata)
    ours = network()
    svftool.attach(ours, factors)
    expected = ours(x)
    with pytest.raises(FactorsError, match=r"has shape .*, expected .* as the model has it"):
        svftool.load_tuned(ours, path)
    assert torch.equal(ours(x), expected)
