"""Folding of frozen batch norm and ReLU: the same results, only where nothing lies between."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

import svftool
from svftool.attaching import fusion, proxy
from tests.attaching import MemoryStore, randomise

M = TypeVar("M", bound=nn.Module)


class Block(nn.Module):
    """A residual block; `tap` lets something else use the first convolution's output."""

    def __init__(self, *, tap: bool = False, twice: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.bn2 = nn.BatchNorm2d(6, affine=False)
        self.conv3 = nn.Conv2d(6, 4, 1)
        self.bn3 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.tap, self.twice = tap, twice

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        y = self.conv1(x)
        z = self.relu(self.bn1(y))
        if self.twice:
            z = self.relu(self.bn1(z))
        z = self.relu(self.bn2(self.conv2(z)))
        if self.tap:
            z = z + y
        z = self.relu(x + self.bn3(self.conv3(z)))
        return z if scale is None else scale * z


def make(**options: bool) -> Block:
    torch.manual_seed(0)
    block = Block(**options).double()
    for norm in (block.bn1, block.bn2, block.bn3):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    with torch.no_grad():
        block.bn1.weight.normal_()
        block.bn1.bias.normal_()
    return block.eval()


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Collect the norms that were fused into a layer, in order."""
    seen: list[nn.Module] = []
    original = fusion.Affine.mark

    def mark(self: fusion.Affine, output: Tensor) -> Tensor:
        seen.append(self.norm)
        return original(self, output)

    monkeypatch.setattr(fusion.Affine, "mark", mark)
    return seen


def run(model: nn.Module, x: Tensor, **options: float) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x, **options)
    y.square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return y.detach(), [*gradients, x.grad]


def attach(model: M, mode: str = "auto") -> M:
    attached = svftool.attach(model, MemoryStore(model), mode=mode)  # type: ignore[arg-type]
    randomise(attached)
    return model


def assert_same(a: tuple[Tensor, list[Tensor]], b: tuple[Tensor, list[Tensor]]) -> None:
    torch.testing.assert_close(a[0], b[0], rtol=1e-10, atol=1e-10)
    assert len(a[1]) == len(b[1]) > 1
    for found, expected in zip(a[1], b[1], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def without_fusion(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Run the blocks' layers without the root's forward, which is what fuses."""
    twin = copy.deepcopy(model)
    inner = lambda images: type(model).forward(twin, images)  # noqa: E731
    twin.zero_grad()
    x = x.clone().requires_grad_()
    y = inner(x)
    y.square().sum().backward()
    return y.detach(), [*[p.grad for p in twin.parameters() if p.grad is not None], x.grad]


X = torch.randn(2, 4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("mode", ["factored", "composed", "residual"])
def test_fusion_changes_no_result(mode: str, fused: list[nn.Module]) -> None:
    model = attach(make(), mode)
    expected = without_fusion(model, X)
    assert not fused
    assert_same(run(model, X), expected)
    assert fused == [model.bn1, model.bn2, model.bn3]


class Decoder(nn.Module):
    """What follows a layer in other orders: a transposed convolution, a plain ReLU, identities."""

    def __init__(self, *, inplace: bool = False) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Identity()
        self.act = nn.ReLU(inplace=inplace)
        self.stem = nn.Sequential(nn.Conv2d(6, 5, 3), nn.ReLU(inplace=inplace))
        self.fc = nn.Sequential(nn.Linear(5, 7), nn.ReLU(inplace=inplace), nn.Linear(7, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(self.act(self.drop(self.norm(self.up(x)))))
        return self.fc(y.mean((2, 3)))


@pytest.fixture
def rectified(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Collect the ReLUs that were fused into a layer, in order."""
    seen: list[nn.Module] = []
    original = proxy.mark_rectified

    def mark(output: Tensor, relu: nn.Module) -> Tensor:
        seen.append(relu)
        return original(output, relu)

    monkeypatch.setattr(proxy, "mark_rectified", mark)
    return seen


def make_decoder(**options: bool) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(**options).double()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2.0)
    return model.eval()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("mode", ["factored", "composed", "residual"])
def test_a_relu_behind_a_layer_changes_no_result(
    mode: str, inplace: bool, rectified: list[nn.Module]
) -> None:
    model = attach(make_decoder(inplace=inplace), mode)
    expected = without_fusion(model, X)
    assert not rectified
    assert_same(run(model, X), expected)
    inside = [model.act, model.stem[1], model.fc[1]]
    assert rectified == ([] if mode == "composed" else inside)


def test_a_relu_keeps_a_byte_a_value() -> None:
    def kept_bytes(call: Callable[[], Tensor]) -> int:
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = call()
        assert output.requires_grad
        return sum(kept.values())

    model = attach(make_decoder(), "factored")
    twin = copy.deepcopy(model)
    x = torch.randn(8, 4, 16, 16, dtype=torch.float64)
    fused, plain = kept_bytes(lambda: model(x)), kept_bytes(lambda: Decoder.forward(twin, x))
    values = 8 * (6 * 32 * 32 + 5 * 30 * 30)
    # Beside the norm's input, kept by the plain pass alone, 8 bytes a value against one.
    assert plain - fused > 7 * values


@pytest.mark.parametrize(
    "watch",
    [
        lambda model: model.drop.register_forward_hook(lambda *_: None),
        lambda model: model.norm.register_forward_hook(lambda *_: None),
        lambda model: model.act.register_forward_pre_hook(lambda *_: None),
        lambda model: model.act.register_full_backward_hook(lambda *_: None),
        lambda model: model.norm.train(),
    ],
    ids=["between", "norm", "relu", "backward", "norm in training"],
)
def test_a_relu_that_is_watched_is_left(
    watch: Callable[[Decoder], object], rectified: list[nn.Module]
) -> None:
    model = attach(make_decoder())
    watch(model)
    assert_same(run(model, X), without_fusion(model, X))
    assert rectified == [model.stem[1], model.fc[1]]


class Nested(nn.Module):
    """A norm at the end of a container, its ReLU outside."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.body(x))
        return y


@pytest.mark.parametrize("hooked", [False, True])
def test_a_hook_on_what_contains_a_layer_sees_what_it_saw(
    hooked: bool, rectified: list[nn.Module]
) -> None:
    model = attach(Nested().double().eval())
    seen: list[Tensor] = []
    if hooked:
        model.body.register_forward_hook(lambda *call: seen.append(call[2].clone()))
    model(X)
    assert rectified == ([] if hooked else [model.relu])
    assert all(bool((output < 0).any()) for output in seen)


def test_what_else_uses_the_output_prevents_it(fused: list[nn.Module]) -> None:
    model = attach(make(tap=True))
    assert_same(run(model, X), without_fusion(model, X))
    assert fused == [model.bn2, model.bn3]


def test_a_norm_that_is_called_twice_prevents_it(fused: list[nn.Module]) -> None:
    model = make()
    model.twice = True
    model.bn1 = nn.BatchNorm2d(6).double().eval()
    model = attach(model)
    assert_same(run(model, X), without_fusion(model, X))
    assert fused == [model.bn2, model.bn3]


def test_other_arguments_than_traced_prevent_it(fused: list[nn.Module]) -> None:
    model = attach(make())
    doubled, _ = run(model, X, scale=2.0)
    assert not fused
    torch.testing.assert_close(doubled, 2.0 * run(model, X)[0])
    assert fused


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.bn1.train(),
        lambda model: model.bn1.weight.requires_grad_(True),
        lambda model: model.conv1.register_forward_hook(lambda *_: None),
        lambda model: model.bn1.register_forward_pre_hook(lambda *_: None),
    ],
    ids=["training", "trained", "hooked layer", "hooked norm"],
)
def test_a_norm_that_is_not_frozen_or_watched_is_left(
    change: Callable[[Block], object], fused: list[nn.Module]
) -> None:
    model = attach(make())
    change(model)
    model(X)
    assert fused == [model.bn2, model.bn3]


def test_training_mode_is_traced_anew(fused: list[nn.Module]) -> None:
    model = attach(make())
    model(X)
    model.train()
    for norm in (model.bn1, model.bn2, model.bn3):
        norm.eval()
    fused.clear()
    model(X)
    assert fused == [model.bn1, model.bn2, model.bn3]


class Undecided(Block):
    """Cannot be traced: what it does depends on the data."""

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


def test_models_that_cannot_be_traced_run_as_they_are(fused: list[nn.Module]) -> None:
    model = make()
    model.__class__ = Undecided
    attach(model)
    model(X).sum().backward()
    assert not fused


def test_copies_and_pickles_fold_their_own_norms(fused: list[nn.Module]) -> None:
    model = attach(make())
    expected = run(model, X)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        fused.clear()
        assert_same(run(twin, X), expected)
        assert fused == [twin.bn1, twin.bn2, twin.bn3]


def test_detaching_gives_norms_their_forward_back() -> None:
    model = attach(make())
    tuned = model(X).detach()
    svftool.detach(model)
    assert "forward" not in vars(model.bn1) | vars(model.relu)
    torch.testing.assert_close(model(X).detach(), tuned)
