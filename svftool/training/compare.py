"""Regimes side by side over seeds: the same data, schedule, budget and selection for all."""

from __future__ import annotations

import gc
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svftool.attaching import Trainable, apply_regime, parse_regime, weight_gradients
from svftool.choices.acting import acting
from svftool.errors import agreeing, counted
from svftool.factors.stated import Support
from svftool.machine import explain_out_of_memory, peak_memory, reset_peak_memory
from svftool.progress import SILENT, Progress
from svftool.tasks.base import (
    Draw,
    HasContents,
    Illustrated,
    Prepared,
    Sized,
    Task,
    TaskMetric,
)
from svftool.training.batches import derived_seed, repeatable, support_losses
from svftool.training.group import ALONE, Group, Interruption
from svftool.training.kept import Safeguard
from svftool.training.loop import Outcome
from svftool.training.plan import Run, TrainingPlan, file_stem
from svftool.training.safeguard import Guard, suited_head_rate, train_guarded
from svftool.training.threads import suited_threads
from svftool.training.trackers import Logbook, Trackers
from svftool.training.trials import Tuning
from svftool.training.tune import Tuner
from svftool.training.workspace import Journal

Save = Callable[[Run, Trainable, Task], Path]


def compare(
    plan: TrainingPlan,
    save: Save,
    *,
    journal: Journal | None = None,
    group: Group = ALONE,
    progress: Progress = SILENT,
) -> tuple[list[Run], signal.Signals | None]:
    """Train every regime with every seed.

    Seeds are the outer loop and regimes the inner one, so that regimes can be compared pair by
    pair however far it came.

    Parameters
    ----------
    plan : TrainingPlan
        What to run.
    save : callable
        Writes what a run trained, and says where; called once a run, in the first process.
    journal : Journal or None
        Where the comparison goes on, if it was cut short, and where it is kept.
    group : Group
        The processes that train together.
    progress : Progress
        Told how far each run is, and of runs that went wrong.

    Returns
    -------
    tuple of list of Run and Signals or None
        The runs, and the signal that cut them short. Interrupted before its first step ends,
        nothing is worth keeping and the signal is raised instead.
    """
    with Interruption(patient=group.count > 1) as interruption, _quick_collections():
        comparison = _Comparison(plan, save, journal, group, interruption, progress)
        for seed in plan.seeds:
            for task in plan.tasks:
                comparison.run_seed(task, seed)
    if not comparison.stopped:
        return comparison.runs, None
    signum = interruption.signum or signal.SIGTERM
    if not comparison.runs:
        signal.raise_signal(signum)
    return comparison.runs, signal.Signals(signum)


@contextmanager
def _quick_collections() -> Iterator[None]:
    """Context in which the garbage collector looks at what is made in it alone.

    A whole collection takes a quarter of a second where transformers is imported.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()


class _Comparison:
    """The runs so far, and what each of them needs."""

    def __init__(
        self,
        plan: TrainingPlan,
        save: Save,
        journal: Journal | None,
        group: Group,
        interruption: Interruption,
        progress: Progress,
    ) -> None:
        self.runs: list[Run] = []
        self.stopped = False
        self._said: set[str] = set()
        self._plan = plan
        self._save = save
        self._journal = journal
        self._ranks = group
        self._interruption = interruption
        self._progress = progress
        self._company = (journal, group, interruption, progress)

    def run_seed(self, task: Task, seed: int) -> None:
        """Train every regime on a task's draw of a seed, unless interrupted."""
        with self._products():
            self._run_seed(task, seed)

    def _products(self) -> AbstractContextManager[None]:
        """Context in which what is frozen in bfloat16 meets what is trained in float32."""
        if self._plan.settings.dtype == "float32":
            return nullcontext()
        # Without a cache: the weights change while the context lasts.
        kind = self._plan.device.type
        return torch.autocast(kind, torch.bfloat16, cache_enabled=False)

    def _run_seed(self, task: Task, seed: int) -> None:
        finished = self._ranks.once(lambda: self._finished(task, seed))
        before = next((dict(run.before) for run in finished.values()), None)
        draw = self._ranks.together(lambda: task.draw(seed))
        support = self._ranks.once(lambda: self._look(draw, task, seed))
        for regime in self._plan.regimes:
            if regime in finished:
                self.runs.append(finished[regime])
                continue
            if self._interrupted():
                return
            before = self._run_regime(task, draw, regime, seed, before, support)
            if self.stopped:
                return

    def _run_regime(
        self,
        task: Task,
        draw: Draw,
        regime: str,
        seed: int,
        before: dict[str, float] | None,
        support: Mapping[str, Any],
    ) -> dict[str, float] | None:
        """Choose rates and share, train and measure; return what the start measured."""
        tuning = self._tune(task, draw, regime, seed)
        if self.stopped:
            return before
        safeguard = self._judge(task, draw, regime, seed, tuning)
        if self._interrupted():
            return before
        with explain_out_of_memory(self._plan.settings.batch_size):
            prepared = self._prepare(draw)
            self._tell(prepared.said)
            with suited_threads(prepared.model, draw, self._plan.settings.batch_size):
                if before is None:
                    before = self._measure(draw, prepared.model)
                    stem = file_stem("before", seed, task.shots, task.facts)
                    self._illustrate(draw, prepared.model, stem)
                self._run(task, draw, prepared, regime, seed, before, tuning, safeguard, support)
        return before

    def _look(self, draw: Draw, task: Task, seed: int) -> dict[str, Any]:
        """Note the bytes of what is trained on; say where it is measured on too."""
        if not isinstance(draw, HasContents):
            return {}
        support = Support.of(draw.contents("support"))
        seen = support.count(draw.contents("query"))
        if seen:
            among = draw.measured if isinstance(draw, Sized) else None
            found = counted(seen, "examples", of=among)
            where = "".join(f", {name} {number}" for name, number in task.facts.items())
            self._progress.warn(
                f"seed {seed}{where}: {found} that measure the result {agreeing(seen, 'are')} also "
                "trained on, byte for byte; what is measured on them is no result. Remove them "
                "from one side"
            )
        return support.to_plain()

    def _finished(self, task: Task, seed: int) -> dict[str, Run]:
        """Return the runs of a task's seed that an interrupted process finished, by regime."""
        if self._journal is None:
            return {}
        found = {
            regime: self._journal.finished(file_stem(regime, seed, task.shots, task.facts))
            for regime in self._plan.regimes
        }
        return {regime: run for regime, run in found.items() if run is not None}

    def _interrupted(self) -> bool:
        self.stopped = self.stopped or self._ranks.any(self._interruption.came())
        return self.stopped

    def _prepare(self, draw: Draw) -> Prepared:
        # Hooks refer to their models: those of runs before would stay until Python finds the cycle.
        gc.collect()
        prepared = self._ranks.together(
            lambda: draw.prepare(self._plan.build().to(self._plan.device))
        )
        for module in prepared.beside:
            self._ranks.copy_from_first(list(module.state_dict().values()))
        return prepared

    def _measure(self, draw: Draw, model: nn.Module) -> dict[str, float]:
        return self._ranks.measure(draw, model, progress=self._progress)

    def _illustrate(self, draw: Draw, model: nn.Module, name: str) -> None:
        if isinstance(draw, Illustrated):
            self._ranks.once(lambda: draw.illustrate(model, name))

    def _run(
        self,
        task: Task,
        draw: Draw,
        prepared: Prepared,
        regime: str,
        seed: int,
        before: Mapping[str, float],
        tuning: Tuning | None,
        safeguard: Safeguard | None,
        support: Mapping[str, Any],
    ) -> None:
        plan, begun, metric = self._plan, time.perf_counter(), task.primary
        stem = file_stem(regime, seed, task.shots, task.facts)
        label = _label(task, regime, seed)
        reset_peak_memory(plan.device)
        trainable = self._free(prepared, draw, regime, seed)
        self._say_absent(trainable)
        model = trainable.model
        settings = replace(plan.settings.of_regime(regime), head_scale=prepared.head_rate)
        if safeguard is not None and prepared.new_head:
            steps = settings.step_count(draw.size)
            settings = suited_head_rate(settings, trainable.groups, steps)
        settings = settings if tuning is None else settings.scaled(tuning.factor)
        with self._logbook(task, stem, regime, seed) as log:
            log.scalars(0, _on_query(before))
            outcome = train_guarded(
                safeguard,
                model,
                trainable.groups,
                draw,
                settings,
                seed=seed,
                metric=metric,
                label=label,
                interruption=self._interruption,
                log=log,
                saved=None if self._journal is None else self._journal.state_of(stem),
                group=self._ranks,
                progress=self._progress,
            )
            if self._gave_up(outcome):
                return
            # What was not trained is the base: another measurement would only round otherwise.
            untouched = safeguard is not None and safeguard.kept == "start"
            after = dict(before) if untouched else self._measure(draw, model)
            self._illustrate(draw, model, stem)
            log.scalars(outcome.steps, _on_query(after))
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
            worse=metric.name in after and metric.better(before[metric.name], after[metric.name]),
            setting={**task.describe(), **prepared.facts},
            learning_rates={kind: settings.learning_rate(kind) for kind in trainable.groups},
            tuning=tuning,
            safeguard=safeguard,
            support=support,
        )
        self._warn(run, label, metric)
        self.runs.append(self._ranks.once(lambda: self._write(run, trainable, task)))

    def _logbook(self, task: Task, stem: str, regime: str, seed: int) -> Logbook:
        """Begin the run in the trackers that were asked for, in the first process."""
        facts = {"task": task.name, "regime": regime, "seed": seed, **task.facts}
        facts |= asdict(self._plan.settings.of_regime(regime)) | task.describe()
        del facts["lr_of"]
        trackers = self._plan.trackers if self._ranks.first else Trackers()
        return trackers.open(stem, facts)

    def _tune(self, task: Task, draw: Draw, regime: str, seed: int) -> Tuning | None:
        """Choose the run's learning rates, if asked to; an interruption stops it all."""
        if not self._plan.settings.tune_lr:
            return None
        tuner = Tuner(self._plan.settings.of_regime(regime), task.primary, *self._company)
        tuning = tuner.tune(
            draw,
            lambda fold: self._free(self._prepare(fold), fold, regime, seed),
            seed=seed,
            name=file_stem(regime, seed, task.shots, task.facts),
            label=_label(task, regime, seed),
        )
        self.stopped = tuning is None
        return tuning

    def _judge(
        self, task: Task, draw: Draw, regime: str, seed: int, tuning: Tuning | None
    ) -> Safeguard | None:
        """Decide how much of the run's training is kept; an interruption stops it all."""
        settings = self._plan.settings.of_regime(regime)
        settings = settings if tuning is None else settings.scaled(tuning.factor)
        guard = Guard(settings, task.primary, *self._company)
        if not guard.watches(draw):
            return None
        found = guard.judge(
            draw,
            lambda fold: self._fresh(fold, regime, seed),
            seed=seed,
            name=file_stem(regime, seed, task.shots, task.facts),
            label=_label(task, regime, seed),
        )
        self.stopped = found is None
        return found

    def _fresh(self, fold: Draw, regime: str, seed: int) -> tuple[Trainable, bool]:
        """Attach the regime to a fresh model for a fold; say whether its head is new."""
        prepared = self._prepare(fold)
        return self._free(prepared, fold, regime, seed), prepared.new_head

    def _free(self, prepared: Prepared, draw: Draw, regime: str, seed: int) -> Trainable:
        slopes = self._ranks.together(lambda: self._slopes(prepared, draw, regime, seed))
        # All processes choose by the same bits.
        self._ranks.copy_from_first(list(slopes.values()))
        return self._ranks.together(lambda: self._attached(prepared, regime, seed, slopes))

    def _slopes(self, prepared: Prepared, draw: Draw, regime: str, seed: int) -> dict[str, Tensor]:
        """Return the gradient by which a regime chooses entries; empty where it does not."""
        plan, spectral = self._plan, parse_regime(regime).spectral
        if spectral is None or spectral.entries is None or spectral.choice != "gradient":
            return {}
        model = prepared.model.eval()
        with repeatable(plan.device):
            return weight_gradients(
                model,
                plan.store,
                support_losses(draw, model, plan.device, plan.settings.batch_size, seed),
                include=plan.include or prepared.layers,
                exclude=plan.exclude,
                head=prepared.head,
            )

    def _attached(
        self, prepared: Prepared, regime: str, seed: int, slopes: Mapping[str, Tensor]
    ) -> Trainable:
        plan = self._plan
        options = acting(parse_regime(regime), plan.attaching)
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
                seed=seed,
                gradients=slopes,
                **options,
            )
            for parameter in chain(*trainable.groups.values()):
                if parameter.dtype.itemsize < 4:
                    parameter.data = parameter.data.float()
            return trainable

    def _tell(self, messages: Sequence[str]) -> None:
        """Say each message once."""
        for message in messages:
            if message not in self._said:
                self._said.add(message)
                self._progress.warn(message)

    def _say_absent(self, trainable: Trainable) -> None:
        """Say once a regime how large it is, and what it names and the model does not have."""
        name = trainable.regime.name
        if trainable.said and trainable.said not in self._said:
            self._said.add(trainable.said)
            self._progress.note(trainable.said)
        if trainable.absent and name not in self._said:
            self._said.add(name)
            parts = " and ".join(f"{part} parameters" for part in trainable.absent)
            self._progress.warn(
                f"{name}: the model has no {parts} outside its head; trained: "
                f"{' and '.join(trainable.groups).replace('_', ' ')}"
            )

    def _gave_up(self, outcome: Outcome) -> bool:
        """Whether nothing was trained when the signal came."""
        if outcome.ending != "interrupted":
            return False
        self.stopped = True
        if outcome.steps == 0:
            return True
        self._progress.note(
            f"interrupted after {counted(outcome.steps, 'steps')}: measuring and saving what was "
            "trained; interrupt again to give it up"
        )
        return False

    def _write(self, run: Run, trainable: Trainable, task: Task) -> Run:
        run = replace(run, output=self._save(run, trainable, task))
        if self._journal is not None and run.outcome.ending != "interrupted":
            self._journal.finish(run)
        return run

    def _warn(self, run: Run, label: str, metric: TaskMetric) -> None:
        if run.outcome.ending == "diverged":
            self._progress.warn(
                f"{label}: the loss diverged after {counted(run.outcome.steps, 'steps')}; the "
                f"weights of step {run.outcome.kept} are kept. Lower --lr"
            )
        if run.worse:
            self._progress.warn(
                f"{label}: this tune is worse than the base: {metric.name} "
                f"{run.before[metric.name]:.4f} -> {run.after[metric.name]:.4f}"
            )


def _on_query(metrics: Mapping[str, float]) -> dict[str, float]:
    """Name metrics for the trackers."""
    return {f"query/{name}": value for name, value in metrics.items()}


def _label(task: Task, regime: str, seed: int) -> str:
    """Name a run in messages."""
    return ", ".join([regime, f"seed {seed}", *(f"{k} {v}" for k, v in task.facts.items())])
