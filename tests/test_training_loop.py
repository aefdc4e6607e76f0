"""The loop on a problem whose answer is known: least squares."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from svftool.errors import FactorsError, ResourceError, UsageError
from svftool.progress import SILENT, Progress
from svftool.tasks.base import Part, Prepared, TaskMetric
from svftool.training import Interruption, Outcome, Settings, State, StateFile, train
from svftool.training.batches import Sampler
from svftool.training.loop import RunCurves
from svftool.training.optimise import Optimiser, rate_factor

ERROR = TaskMetric("error", higher_is_better=False)
GENERATOR = torch.Generator().manual_seed(0)
TRUE = torch.randn(6, generator=GENERATOR)
INPUTS = torch.randn(40, 6, generator=GENERATOR)


class LeastSquares:
    """A draw whose model is one linear layer; records the examples it was asked for."""

    size = len(INPUTS)

    def __init__(self, *, held_out: int = 0, noise: float = 0.0) -> None:
        self.held_out = held_out
        self.noise = noise
        self.asked: list[list[int]] = []
        self.parts: list[str] = []

    def prepare(self, model: nn.Module) -> Prepared:
        return Prepared(model)

    def order(self, generator: torch.Generator) -> Tensor:
        return torch.randperm(self.size, generator=generator)

    def batch(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        self.asked.append(indices.tolist())
        noise = self.noise * torch.randn(len(indices), generator=generator)
        return INPUTS[indices], INPUTS[indices] @ TRUE + noise

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        inputs, targets = batch
        return (model(inputs).squeeze(1) - targets).square().mean()

    def evaluate(
        self, model: nn.Module, part: Part = "query", *, progress: Progress = SILENT
    ) -> dict[str, float]:
        self.parts.append(part)
        model.eval()
        with torch.no_grad():
            return {"error": float((model(INPUTS).squeeze(1) - INPUTS @ TRUE).square().mean())}


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 1, bias=False))


def fit(model: nn.Module, draw: LeastSquares, seed: int = 0, **options: Any) -> Outcome:
    chosen = {"steps": 100, "batch_size": 16, "lr": 0.1} | options
    extra = {key: chosen.pop(key) for key in ("interruption", "log", "saved") if key in chosen}
    return train(
        model,
        {"head": list(model[2].parameters())},
        draw,
        Settings(**chosen, head_lr=chosen["lr"]),
        seed=seed,
        metric=ERROR,
        **extra,
    )


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_answer_is_found(optimizer: str) -> None:
    model, draw = linear(), LeastSquares()
    model[1].p = 0.0
    outcome = fit(model, draw, optimizer=optimizer, steps=150)
    assert outcome.ending == "finished"
    assert outcome.steps == outcome.kept == 150
    assert draw.evaluate(model)["error"] < 1e-3
    assert outcome.last_loss < 0.01 * outcome.first_loss
    assert 0 < outcome.step_seconds <= outcome.seconds


def test_the_query_set_is_not_looked_at() -> None:
    draw = LeastSquares()
    fit(linear(), draw)
    assert draw.parts == []
    draw = LeastSquares(held_out=5)
    fit(linear(), draw)
    assert set(draw.parts) == {"held_out"}


def test_the_same_seed_gives_the_same_bytes() -> None:
    def weights(seed: int) -> Tensor:
        model = linear()
        torch.rand(seed + 1)
        fit(model, LeastSquares(noise=0.3), seed)
        return model[2].weight.detach()

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_global_randomness_is_left_as_it_was() -> None:
    model = linear()
    before = torch.get_rng_state()
    fit(model, LeastSquares())
    assert torch.equal(before, torch.get_rng_state())


def test_batch_norm_stays_in_evaluation_mode_and_dropout_acts() -> None:
    model = linear()
    seen: list[tuple[bool, bool]] = []
    model[2].register_forward_hook(lambda *_: seen.append((model[0].training, model[1].training)))
    fit(model, LeastSquares(held_out=3))
    assert (False, True) in seen
    assert not any(norm for norm, _ in seen)
    assert torch.equal(model[0].running_mean, torch.zeros(6))
    assert not model.training


def test_held_out_examples_choose_the_weights() -> None:
    class Rising(LeastSquares):
        """Says that the fourth measurement was the best."""

        def evaluate(self, model: nn.Module, part: Part = "query", **_: Any) -> dict[str, float]:
            super().evaluate(model, part)
            self.values.append(model[2].weight.detach().clone())
            return {"error": 1.0 if len(self.values) == 4 else 2.0}

    model, draw = linear(), Rising(held_out=5)
    draw.values = []
    outcome = fit(model, draw)
    assert outcome.kept == 40
    assert outcome.steps == 100
    assert torch.equal(model[2].weight, draw.values[3])


@pytest.mark.parametrize("lr", [1e4, math.inf])
def test_a_divergence_stops_and_keeps_the_best(lr: float) -> None:
    model = linear()
    start = model[2].weight.detach().clone()
    outcome = fit(model, LeastSquares(), lr=lr, clip=None, optimizer="sgd")
    assert outcome.ending == "diverged"
    assert outcome.steps < 30
    assert outcome.kept == 0
    assert torch.equal(model[2].weight, start)


def test_an_interruption_keeps_the_step_it_came_in() -> None:
    model, draw = linear(), LeastSquares()

    class Press:
        def scalars(self, step: int, values: Any) -> None:
            if step == 9:
                os.kill(os.getpid(), signal.SIGINT)

    with Interruption() as interruption:
        outcome = fit(model, draw, interruption=interruption, log=Press())
    assert interruption.signum == signal.SIGINT
    assert (outcome.ending, outcome.steps, outcome.kept) == ("interrupted", 10, 10)
    shorter = linear()
    fit(shorter, LeastSquares(), steps=100)
    assert not torch.equal(shorter[2].weight, model[2].weight)


def test_a_second_signal_means_what_it_always_did() -> None:
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.signum == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_lack_of_memory_says_what_to_lower() -> None:
    class Hungry(LeastSquares):
        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            return torch.empty(2**60).sum()

    with pytest.raises(ResourceError, match=r"batch of 16 .*--batch-size"):
        fit(linear(), Hungry())

    class Wrong(LeastSquares):
        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        fit(linear(), Wrong())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_float32_weights(precision: str) -> None:
    model, draw = linear(), LeastSquares()
    model[1].p = 0.0
    inside: list[torch.dtype] = []
    model[2].register_forward_hook(lambda _m, _a, output: inside.append(output.dtype))
    fit(model, draw, precision=precision)
    assert inside[0] == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert model[2].weight.dtype == torch.float32
    assert draw.evaluate(model)["error"] < 0.05


def test_decay_pulls_to_the_start() -> None:
    free, held = linear(), linear()
    start = free[2].weight.detach().clone()
    fit(free, LeastSquares())
    fit(held, LeastSquares(), decay=5.0)
    moved = [float((m[2].weight.detach() - start).norm()) for m in (free, held)]
    assert moved[1] < 0.5 * moved[0]


def test_the_head_has_a_decay_of_its_own() -> None:
    parameters = [nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))]
    settings = Settings(lr=0.1, head_lr=0.1, warmup=0.0, decay=2.0, head_decay=0.0)
    optimiser = Optimiser({"bias": parameters[:1], "head": parameters[1:]}, settings, steps=10)
    with torch.no_grad():
        for parameter in parameters:
            parameter.fill_(2.0)
    # Without a gradient the optimiser stands still: what moves is the pull to the start.
    optimiser.step(sum(0.0 * p.sum() for p in parameters), 0)
    assert [round(p.item(), 6) for p in parameters] == [2.0 - 0.1 * 2.0, 2.0]


def test_the_gradient_is_clipped_as_one() -> None:
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))]
    groups = {"bias": parameters[:1], "head": parameters[1:]}
    settings = Settings(optimizer="sgd", clip=1.0, lr=1.0, head_lr=1.0, warmup=0.0)
    optimiser = Optimiser(groups, settings, steps=10)
    optimiser.step(100 * (parameters[0].sum() + parameters[1].sum()), 0)
    moved = torch.cat([p.detach() for p in parameters])
    torch.testing.assert_close(moved, torch.full((5,), -1 / math.sqrt(5)))


def test_each_group_has_its_own_rate() -> None:
    parameters = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    settings = Settings(lr=1e-4, head_lr=1e-2, warmup=0.0, clip=None)
    optimiser = Optimiser(
        {"singular_values": parameters[:1], "head": parameters[1:]}, settings, steps=10
    )
    optimiser.step(sum(p.sum() for p in parameters), 0)
    assert [round(-p.item(), 6) for p in parameters] == [1e-4, 1e-2]


def test_the_head_can_be_trained_first() -> None:
    first, head = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    settings = Settings(lr=0.1, head_lr=0.01, warmup=0.5, head_first=2, decay=1.0)
    optimiser = Optimiser({"singular_values": [first], "head": [head]}, settings, steps=10)
    asked, heads, rates = [], [], []
    for step in range(4):
        hidden = 2 * first
        hidden.register_hook(lambda _gradient, step=step: asked.append(step))
        before = head.item()
        optimiser.step((hidden + head).sum(), step)
        heads.append(before - head.item())
        rates.append(optimiser.rates()["lr/singular_values"])
        assert (first.item() == 1.0) == (step < 2)
    assert asked == [2, 3], "nothing below the head is differentiated before"
    assert min(heads) > 0
    # Of the 8 steps that are left the rate rises over 4.
    assert rates == pytest.approx([0.0, 0.0, 0.1 / 4, 0.1 * 2 / 4])
    # Its moments begin with its first gradient: Adam's first step is the rate.
    assert 1.0 - first.item() == pytest.approx(rates[2] + rates[3], rel=0.05)


def test_the_head_alone_has_no_other_part_to_wait_for() -> None:
    head = nn.Parameter(torch.ones(1))
    settings = Settings(head_lr=0.01, warmup=0.0, head_first=20)
    optimiser = Optimiser({"head": [head]}, settings, steps=10)
    optimiser.step(head.sum(), 0)
    assert head.item() == pytest.approx(0.99)


@pytest.mark.parametrize(
    ("groups", "message"),
    [(("bias",), "no head is trained here"), (("bias", "head"), "fewer than the 5 steps")],
)
def test_a_head_that_cannot_be_first_is_refused(groups: tuple[str, ...], message: str) -> None:
    parts = {name: [nn.Parameter(torch.ones(1))] for name in groups}
    with pytest.raises(UsageError, match=message):
        Optimiser(parts, Settings(head_first=5), steps=5)


def test_the_rate_rises_then_falls_to_nothing() -> None:
    rates = [rate_factor(step, 50, 0.1) for step in range(50)]
    assert rates[:5] == sorted(rates[:5])
    assert max(rates) == rates[4] == 1.0
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] < 0.01
    assert rate_factor(0, 1, 0.0) == 1.0


def test_batches_go_through_every_epoch_in_full() -> None:
    draw = LeastSquares()
    sampler = Sampler(draw, 16, seed=3)
    row = torch.cat([sampler.indices(step) for step in range(5)])
    assert sorted(row[:40].tolist()) == sorted(row[40:].tolist()) == list(range(40))
    assert row[:40].tolist() != row[40:].tolist()
    late = Sampler(draw, 16, seed=3)
    assert torch.equal(late.indices(4), row[64:80])
    assert torch.equal(late.indices(2), row[32:48])
    whole = Sampler(draw, 1000, seed=3)
    assert sorted(whole.indices(7).tolist()) == list(range(40))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 3, "epochs": 2}, "--steps and --epochs"),
        ({"steps": 0}, "--steps is 0"),
        ({"epochs": -1}, "--epochs is -1"),
        ({"lr": 0.0}, "--lr is 0"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"head_first": -1}, "--head-first is -1"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Settings(**options)


class Killed(Exception):
    """Stands for the end of a process: nothing after it runs."""


class KillAt:
    """A log that ends the run at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def scalars(self, step: int, values: Any) -> None:
        if step == self.step:
            raise Killed


@pytest.mark.parametrize(
    ("held_out", "options"),
    [
        (0, {}),
        (0, {"optimizer": "sgd", "decay": 0.5}),
        (5, {"steps": 63}),
        (0, {"precision": "fp16", "decay": 0.1}),
    ],
)
def test_a_run_goes_on_where_it_was_killed(
    tmp_path: Path, held_out: int, options: dict[str, Any]
) -> None:
    whole, draw = linear(), LeastSquares(held_out=held_out, noise=0.3)
    expected = fit(whole, draw, **options)
    cut, state = linear(), StateFile(tmp_path / "state", every=7)
    with pytest.raises(Killed):
        fit(cut, draw, saved=state, log=KillAt(40), **options)
    resumed, late = linear(), LeastSquares(held_out=held_out, noise=0.3)
    found = fit(resumed, late, saved=StateFile(tmp_path / "state"), **options)
    assert len(late.asked) == expected.steps - 35
    assert torch.equal(whole[2].weight, resumed[2].weight)
    assert not torch.equal(whole[2].weight, cut[2].weight)
    same = ("ending", "steps", "kept", "first_loss", "last_loss", "curves")
    assert [getattr(found, name) for name in same] == [getattr(expected, name) for name in same]


def test_a_divergence_after_going_on_keeps_the_best_from_before(tmp_path: Path) -> None:
    class Spoiled(LeastSquares):
        """Gives no number from a step on."""

        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            return super().loss(model, batch) * (math.nan if len(self.asked) > self.last else 1.0)

    whole, draw = linear(), Spoiled()
    draw.last = 60
    expected = fit(whole, draw)
    state = StateFile(tmp_path / "state", every=25)
    draw = Spoiled()
    draw.last = 60
    with pytest.raises(Killed):
        fit(linear(), draw, saved=state, log=KillAt(55))
    resumed, draw = linear(), Spoiled()
    draw.last = 10
    found = fit(resumed, draw, saved=state)
    assert (found.ending, found.steps, found.kept) == ("diverged", 60, expected.kept)
    assert torch.equal(whole[2].weight, resumed[2].weight)


def test_buffers_that_training_changes_go_on_too(tmp_path: Path) -> None:
    class Counting(nn.Module):
        """Adds up its inputs in a buffer that its output depends on."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros(6))

        def forward(self, inputs: Tensor) -> Tensor:
            self.total += inputs.mean(0).detach()
            return inputs + 0.01 * self.total

    def network() -> nn.Module:
        model = linear()
        model.insert(0, Counting())
        return model

    def fit_it(model: nn.Module, **options: Any) -> None:
        settings = Settings(steps=30, batch_size=16)
        groups = {"head": list(model[3].parameters())}
        train(model, groups, LeastSquares(), settings, seed=0, metric=ERROR, **options)

    whole, state = network(), StateFile(tmp_path / "state", every=10)
    fit_it(whole)
    with pytest.raises(Killed):
        fit_it(network(), saved=state, log=KillAt(25))
    resumed = network()
    fit_it(resumed, saved=state)
    assert torch.equal(whole[3].weight, resumed[3].weight)
    assert torch.equal(whole[0].total, resumed[0].total)


def test_a_state_is_written_by_the_clock_where_no_steps_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("svftool.training.state.time.perf_counter", lambda: now[0])
    state = StateFile(tmp_path / "state")
    now[0] = 29.0
    assert not state.due(1000)
    now[0] = 31.0
    assert state.due(1)

    def slow(*_: Any, **__: Any) -> None:
        now[0] += 10.0
        (tmp_path / "state.new").touch()

    monkeypatch.setattr("svftool.training.state.save_file", slow)
    state.write(State({}, {}))
    now[0] += 199.0
    assert not state.due(2)
    now[0] += 2.0
    assert state.due(2)


def test_long_curves_are_thinned_and_go_on_as_they_were() -> None:
    whole, first, second = RunCurves(), RunCurves(), RunCurves()
    for step in range(3000):
        whole.add("loss", step, float(step))
    for step in range(1700):
        first.add("loss", step, float(step))
    second.restore(json.loads(json.dumps(first.state())))
    for step in range(1700, 3000):
        second.add("loss", step, float(step))
    assert second.result() == whole.result()
    points = whole.result()["loss"]
    assert 256 <= len(points) <= 512
    assert points[0] == (0, 0.0)
    assert points[-1][0] >= 2990


@pytest.mark.parametrize(
    "damage", ["a tensor less", "another shape", "another dtype", "a value", "a fact"]
)
def test_a_damaged_state_is_not_gone_on_from(tmp_path: Path, damage: str) -> None:
    file = StateFile(tmp_path / "state")
    facts, tensors = {"step": 3}, {"a": torch.ones(3), "b": torch.ones(2)}
    file.write(State(tensors, facts))
    assert file.read() is not None
    with safe_open(file.path, framework="pt") as written:
        metadata = written.metadata()
    match damage:
        case "a tensor less":
            del tensors["b"]
        case "another shape":
            tensors["a"] = torch.ones(3, 1)
        case "another dtype":
            tensors["a"] = torch.ones(3, dtype=torch.float64)
        case "a value":
            tensors["a"][0] = -1.0
        case _:
            metadata["svftool"] = '{"step": "x"}'
    save_file(tensors, file.path, metadata=metadata)
    with pytest.raises(FactorsError, match="without --resume"):
        file.read()
