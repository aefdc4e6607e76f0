"""One training run: from a prepared model and its trainable groups to the weights that are kept."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from svftool.progress import SILENT, Progress
from svftool.tasks import Draw, Metric, to_device
from svftool.training.interrupt import Interruption
from svftool.training.memory import explain_out_of_memory
from svftool.training.optimise import Optimiser
from svftool.training.randomness import Sampler, derived_seed, generator_for, repeatable
from svftool.training.settings import Settings

Ending = Literal["finished", "interrupted", "diverged"]

SMOOTHING = 0.9
DIVERGED_FACTOR, DIVERGED_MARGIN = 2.0, 1.0
"""A run has diverged when its smoothed loss is above factor times the first one plus the margin."""

CHECKS = 10
"""Times that held-out examples are measured, or weights are set aside, in a run."""

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Log(Protocol):
    """Where the curves of a run go."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record values at a step."""


@dataclass(frozen=True)
class Outcome:
    """What a training run came to.

    Attributes
    ----------
    ending : {"finished", "interrupted", "diverged"}
        Why it stopped.
    steps : int
        Optimiser steps done.
    kept : int
        Step after which the kept weights stood: `steps`, or an earlier one that was best.
    first_loss, last_loss : float or None
        Smoothed training loss at the start and the end; None without a step.
    seconds : float
        Wall time of the run, measuring of held-out examples included.
    step_seconds : float or None
        Median wall time of a step.
    """

    ending: Ending
    steps: int
    kept: int
    first_loss: float | None
    last_loss: float | None
    seconds: float
    step_seconds: float | None


def train(
    model: nn.Module,
    groups: Mapping[str, Sequence[nn.Parameter]],
    draw: Draw,
    settings: Settings,
    *,
    seed: int,
    metric: Metric,
    label: str = "training",
    interruption: Interruption | None = None,
    log: Log | None = None,
    progress: Progress = SILENT,
) -> Outcome:
    """Train the groups of parameters on the support set; the model is left with the kept weights.

    The weights kept are the last; with a held-out part of the support set those that did best on
    it; after a divergence those with the lowest smoothed training loss. The query set is not
    looked at.

    Parameters
    ----------
    model : nn.Module
        On its device, with everything outside `groups` frozen.
    groups : mapping of str to sequence of Parameter
        What is trained, by kind.
    draw : Draw
        Data and loss.
    settings : Settings
        Budget, optimiser, schedule and precision.
    seed : int
        Chooses the order of the examples, augmentation and dropout.
    metric : Metric
        Decides on held-out examples.
    label : str
        What progress is shown under.
    interruption : Interruption or None
        Asked before each step whether to stop.

    Raises
    ------
    ResourceError
        If memory runs out; says what to lower.
    """
    run = _Run(model, groups, draw, settings, seed=seed, metric=metric)
    device = run.optimiser.parameters[0].device
    with (
        explain_out_of_memory(settings.batch_size),
        repeatable(device),
        progress.task(label, total=run.steps, unit="steps") as bar,
    ):
        for step in range(run.steps):
            if interruption is not None and interruption.came():
                return run.outcome("interrupted")
            loss = run.step(step)
            if loss is None:
                return run.outcome("diverged")
            bar.advance(detail=f"loss {loss:.3f}")
            if log is not None:
                log.scalars(step, {"loss": loss})
        return run.outcome("finished")


def training_mode(model: nn.Module) -> None:
    """Put the model in training mode, and its batch norms in evaluation mode."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


class _Run:
    """State of one run: the step it is at, its smoothed loss and the weights set aside."""

    def __init__(
        self,
        model: nn.Module,
        groups: Mapping[str, Sequence[nn.Parameter]],
        draw: Draw,
        settings: Settings,
        *,
        seed: int,
        metric: Metric,
    ) -> None:
        self.steps = settings.step_count(draw.size)
        self.optimiser = Optimiser(groups, settings, steps=self.steps)
        self._model, self._draw, self._metric, self._seed = model, draw, metric, seed
        self._sampler = Sampler(draw, settings.batch_size, seed)
        self._autocast = _AUTOCAST.get(settings.precision)
        self._interval = max(1, self.steps // CHECKS)
        self._done = 0
        self._first: float | None = None
        self._smooth: float | None = None
        self._best = _Best(self.optimiser.parameters)
        self._times: list[float] = []
        self._started = time.perf_counter()
        training_mode(model)

    def step(self, step: int) -> float | None:
        """Do one step and give the smoothed loss before it; None when the run has diverged."""
        begun = time.perf_counter()
        torch.manual_seed(derived_seed(self._seed, "step", step))
        loss = self._loss(step)
        smooth = self._smoothed(float(loss.detach()))
        if smooth is None:
            return None
        if not self._draw.held_out and step % self._interval == 0:
            self._best.offer(step, -smooth)
        self.optimiser.step(loss, step)
        self._done = step + 1
        self._times.append(time.perf_counter() - begun)
        if self._draw.held_out and (self._done % self._interval == 0 or self._done == self.steps):
            self._measure()
        return smooth

    def _loss(self, step: int) -> Tensor:
        device = self.optimiser.parameters[0].device
        generator = generator_for(self._seed, "batch", step)
        batch = to_device(self._draw.batch(self._sampler.indices(step), generator), device)
        with torch.autocast(device.type, self._autocast, enabled=self._autocast is not None):
            return self._draw.loss(self._model, batch)

    def _smoothed(self, loss: float) -> float | None:
        if not math.isfinite(loss):
            return None
        if self._first is None or self._smooth is None:
            self._first = self._smooth = loss
        else:
            self._smooth = SMOOTHING * self._smooth + (1 - SMOOTHING) * loss
        if self._smooth > DIVERGED_FACTOR * self._first + DIVERGED_MARGIN:
            return None
        return self._smooth

    def _measure(self) -> None:
        value = self._draw.evaluate(self._model, "held_out")[self._metric.name]
        self._best.offer(self._done, value if self._metric.higher_is_better else -value)
        training_mode(self._model)

    def outcome(self, ending: Ending) -> Outcome:
        """Leave the model with the weights to keep, and sum the run up."""
        if not all(bool(p.isfinite().all()) for p in self.optimiser.parameters):
            ending = "diverged"
        kept = self._done
        if self._draw.held_out or ending == "diverged":
            kept = self._best.restore()
        self._model.eval()
        return Outcome(
            ending=ending,
            steps=self._done,
            kept=kept,
            first_loss=self._first,
            last_loss=self._smooth,
            seconds=time.perf_counter() - self._started,
            step_seconds=statistics.median(self._times) if self._times else None,
        )


class _Best:
    """Copy of the trained parameters where they scored highest; at first, where they start."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._score = -math.inf
        self._keep(0)

    def offer(self, step: int, score: float) -> None:
        """Keep the parameters as they are if `score` is no worse than the best."""
        if score >= self._score:
            self._score = score
            self._keep(step)

    def restore(self) -> int:
        """Put the best values back, and give the step they are from."""
        with torch.no_grad():
            for parameter, value in zip(self._parameters, self._values, strict=True):
                parameter.copy_(value)
        return self._step

    def _keep(self, step: int) -> None:
        self._step = step
        self._values = [parameter.detach().to("cpu", copy=True) for parameter in self._parameters]
