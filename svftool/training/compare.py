"""Regimes side by side over seeds: the same data, schedule, budget and selection for all."""

from __future__ import annotations

import signal
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from svftool.attaching import Trainable, apply_regime
from svftool.factors import FactorStore
from svftool.progress import SILENT, Progress
from svftool.tasks import Draw, Metric, Prepared, Task
from svftool.training.interrupt import Interruption
from svftool.training.logbook import Logbook
from svftool.training.loop import Outcome, train
from svftool.training.memory import explain_out_of_memory, peak_memory, reset_peak_memory
from svftool.training.randomness import derived_seed, repeatable
from svftool.training.settings import Settings
from svftool.training.summary import interval


@dataclass(frozen=True)
class Plan:
    """What a comparison runs.

    Attributes
    ----------
    build : callable
        Gives a fresh model with the base's weights, on the CPU.
    store : FactorStore
        Factors of the base.
    task : Task
        Data, loss and metrics.
    regimes : sequence of str
        What is trained, such as ``svf`` or ``lora:8``.
    seeds : sequence of int
        Each draws a support set and repeats every regime on it.
    settings : Settings
        Budget, optimiser, schedule and precision.
    device : torch.device
        Where to train.
    include, exclude : sequence of str
        Globs of the tensors whose singular values or LoRA adapters are trained.
    log_dir : Path or None
        Folder for TensorBoard.
    """

    build: Callable[[], nn.Module]
    store: FactorStore
    task: Task
    regimes: Sequence[str]
    seeds: Sequence[int]
    settings: Settings
    device: torch.device
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    log_dir: Path | None = None


@dataclass(frozen=True)
class Run:
    """One regime trained with one seed.

    Attributes
    ----------
    regime, seed, shots
        What was trained, on which draw of how many examples a class.
    before, after : mapping of str to float
        Metrics on the query set; before training with the head that training starts from.
    trainable_parameters : int
        Numbers that training could change.
    outcome : Outcome
        What became of the training loop.
    seconds : float
        Wall time, from building the model to measuring it.
    peak_memory_bytes : int or None
        See `svftool.training.memory.peak_memory`.
    worse : bool
        The primary metric got worse.
    output : Path or None
        Where the result was written.
    """

    regime: str
    seed: int
    shots: int | None
    before: Mapping[str, float]
    after: Mapping[str, float]
    trainable_parameters: int
    outcome: Outcome
    seconds: float
    peak_memory_bytes: int | None
    worse: bool
    output: Path | None = None


@dataclass(frozen=True)
class Summary:
    """One regime over its seeds.

    Attributes
    ----------
    regime, metric : str
        The regime, and the task's primary metric.
    seeds : int
        Runs that count: those that were not interrupted, unless all were.
    before, mean : float
        Mean of the metric over the runs, before and after.
    ci95 : tuple of float or None
        95 % interval of `mean`; None for one run.
    trainable_parameters : int
        Numbers that training could change.
    step_seconds : float or None
        Median over the runs of a step's wall time.
    worse : bool
        `mean` is worse than `before`.
    """

    regime: str
    metric: str
    seeds: int
    before: float
    mean: float
    ci95: tuple[float, float] | None
    trainable_parameters: int
    step_seconds: float | None
    worse: bool


Save = Callable[[Run, Trainable], Path]


def compare(
    plan: Plan, save: Save, *, progress: Progress = SILENT
) -> tuple[list[Run], signal.Signals | None]:
    """Train every regime with every seed.

    Seeds are the outer loop, so that regimes can be compared pair by pair however far it came.

    Parameters
    ----------
    plan : Plan
        What to run.
    save : callable
        Writes what a run trained, and says where; called once a run.
    progress : Progress
        Told how far each run is, and of runs that went wrong.

    Returns
    -------
    tuple of list of Run and Signals or None
        The runs, and the signal that cut them short. Interrupted before its first step ends,
        nothing is worth keeping and the signal is raised instead.
    """
    with Interruption() as interruption:
        comparison = _Comparison(plan, save, interruption, progress)
        for seed in plan.seeds:
            comparison.run_seed(seed)
    if interruption.signum is None:
        return comparison.runs, None
    if not comparison.runs:
        signal.raise_signal(interruption.signum)
    return comparison.runs, signal.Signals(interruption.signum)


class _Comparison:
    """The runs so far, and what each of them needs."""

    def __init__(
        self, plan: Plan, save: Save, interruption: Interruption, progress: Progress
    ) -> None:
        self.runs: list[Run] = []
        self._plan = plan
        self._save = save
        self._interruption = interruption
        self._progress = progress

    def run_seed(self, seed: int) -> None:
        """Train every regime on the draw of a seed, unless interrupted."""
        if self._interruption.came():
            return
        draw = self._plan.task.draw(seed)
        before: dict[str, float] | None = None
        for regime in self._plan.regimes:
            if self._interruption.came():
                return
            with explain_out_of_memory(self._plan.settings.batch_size):
                prepared = draw.prepare(self._plan.build().to(self._plan.device))
                if before is None:
                    before = draw.evaluate(prepared.model, progress=self._progress)
                self._run(draw, prepared, regime, seed, before)

    def _run(
        self, draw: Draw, prepared: Prepared, regime: str, seed: int, before: dict[str, float]
    ) -> None:
        plan, begun = self._plan, time.perf_counter()
        reset_peak_memory(plan.device)
        with repeatable(plan.device):
            # LoRA draws its start from the global generator.
            torch.manual_seed(derived_seed(seed, "start"))
            trainable = apply_regime(
                prepared.model,
                regime,
                plan.store,
                head=prepared.head,
                include=plan.include,
                exclude=plan.exclude,
            )
        model = trainable.model
        with Logbook(plan.log_dir, file_stem(regime, seed)) as log:
            outcome = train(
                model,
                trainable.groups,
                draw,
                plan.settings,
                seed=seed,
                metric=plan.task.primary,
                label=f"{regime}, seed {seed}",
                interruption=self._interruption,
                log=log,
                progress=self._progress,
            )
            if outcome.steps == 0 and outcome.ending == "interrupted":
                return
            after = draw.evaluate(model, progress=self._progress)
            log.scalars(outcome.steps, {f"query/{name}": value for name, value in after.items()})
        metric = plan.task.primary
        run = Run(
            regime=regime,
            seed=seed,
            shots=plan.task.shots,
            before=before,
            after=after,
            trainable_parameters=trainable.trainable_parameters,
            outcome=outcome,
            seconds=time.perf_counter() - begun,
            peak_memory_bytes=peak_memory(plan.device),
            worse=metric.better(before[metric.name], after[metric.name]),
        )
        self._warn(run, metric)
        self.runs.append(replace(run, output=self._save(run, trainable)))

    def _warn(self, run: Run, metric: Metric) -> None:
        name = f"{run.regime}, seed {run.seed}"
        if run.outcome.ending == "diverged":
            self._progress.warn(
                f"{name}: the loss diverged after {run.outcome.steps} steps; the weights of step "
                f"{run.outcome.kept} are kept. Lower --lr"
            )
        if run.worse:
            self._progress.warn(
                f"{name}: this tune is worse than the base: {metric.name} "
                f"{run.before[metric.name]:.4f} -> {run.after[metric.name]:.4f}"
            )


def file_stem(regime: str, seed: int) -> str:
    """Name of a run's files.

    Examples
    --------
    >>> file_stem("lora:8", 0)
    'lora-8-seed0'
    """
    return f"{regime.replace(':', '-')}-seed{seed}"


def summarise(runs: Sequence[Run], metric: Metric) -> list[Summary]:
    """Sum up the runs of each regime, in the order in which the regimes came."""
    return [
        _summary([run for run in runs if run.regime == regime], metric)
        for regime in dict.fromkeys(run.regime for run in runs)
    ]


def _summary(runs: Sequence[Run], metric: Metric) -> Summary:
    whole = [run for run in runs if run.outcome.ending != "interrupted"] or list(runs)
    values = [run.after[metric.name] for run in whole]
    before = statistics.fmean(run.before[metric.name] for run in whole)
    mean = statistics.fmean(values)
    times = [run.outcome.step_seconds for run in whole if run.outcome.step_seconds is not None]
    return Summary(
        regime=whole[0].regime,
        metric=metric.name,
        seeds=len(whole),
        before=before,
        mean=mean,
        ci95=interval(values),
        trainable_parameters=whole[0].trainable_parameters,
        step_seconds=statistics.median(times) if times else None,
        worse=metric.better(before, mean),
    )
