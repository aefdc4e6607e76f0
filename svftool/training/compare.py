"""Regimes side by side over seeds: the same data, schedule, budget and selection for all."""

from __future__ import annotations

import signal
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

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
    tasks : sequence of Task
        Data, loss and metrics; several of one kind, such as the folds of a data set, are trained
        one after the other.
    regimes : sequence of str
        What is trained, such as ``svf`` or ``lora:8``.
    seeds : sequence of int
        Each draws a support set and repeats every regime on it.
    settings : Settings
        Budget, optimiser, schedule and precision.
    device : torch.device
        Where to train.
    include, exclude : sequence of str
        Globs of the tensors whose singular values or LoRA adapters are trained; the task's own
        choice where none is included.
    attaching : mapping
        Further arguments of `svftool.attach`, such as ``parametrisation``.
    log_dir : Path or None
        Folder for TensorBoard.
    """

    build: Callable[[], nn.Module]
    store: FactorStore
    tasks: Sequence[Task]
    regimes: Sequence[str]
    seeds: Sequence[int]
    settings: Settings
    device: torch.device
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    attaching: Mapping[str, Any] = field(default_factory=dict)
    log_dir: Path | None = None


@dataclass(frozen=True)
class Run:
    """One regime trained with one seed.

    Attributes
    ----------
    regime, seed, shots
        What was trained, on which draw of how many examples a class.
    facts : mapping of str to int
        What tells its task from the others, such as the fold.
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
    facts: Mapping[str, int]
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
    shots : int or None
        Examples a class.
    facts : mapping of str to int or None
        What tells its task from the others; None stands for the mean over all of them.
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
    shots: int | None
    facts: Mapping[str, int | None]
    seeds: int
    before: float
    mean: float
    ci95: tuple[float, float] | None
    trainable_parameters: int
    step_seconds: float | None
    worse: bool


Save = Callable[[Run, Trainable, Task], Path]


def compare(
    plan: Plan, save: Save, *, progress: Progress = SILENT
) -> tuple[list[Run], signal.Signals | None]:
    """Train every regime with every seed.

    Seeds are the outer loop and regimes the inner one, so that regimes can be compared pair by
    pair however far it came.

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
            for task in plan.tasks:
                comparison.run_seed(task, seed)
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

    def run_seed(self, task: Task, seed: int) -> None:
        """Train every regime on a task's draw of a seed, unless interrupted."""
        if self._interruption.came():
            return
        draw = task.draw(seed)
        before: dict[str, float] | None = None
        for regime in self._plan.regimes:
            if self._interruption.came():
                return
            with explain_out_of_memory(self._plan.settings.batch_size):
                prepared = draw.prepare(self._plan.build().to(self._plan.device))
                if before is None:
                    before = draw.evaluate(prepared.model, progress=self._progress)
                self._run(task, draw, prepared, regime, seed, before)

    def _run(
        self,
        task: Task,
        draw: Draw,
        prepared: Prepared,
        regime: str,
        seed: int,
        before: dict[str, float],
    ) -> None:
        plan, begun, metric = self._plan, time.perf_counter(), task.primary
        stem = file_stem(regime, seed, task.shots, task.facts)
        label = ", ".join([regime, f"seed {seed}", *(f"{k} {v}" for k, v in task.facts.items())])
        reset_peak_memory(plan.device)
        with repeatable(plan.device):
            # LoRA draws its start from the global generator.
            torch.manual_seed(derived_seed(seed, "start"))
            trainable = apply_regime(
                prepared.model,
                regime,
                plan.store,
                head=prepared.head,
                include=plan.include or prepared.layers,
                exclude=plan.exclude,
                **plan.attaching,
            )
        model = trainable.model
        with Logbook(plan.log_dir, stem) as log:
            outcome = train(
                model,
                trainable.groups,
                draw,
                plan.settings,
                seed=seed,
                metric=metric,
                label=label,
                interruption=self._interruption,
                log=log,
                progress=self._progress,
            )
            if outcome.steps == 0 and outcome.ending == "interrupted":
                return
            if outcome.ending == "interrupted":
                self._progress.note(
                    f"interrupted after {outcome.steps} steps: measuring and saving what was "
                    "trained; interrupt again to give it up"
                )
            after = draw.evaluate(model, progress=self._progress)
            log.scalars(outcome.steps, {f"query/{name}": value for name, value in after.items()})
        run = Run(
            regime=regime,
            seed=seed,
            shots=task.shots,
            facts=dict(task.facts),
            before=before,
            after=after,
            trainable_parameters=trainable.trainable_parameters,
            outcome=outcome,
            seconds=time.perf_counter() - begun,
            peak_memory_bytes=peak_memory(plan.device),
            worse=metric.better(before[metric.name], after[metric.name]),
        )
        self._warn(run, label, metric)
        self.runs.append(replace(run, output=self._save(run, trainable, task)))

    def _warn(self, run: Run, label: str, metric: Metric) -> None:
        if run.outcome.ending == "diverged":
            self._progress.warn(
                f"{label}: the loss diverged after {run.outcome.steps} steps; the weights of step "
                f"{run.outcome.kept} are kept. Lower --lr"
            )
        if run.worse:
            self._progress.warn(
                f"{label}: this tune is worse than the base: {metric.name} "
                f"{run.before[metric.name]:.4f} -> {run.after[metric.name]:.4f}"
            )


def file_stem(
    regime: str, seed: int, shots: int | None = None, facts: Mapping[str, int] | None = None
) -> str:
    """Name of a run, and of its files.

    Examples
    --------
    >>> file_stem("lora:8", 0), file_stem("svf", 1, 5, {"fold": 3})
    ('lora-8-seed0', 'fold3-5shot-svf-seed1')
    """
    parts = [f"{name}{value}" for name, value in (facts or {}).items()]
    if parts:
        parts.append(f"{shots}shot")
    return "-".join([*parts, regime.replace(":", "-"), f"seed{seed}"])


def summarise(runs: Sequence[Run], metric: Metric) -> list[Summary]:
    """Sum up the runs of each task and regime, in the order in which they came.

    Where there are several tasks of the same shots, such as folds, the mean over them follows: its
    interval is that of the seeds' means, over the seeds that went through all tasks.
    """
    whole = [run for run in runs if run.outcome.ending != "interrupted"] or list(runs)
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in whole:
        groups.setdefault((run.shots, run.regime, tuple(run.facts.items())), []).append(run)
    summaries = [_summary(group, metric, group[0].facts) for group in groups.values()]
    for shots, regime in dict.fromkeys((shots, regime) for shots, regime, _ in groups):
        tasks = {facts for s, r, facts in groups if (s, r) == (shots, regime)}
        if len(tasks) > 1:
            chosen = [run for run in whole if (run.shots, run.regime) == (shots, regime)]
            seeds = [run.seed for run in chosen]
            complete = [run for run in chosen if seeds.count(run.seed) == len(tasks)]
            if complete:
                summaries.append(_summary(complete, metric, dict.fromkeys(complete[0].facts)))
    return summaries


def _summary(whole: Sequence[Run], metric: Metric, facts: Mapping[str, int | None]) -> Summary:
    by_seed: dict[int, list[float]] = {}
    for run in whole:
        by_seed.setdefault(run.seed, []).append(run.after[metric.name])
    values = [statistics.fmean(ends) for ends in by_seed.values()]
    before = statistics.fmean(run.before[metric.name] for run in whole)
    mean = statistics.fmean(values)
    times = [run.outcome.step_seconds for run in whole if run.outcome.step_seconds is not None]
    return Summary(
        regime=whole[0].regime,
        metric=metric.name,
        shots=whole[0].shots,
        facts=facts,
        seeds=len(values),
        before=before,
        mean=mean,
        ci95=interval(values),
        trainable_parameters=whole[0].trainable_parameters,
        step_seconds=statistics.median(times) if times else None,
        worse=metric.better(before, mean),
    )
