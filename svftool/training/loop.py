"""One training run: from a prepared model and its trainable groups to the weights that are kept."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from svftool.choices.training import Settings
from svftool.errors import UsageError, kept_work
from svftool.machine import explain_out_of_memory
from svftool.progress import SILENT, Progress
from svftool.tasks.base import Draw, TaskMetric
from svftool.training.batches import Batches, repeatable
from svftool.training.group import ALONE, Group, Interruption
from svftool.training.optimise import Optimiser
from svftool.training.state import State, StateFile
from svftool.training.threads import suited_threads

# Curves of a run: values at steps, thinned so that a long run is no longer than a short one.


Curve = tuple[tuple[int, float], ...]
"""(step, value) pairs in ascending order of steps."""

LONGEST = 512


class RunCurves:
    """Named curves that are written while a run goes on."""

    def __init__(self) -> None:
        self._points: dict[str, list[tuple[int, float]]] = {}
        self._stride: dict[str, int] = {}

    def add(self, name: str, step: int, value: float) -> None:
        """Record a value; of a long curve every second point goes, and then every second new one.

        Examples
        --------
        >>> curves = RunCurves()
        >>> for step in range(2000):
        ...     curves.add("loss", step, 0.5)
        >>> len(curves.result()["loss"]) <= LONGEST, curves.result()["loss"][1]
        (True, (4, 0.5))
        """
        points = self._points.setdefault(name, [])
        stride = self._stride.setdefault(name, 1)
        if stride > 1 and step % stride:
            return
        points.append((step, value))
        if len(points) > LONGEST:
            self._stride[name] = 2 * stride
            points[:] = [point for point in points if point[0] % (2 * stride) == 0]

    def result(self) -> dict[str, Curve]:
        """Return the curves by name."""
        return {name: tuple(points) for name, points in self._points.items()}

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs, as plain values."""
        return {name: [self._stride[name], points] for name, points in self._points.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to a state."""
        self._stride = {name: int(stride) for name, (stride, _) in state.items()}
        self._points = {
            name: [(int(step), float(value)) for step, value in points]
            for name, (_, points) in state.items()
        }


def read_curves(value: Mapping[str, list[list[float]]]) -> dict[str, Curve]:
    """Read curves back from JSON, where pairs have become lists."""
    return {
        name: tuple((int(step), float(number)) for step, number in points)
        for name, points in value.items()
    }


# The weights that a run sets aside: those that did best so far.


class Best:
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

    @property
    def step(self) -> int:
        """The step that the best values are from."""
        return self._step

    def put_back(self) -> int:
        """Put the best values back, and give the step they are from."""
        with torch.no_grad():
            for parameter, value in zip(self._parameters, self._values, strict=True):
                parameter.copy_(value)
        return self._step

    def state(self) -> State:
        """Return what `restore` needs."""
        tensors = {str(index): value for index, value in enumerate(self._values)}
        return State(tensors, {"step": self._step, "score": self._score})

    def restore(self, state: State) -> None:
        """Go back to a state."""
        self._step, self._score = int(state.facts["step"]), float(state.facts["score"])
        self._values = [state.tensors[str(index)] for index in range(len(self._parameters))]

    def _keep(self, step: int) -> None:
        self._step = step
        self._values = [parameter.detach().to("cpu", copy=True) for parameter in self._parameters]


Ending = Literal["finished", "interrupted", "diverged", "stopped"]

SMOOTHING = 0.9
DIVERGED_FACTOR, DIVERGED_MARGIN = 2.0, 1.0
"""A run has diverged when its smoothed loss is above factor times the first one plus the margin."""

CHECKS = 10
"""Times that held-out examples are measured, or weights are set aside, in a run."""


MOST_TIMES = 1000
"""Times of steps that are kept for a run that goes on, whose median is reported."""


class Log(Protocol):
    """Where the curves of a run go."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record values at a step."""


@dataclass(frozen=True)
class Outcome:
    """What a training run came to.

    Attributes
    ----------
    ending : {"finished", "interrupted", "diverged", "stopped"}
        Why it stopped; ``stopped`` where held-out examples did no better for too long.
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
    curves : mapping of str to Curve
        ``loss`` is the smoothed training loss, ``rate`` the share of the peak learning rate, and
        ``held_out/METRIC`` what was measured on the held-out part.
    """

    ending: Ending
    steps: int
    kept: int
    first_loss: float | None
    last_loss: float | None
    seconds: float
    step_seconds: float | None
    curves: Mapping[str, Curve] = field(default_factory=dict)


def train(
    model: nn.Module,
    groups: Mapping[str, Sequence[nn.Parameter]],
    draw: Draw,
    settings: Settings,
    *,
    seed: int,
    metric: TaskMetric,
    label: str = "training",
    interruption: Interruption | None = None,
    log: Log | None = None,
    saved: StateFile | None = None,
    group: Group = ALONE,
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
    metric : TaskMetric
        Decides on held-out examples.
    label : str
        What progress is shown under.
    interruption : Interruption or None
        Asked before each step whether to stop.
    log : Log or None
        Told of the loss and the learning rates of every step, and of what was measured after it.
    saved : StateFile or None
        Where the run goes on, if it was cut short there, and where its state is kept.
    group : Group
        The processes that share each batch.

    Raises
    ------
    ResourceError
        If memory runs out; says what to lower.
    UsageError
        If the settings ask for what the draw cannot give: patience without held-out examples.
    """
    run = _Run(model, groups, draw, settings, seed=seed, metric=metric, group=group)
    device = run.optimiser.parameters[0].device
    with (
        explain_out_of_memory(settings.batch_size),
        repeatable(device),
        suited_threads(model, draw, settings.batch_size),
        progress.task(label, total=run.steps, unit="steps") as bar,
        ExitStack() as stack,
    ):
        stack.callback(run.close)
        run.start(saved)
        bar.advance(run.done)
        for step in range(run.done, run.steps):
            if run.is_stalled():
                return run.outcome("stopped")
            if run.stops(interruption):
                run.save(saved)
                return run.outcome("interrupted")
            loss = run.step()
            if loss is None:
                return run.outcome("diverged")
            bar.advance(detail=f"loss {loss:.3f}")
            if log is not None:
                log.scalars(step, {"loss": loss, **run.optimiser.rates(), **run.measured})
            if saved is not None and saved.due(run.done):
                run.save(saved)
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
        metric: TaskMetric,
        group: Group,
    ) -> None:
        self.steps = settings.step_count(draw.size)
        self.optimiser = Optimiser(groups, settings, steps=self.steps)
        self.done = 0
        self.measured: dict[str, float] = {}
        self._model, self._draw, self._metric, self._ranks = model, draw, metric, group
        self._parameters = self.optimiser.parameters
        self._batches = Batches(model, self._parameters, draw, settings, seed=seed, group=group)
        self._interval = max(1, self.steps // CHECKS)
        self._first: float | None = None
        self._smooth: float | None = None
        self._stop = False
        self._curves = RunCurves()
        self._times: list[float] = []
        self._before = 0.0
        self._started = time.perf_counter()
        group.copy_from_first(self._parameters)
        self._best = Best(self._parameters)
        self._buffers: dict[str, Tensor] = {}
        self._patience = settings.patience
        if self._patience is not None and not draw.held_out:
            raise UsageError(
                "--patience: no examples are held out to stop by. Keep some with --hold-out"
            )

    def close(self) -> None:
        """Let go of what loads batches."""
        self._batches.close()

    def is_stalled(self) -> bool:
        """Whether the held-out examples have done no better for too many measurements."""
        if self._patience is None:
            return False
        return self.done - self._best.step >= self._patience * self._interval

    def start(self, saved: StateFile | None) -> None:
        """Stand at the first step, or where the saved state stands."""
        if saved is not None:
            self._buffers = {name: one.clone() for name, one in self._model.named_buffers()}
        state = self._ranks.once(lambda: None if saved is None else saved.read())
        if saved is not None and state is not None:
            with kept_work(saved.path):
                self._restore(state)
        training_mode(self._model)

    def stops(self, interruption: Interruption | None) -> bool:
        """Whether to stop before the next step."""
        came = interruption is not None and interruption.came()
        if self._ranks.count == 1:
            return came
        # The others learn of it with the next step's loss.
        stop, self._stop = self._stop, came
        return stop

    def step(self) -> float | None:
        """Do one step and give the smoothed loss before it; None when the run has diverged."""
        begun, step, self.measured = time.perf_counter(), self.done, {}
        value, self._stop = self._batches.differentiate(
            step, self._stop, lambda loss: self.optimiser.backward(loss, step)
        )
        smooth = self._smoothed(value)
        if smooth is None:
            return None
        if not self._draw.held_out and step % self._interval == 0:
            self._best.offer(step, -smooth)
        self.optimiser.update(step, self._ranks)
        self.done = step + 1
        self._times.append(time.perf_counter() - begun)
        self._curves.add("loss", step, smooth)
        self._curves.add("rate", step, self.optimiser.factor(step))
        if self._draw.held_out and (self.done % self._interval == 0 or self.done == self.steps):
            self._measure()
        return smooth

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
        name = self._metric.name
        value = self._ranks.measure(self._draw, self._model, "held_out")[name]
        self._best.offer(self.done, value if self._metric.higher_is_better else -value)
        self._curves.add(f"held_out/{name}", self.done, value)
        self.measured = {f"held_out/{name}": value}
        training_mode(self._model)

    def save(self, saved: StateFile | None) -> None:
        """Keep the run's state on disk, in the first process."""
        if saved is not None and self._ranks.first:
            saved.write(self._state())

    def _state(self) -> State:
        best, optimiser = self._best.state(), self.optimiser.state()
        now = dict(self._model.named_buffers())
        changed = {
            name: now[name]
            for name, before in self._buffers.items()
            if name in now and not torch.equal(before, now[name])
        }
        parts = {
            "parameter": {str(index): one for index, one in enumerate(self._parameters)},
            "best": best.tensors,
            "optimiser": optimiser.tensors,
            "buffer": changed,
        }
        facts = {
            "done": self.done,
            "first": self._first,
            "smooth": self._smooth,
            "best": best.facts,
            "optimiser": optimiser.facts,
            "curves": self._curves.state(),
            "times": self._times[-MOST_TIMES:],
            "seconds": self._seconds(),
        }
        named = {f"{k}.{name}": value for k, part in parts.items() for name, value in part.items()}
        return State(named, facts)

    @torch.no_grad()
    def _restore(self, state: State) -> None:
        facts = state.facts
        self.done, self._first, self._smooth = facts["done"], facts["first"], facts["smooth"]
        self._times, self._before = list(facts["times"]), facts["seconds"]
        self._curves.restore(facts["curves"])
        self._best.restore(State(state.part("best"), facts["best"]))
        self.optimiser.restore(State(state.part("optimiser"), facts["optimiser"]))
        for name, value in state.part("parameter").items():
            self._parameters[int(name)].copy_(value)
        for name, value in state.part("buffer").items():
            self._model.get_buffer(name).copy_(value)

    def _seconds(self) -> float:
        return self._before + time.perf_counter() - self._started

    def outcome(self, ending: Ending) -> Outcome:
        """Leave the model with the weights to keep, and sum the run up."""
        if not all(bool(p.isfinite().all()) for p in self._parameters):
            ending = "diverged"
        kept = self.done
        if self._draw.held_out or ending == "diverged":
            kept = self._best.put_back()
        self._model.eval()
        return Outcome(
            ending=ending,
            steps=self.done,
            kept=kept,
            first_loss=self._first,
            last_loss=self._smooth,
            seconds=self._seconds(),
            step_seconds=statistics.median(self._times) if self._times else None,
            curves=self._curves.result(),
        )
