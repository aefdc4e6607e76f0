"""A small network runs on one thread, where nobody has said how many; nothing else changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from svftool.machine import usual_threads
from svftool.training import threads
from svftool.training.threads import batch_work, suited_threads, threads_are_chosen


class Images:
    """A draw of random images; counts what is asked of it."""

    size = 8

    def __init__(self, pixels: int = 8) -> None:
        self.pixels = pixels
        self.sizes: list[int] = []

    def batch(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        self.sizes.append(len(indices))
        return torch.rand(len(indices), 3, self.pixels, self.pixels, generator=generator)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).mean()


def net(width: int = 4) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.Dropout(), nn.Flatten()
    )


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let torch have two threads of its own accord."""
    before = torch.get_num_threads()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "usual_threads", lambda: {2})
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def seen(model: nn.Module, draw: Any, batch_size: int = 16) -> int:
    with suited_threads(model, draw, batch_size):
        found = torch.get_num_threads()
    assert torch.get_num_threads() == 2
    return found


@pytest.mark.usefixtures("two_threads")
def test_the_work_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seen(net(), Images()) == 1
    # 2 x 27 x 4 operations a pixel, 8 images of 8 x 8 pixels.
    work = 2 * 27 * 4 * 8 * 64
    monkeypatch.setattr(threads, "LEAST_WORK", work)
    assert seen(net(), Images()) == 2
    assert seen(net(), Images(), batch_size=7) == 1
    assert seen(net(), Images(7)) == 1
    assert seen(net(3), Images()) == 1


@pytest.mark.usefixtures("two_threads")
def test_a_network_of_many_weights_is_not_run() -> None:
    draw = Images()
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 400_000, device="meta"))
    model.append(nn.Linear(1, 1))  # the device is that of the first parameter
    assert batch_work(model, draw, 16) >= threads.LEAST_WORK
    assert not draw.sizes


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_the_users_own_number_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "2")
    assert threads_are_chosen()
    assert seen(net(), Images()) == 2
    monkeypatch.delenv(name)
    monkeypatch.setattr(threads, "usual_threads", lambda: {8, 4})
    assert threads_are_chosen()
    assert seen(net(), Images()) == 2


@pytest.mark.usefixtures("two_threads")
def test_counting_leaves_model_and_generators_as_they_were() -> None:
    model, draw = net(), Images()
    model.train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert batch_work(model, draw, 4) == 2 * 27 * 4 * 8 * 8 * 4
    assert draw.sizes == [4]
    assert torch.equal(torch.get_rng_state(), state)
    assert [one.training for one in model] == [True, False, True, True]
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.usefixtures("two_threads")
def test_the_number_is_restored_after_a_failure_and_kept_where_nothing_can_be_counted() -> None:
    with pytest.raises(KeyError), suited_threads(net(), Images()):  # type: ignore[arg-type]
        raise KeyError
    assert torch.get_num_threads() == 2
    broken = Images()
    broken.loss = lambda *_: 1 / 0  # type: ignore[assignment, return-value]
    assert seen(net(), broken) == 2


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("number", [1, 2])
def test_training_runs_on_what_suits(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from svftool.tasks.base import TaskMetric
    from svftool.training import Settings, train

    monkeypatch.setattr(threads, "LEAST_WORK", 1e9 if number == 1 else 0.0)
    found: list[int] = []

    class Draw(Images):
        held_out = 0
        order: Callable[..., Tensor] = lambda self, generator: torch.arange(self.size)

        def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
            found.append(torch.get_num_threads())
            return model(batch).mean()

    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten())
    groups = {"head": list(model.parameters())}
    metric = TaskMetric("accuracy", higher_is_better=True)
    train(model, groups, Draw(), Settings(steps=2), seed=0, metric=metric)  # type: ignore[arg-type]
    assert found[-2:] == [number, number]
    assert torch.get_num_threads() == 2


def test_torchs_own_number_is_known() -> None:
    found = usual_threads()
    assert found
    assert min(found) >= 1
