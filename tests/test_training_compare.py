"""Comparison of regimes over seeds on a real small network."""

from __future__ import annotations

import gc
import math
import os
import signal
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import write_pictures
from safetensors.torch import save_file
from torch import Tensor, nn

from svftool.attaching import Trainable
from svftool.factors import FactorStore, open_factors
from svftool.progress import Silent
from svftool.stages.decompose import decompose
from svftool.tasks.base import Task
from svftool.tasks.classification import Classification
from svftool.training import Run, Settings, TrainingPlan, compare, interval, summarise

REGIMES = ("head", "svf", "svf+bias", "bias", "norm", "full")


class SmallNet(nn.Module):
    """Convolution, batch norm, mean and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.bn(self.conv(images)).relu().mean((2, 3)))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FactorStore]:
    """Yield the factors of a `SmallNet`."""
    save_file(SmallNet().state_dict(), tmp_path / "base.safetensors", metadata={"format": "pt"})
    decompose(tmp_path / "base.safetensors", tmp_path / "factors")
    with open_factors(tmp_path / "factors") as opened:
        yield opened


@pytest.fixture
def plan(tmp_path: Path, store: FactorStore) -> Callable[..., TrainingPlan]:
    """Return a factory of plans for a few steps on coloured pictures."""
    data = write_pictures(tmp_path / "data", count=8)

    def make(**options: Any) -> TrainingPlan:
        settings = {"steps": 4, "batch_size": 6} | options.pop("settings", {})
        chosen = {"regimes": ["svf"], "seeds": [0]} | options
        return TrainingPlan(
            build=SmallNet,
            store=store,
            tasks=[Classification(data, shots=3, head="keep")],
            settings=Settings(**settings),
            device=torch.device("cpu"),
            **chosen,
        )

    return make


class Kept:
    """Saves nothing, but remembers what it was given."""

    def __init__(self) -> None:
        self.tensors: dict[tuple[str, int], dict[str, Tensor]] = {}

    def __call__(self, run: Run, trainable: Trainable, task: Task) -> Path:
        values = trainable.singular_values() | trainable.whole_tensors()
        self.tensors[run.regime, run.seed] = {k: v.clone() for k, v in values.items()}
        return Path(run.regime)


def test_regimes_train_what_they_say(plan: Callable[..., TrainingPlan]) -> None:
    kept = Kept()
    runs, signum = compare(plan(regimes=REGIMES), kept)
    assert signum is None
    head = {"fc.weight", "fc.bias"}
    assert {regime: set(names) for (regime, _), names in kept.tensors.items()} == {
        "head": head,
        "svf": head | {"conv.weight"},
        "svf+bias": head | {"conv.weight", "conv.bias", "bn.bias"},
        "bias": head | {"conv.bias", "bn.bias"},
        "norm": head | {"bn.weight", "bn.bias"},
        "full": head | {"conv.weight", "conv.bias", "bn.weight", "bn.bias"},
    }
    assert {run.regime: run.trainable_parameters for run in runs} == {
        "head": 27,
        "svf": 35,
        "svf+bias": 51,
        "bias": 43,
        "norm": 43,
        "full": 267,
    }


def test_every_run_starts_from_the_same_and_is_measured_on_the_same(
    plan: Callable[..., TrainingPlan],
) -> None:
    runs, _ = compare(plan(regimes=REGIMES, seeds=[0, 1]), Kept())
    assert [(run.seed, run.regime) for run in runs] == [
        (seed, regime) for seed in (0, 1) for regime in REGIMES
    ]
    for seed in (0, 1):
        assert len({tuple(run.before.items()) for run in runs if run.seed == seed}) == 1
    assert runs[0].before != runs[-1].before
    assert all(run.outcome.steps == 4 and run.shots == 3 for run in runs)
    assert all(run.output == Path(run.regime) for run in runs)


def test_runs_repeat_alone_and_in_company(plan: Callable[..., TrainingPlan]) -> None:
    company, alone = Kept(), Kept()
    compare(plan(regimes=["full", "svf"], seeds=[0, 1]), company)
    torch.rand(7)
    compare(plan(regimes=["svf"], seeds=[1]), alone)
    for name, value in alone.tensors["svf", 1].items():
        assert torch.equal(value, company.tensors["svf", 1][name]), name


def test_a_model_goes_before_the_next_one_is_built(plan: Callable[..., TrainingPlan]) -> None:
    built: list[weakref.ref[nn.Module]] = []
    alive: list[int] = []

    def build() -> nn.Module:
        alive.append(sum(one() is not None for one in built))
        model = SmallNet()
        built.append(weakref.ref(model))
        return model

    gc.disable()  # nothing else shall find the cycles
    try:
        settings = {"tune_lr": True, "safeguard": "always"}
        regimes = ["svf", "core:2", "lora:1", "full"]
        compare(
            replace(plan(regimes=regimes, seeds=[0, 1], settings=settings), build=build), Kept()
        )
    finally:
        gc.enable()
    assert len(built) > 2 * 6
    assert set(alive) == {0}


def test_training_helps_and_globs_limit_it(plan: Callable[..., TrainingPlan]) -> None:
    kept = Kept()
    longer = {"steps": 25, "lr": 0.02, "head_lr": 0.05}
    runs, _ = compare(plan(settings=longer), kept)
    assert runs[0].after["loss"] < runs[0].before["loss"]
    assert not runs[0].worse
    limited = Kept()
    with pytest.raises(Exception, match="layer"):
        compare(plan(exclude=["conv*"]), limited)


class Loud(Silent):
    """Remembers warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def test_a_regime_that_trains_the_head_alone_says_so_once(
    plan: Callable[..., TrainingPlan], tmp_path: Path
) -> None:
    class Plain(SmallNet):
        """Has its norm folded away."""

        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.Identity()

    save_file(Plain().state_dict(), tmp_path / "plain.safetensors", metadata={"format": "pt"})
    decompose(tmp_path / "plain.safetensors", tmp_path / "plain")
    loud = Loud()
    with open_factors(tmp_path / "plain") as store:
        chosen = plan(regimes=["norm", "bias", "svf+norm"], seeds=[0, 1])
        compare(replace(chosen, build=Plain, store=store), Kept(), progress=loud)
    said = [one for one in loud.warnings if "the model has no" in one]
    assert said == [
        "norm: the model has no norm parameters outside its head; trained: head",
        "svf+norm: the model has no norm parameters outside its head; trained: head and singular "
        "values",
    ]


def test_a_worse_tune_is_said_aloud(plan: Callable[..., TrainingPlan]) -> None:
    class Ruin:
        """Gives every label but the right one, so that training can only harm."""

        def __init__(self, draw: Any) -> None:
            self._draw = draw

        def __getattr__(self, name: str) -> Any:
            return getattr(self._draw, name)

        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            images, labels = batch
            return self._draw.loss(model, (images, (labels + 1) % 3))

    loud, chosen = Loud(), plan(settings={"steps": 25, "head_lr": 0.1}, seeds=[0, 1])
    draw = chosen.tasks[0].draw
    runs, _ = compare(chosen, Kept(), progress=loud)
    assert not any(run.worse for run in runs)
    assert loud.warnings == []
    chosen.tasks[0].draw = lambda seed: Ruin(draw(seed))
    runs, _ = compare(chosen, Kept(), progress=loud)
    assert all(run.worse for run in runs)
    assert [warning.partition(": accuracy")[0] for warning in loud.warnings] == [
        "svf, seed 0: this tune is worse than the base",
        "svf, seed 1: this tune is worse than the base",
    ]
    assert all(row.worse for row in summarise(runs, chosen.tasks[0].primary))


def test_an_interruption_keeps_what_is_done(plan: Callable[..., TrainingPlan]) -> None:
    class Press(Kept):
        def __call__(self, run: Run, trainable: Trainable, task: Task) -> Path:
            os.kill(os.getpid(), signal.SIGTERM)
            return super().__call__(run, trainable, task)

    press = Press()
    before = signal.getsignal(signal.SIGTERM)
    runs, signum = compare(plan(regimes=["svf", "full"], seeds=[0, 1]), press)
    assert signum == signal.SIGTERM
    assert [(run.regime, run.seed) for run in runs] == [("svf", 0)]
    assert set(press.tensors) == {("svf", 0)}
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interruption_before_anything_is_trained_is_raised(
    plan: Callable[..., TrainingPlan],
) -> None:
    chosen = plan()
    draw = chosen.tasks[0].draw

    def press(seed: int) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return draw(seed)

    chosen.tasks[0].draw = press
    with pytest.raises(KeyboardInterrupt):
        compare(chosen, Kept())


@pytest.mark.parametrize(("given", "rate"), [(None, 1e-4), (0.01, 0.01)])
def test_a_head_of_single_examples_has_a_small_rate_unless_one_is_given(
    plan: Callable[..., TrainingPlan], tmp_path: Path, given: float | None, rate: float
) -> None:
    task = Classification(tmp_path / "data", shots=1, head="new")
    chosen = replace(plan(settings={"head_lr": given}), tasks=[task])
    runs, _ = compare(chosen, Kept())
    assert runs[0].learning_rates == pytest.approx({"singular_values": 2e-3, "head": rate})


def test_the_summary_is_by_regime(plan: Callable[..., TrainingPlan]) -> None:
    chosen = plan(regimes=["head", "svf"], seeds=[0, 1, 2])
    runs, _ = compare(chosen, Kept())
    summary = summarise(runs, chosen.tasks[0].primary)
    assert [row.regime for row in summary] == ["head", "svf"]
    values = [run.after["accuracy"] for run in runs if run.regime == "svf"]
    assert summary[1].mean == pytest.approx(sum(values) / 3)
    assert summary[1].ci95 == interval(values)
    alone = summarise(runs[:1], chosen.tasks[0].primary)
    assert alone[0].ci95 is None


def test_the_interval_is_students() -> None:
    low, high = interval([1.0, 2.0, 3.0, 4.0])
    half = 3.182446305 * math.sqrt(5 / 3) / 2
    assert (low, high) == pytest.approx((2.5 - half, 2.5 + half))


def test_singular_values_are_trained_the_way_that_was_asked_for(
    plan: Callable[..., TrainingPlan],
) -> None:
    band = plan(regimes=["svf", "bias"], attaching={"train_rank": "top:2"})
    runs, _ = compare(band, Kept())
    assert [run.trainable_parameters for run in runs] == [27 + 2, 27 + 16]
    ways = {}
    for way in ("scale", "absolute"):
        kept = Kept()
        compare(plan(attaching={"parametrisation": way}), kept)
        ways[way] = kept.tensors["svf", 0]["conv.weight"]
    assert not torch.equal(ways["scale"], ways["absolute"])
