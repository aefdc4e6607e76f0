"""Outputs of the frozen beginning of a model: computed once, and nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import write_pictures
from torch import Tensor, nn

from svftool.progress import SILENT
from svftool.tasks.base import Draw
from svftool.tasks.classification import Classification
from svftool.training import Settings, StateFile, frozen, train
from svftool.training.group import Interruption


class Counted(nn.Conv2d):
    """A convolution that counts the images it sees."""

    seen = 0

    def forward(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return super().forward(images)


class Net(nn.Module):
    """Two stages, with a connection past the second one, and a head behind dropout."""

    def __init__(self, *, skip: bool = False, drop: float = 0.0, inplace: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(Counted(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(drop))
        self.relu = nn.ReLU(inplace=inplace)
        self.second = Counted(8, 8, 3, padding=1)
        self.third = nn.Conv2d(8, 8, 3)
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(8, 3)
        self.skip = skip

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.first(images))
        y = self.second(x)
        y = self.third((x + y if self.skip else y).relu_())
        return self.fc(self.drop(y.mean((2, 3))))


@pytest.fixture
def draw(tmp_path: Path) -> Draw:
    """Return nine pictures to train on, and no augmentation."""
    folder = write_pictures(tmp_path / "data", count=5)
    return Classification(folder, shots=3, augment="none", head="keep").draw(0)


def fit(model: nn.Module, draw: Draw, names: str, **options: Any) -> dict[str, Any]:
    """Train the modules whose names begin so, and return the curves and weights."""
    parameters = [
        p for name, p in model.named_parameters() if name.startswith(tuple(names.split()))
    ]
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    settings = Settings(steps=options.pop("steps", 12), batch_size=4, head_lr=0.01)
    metric = Classification.primary
    outcome = train(model, {"head": parameters}, draw, settings, seed=0, metric=metric, **options)
    return {"curves": outcome.curves, "weights": model.state_dict()}


def assert_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one["curves"] == two["curves"]
    for name, value in one["weights"].items():
        assert torch.equal(value, two["weights"][name]), name


@pytest.mark.parametrize("trained", ["fc", "third fc"])
@pytest.mark.parametrize("options", [{}, {"skip": True}, {"inplace": False}])
def test_losses_and_weights_are_those_of_the_whole_model(
    draw: Draw, monkeypatch: pytest.MonkeyPatch, trained: str, options: dict[str, Any]
) -> None:
    model = Net(**options)
    kept = fit(model, draw, trained)
    # 12 steps of 4 images; each of the 9 is computed once, and some more to find out how.
    assert model.second.seen < 12 * 4
    monkeypatch.setattr(frozen, "LARGEST", 0)
    model = Net(**options)
    whole = fit(model, draw, trained)
    assert model.second.seen >= 12 * 4
    assert_same(kept, whole)


class Listening(nn.Module):
    """A head on what a module inside of a frozen network gives."""

    def __init__(self, inner: str) -> None:
        super().__init__()
        self.net, self.inner = Net(), inner
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        caught: list[Tensor] = []
        module = self.net.get_submodule(self.inner)
        handle = module.register_forward_hook(lambda _m, _a, output: caught.append(output))
        try:
            self.net(images)
        finally:
            handle.remove()
        return self.head(caught[0].mean((2, 3)))


@pytest.mark.parametrize("inner", ["second", "first.0", "relu"])
def test_a_part_that_somebody_listens_to_is_heard(
    draw: Draw, monkeypatch: pytest.MonkeyPatch, inner: str
) -> None:
    model = Listening(inner)
    kept = fit(model, draw, "head")
    assert model.net.first[0].seen < 12 * 4
    monkeypatch.setattr(frozen, "LARGEST", 0)
    assert_same(kept, fit(Listening(inner), draw, "head"))


class Touchy(Net):
    """A network that looks at how it is run."""

    def forward(self, images: Tensor) -> Tensor:
        if "forward" in self.first.__dict__:
            raise KeyError("forward")
        return super().forward(images)


def test_a_model_that_does_not_bear_it_is_run_whole(draw: Draw) -> None:
    model = Touchy()
    fit(model, draw, "fc")
    assert model.second.seen >= 12 * 4


def test_each_example_is_computed_once(draw: Draw) -> None:
    def computed(steps: int) -> int:
        model = Net()
        fit(model, draw, "fc", steps=steps)
        return model.first[0].seen

    assert computed(12) == computed(60)


@pytest.mark.parametrize(
    ("model", "trained"),
    [(Net, "first"), (lambda: Net(drop=0.5), "second")],
    ids=["nothing before", "random before"],
)
def test_nothing_is_kept_that_changes(
    draw: Draw, model: Callable[[], nn.Module], trained: str
) -> None:
    built = model()
    built.requires_grad_(False)
    for name, parameter in built.named_parameters():
        parameter.requires_grad_(name.startswith(trained))

    def loss(indices: Tensor) -> Tensor:
        return draw.loss(built, draw.batch(indices, torch.Generator()))

    probe = torch.arange(4)
    assert frozen.FrozenOutputs.of(built.train(), loss, probe, size=9, together=4) is None


def test_augmented_images_run_through_all(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "data", count=5)
    model = Net()
    fit(model, Classification(folder, shots=3, augment="light", head="keep").draw(0), "fc")
    assert model.second.seen == 12 * 4


def test_what_is_resumed_sees_the_same_bits(draw: Draw, tmp_path: Path) -> None:
    class Stopping(Interruption):
        calls = 0

        def came(self) -> bool:
            self.calls += 1
            return self.calls > 7

    whole = fit(Net(), draw, "third fc")
    state = StateFile(tmp_path / "state")
    fit(Net(), draw, "third fc", saved=state, interruption=Stopping(), progress=SILENT)
    model = Net()
    resumed = fit(model, draw, "third fc", saved=state)
    assert_same(resumed, whole)
