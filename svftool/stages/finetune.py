"""Factor checkpoint + data -> tuned files, with the metric before and after each."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from svftool.attaching import Parametrisation, Regime, parse_regime
from svftool.checkpoints import Checkpoint, replace_output, write_errors
from svftool.errors import UsageError
from svftool.factors import open_factors
from svftool.models import build_model
from svftool.progress import SILENT, Progress
from svftool.stages.run_output import RunWriter, is_run_itself
from svftool.tasks.catalogue import ModelFacts, make_tasks
from svftool.training import Plan, Run, Settings, Summary, compare, pick_device, summarise

RESULTS_FILE = "results.json"


@dataclass(frozen=True)
class FinetuneResult:
    """What `finetune` did.

    Attributes
    ----------
    output : Path
        A run's own file or folder, or the folder of all runs.
    task, metric : str
        The task and its primary metric.
    runs : tuple of Run
        Every run, by seed and regime.
    summary : tuple of Summary
        Every regime over its seeds.
    interrupted : Signals or None
        The signal that cut the runs short.
    setting : mapping
        What all runs have in common, as the task describes it.
    """

    output: Path
    task: str
    metric: str
    runs: tuple[Run, ...]
    summary: tuple[Summary, ...]
    interrupted: signal.Signals | None = None
    setting: Mapping[str, Any] = field(default_factory=dict)


def finetune(
    factors: str | os.PathLike[str],
    *,
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    task: str = "classification",
    model: str = "auto",
    base: str | os.PathLike[str] | None = None,
    regimes: Sequence[str] = ("svf",),
    seeds: int | Sequence[int] = 1,
    settings: Settings | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    parametrisation: Parametrisation = "scale",
    train_rank: str | int | None = None,
    nonnegative: bool = False,
    device: str = "auto",
    log_dir: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
    **options: Any,
) -> FinetuneResult:
    """Train singular values, or another regime to compare with, on a few examples.

    Every regime starts from the same base, sees the same examples in the same order for the same
    number of steps, and is measured on the same query set, which selects nothing.

    Parameters
    ----------
    factors : path-like
        Factor checkpoint.
    data : path-like
        What to train on; see the task.
    output : path-like
        One run writes a tuned file (``NAME.svf.safetensors``); ``full`` writes a dense checkpoint
        and ``lora:r`` a PEFT folder. Several runs, or a name without a suffix, write a folder of
        these with a ``results.json``.
    task : str
        One of `svftool.tasks.catalogue.TASKS`: ``classification``, ``language`` ...
    model : str
        See `svftool.models.build_model`.
    base : path-like, optional
        Where the base is, if not at its recorded place.
    regimes : sequence of str
        Any of ``head``, ``svf``, ``bias``, ``norm``, ``svf+bias``, ``svf+norm``, ``lora:RANK`` and
        ``full``.
    seeds : int or sequence of int
        How many seeds, from 0, or which.
    settings : Settings, optional
        Budget, optimiser, schedule and precision.
    include, exclude : sequence of str
        Globs of tensor names that limit ``svf`` and ``lora`` to some layers.
    parametrisation, train_rank, nonnegative
        How ``svf`` trains singular values; see `svftool.attach`.
    device : str
        ``auto``, ``cpu``, ``cuda`` or ``cuda:INDEX``.
    log_dir : path-like, optional
        Folder for TensorBoard's curves.
    trust_remote_code : bool
        Whether code that lies beside the checkpoint may run.
    force : bool
        Replace an existing output once the new one is complete.
    progress : Progress
        Told how far the work is, and of runs that end worse than the base.
    options
        The task's own, such as ``shots`` and ``evaluation``; see
        `svftool.tasks.classification.Classification`, `svftool.tasks.language.Language` and
        `svftool.tasks.few_shot_segmentation.few_shot_tasks`.

    Returns
    -------
    FinetuneResult

    Raises
    ------
    UsageError
        If options contradict each other or the output exists.
    DataError
        If the data cannot be read or does not hold what was asked for.
    ModelError
        If the model cannot be built or does not take the weights.
    FactorsError, CheckpointError
        If factors or base are broken or do not belong together.
    ResourceError
        If memory or disk space runs out.
    """
    settings = Settings() if settings is None else settings
    chosen = _parse_regimes(regimes)
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    target = Path(output)
    with (
        open_factors(factors) as store,
        store.open_base(base, progress=progress) as checkpoint,
        replace_output(
            target, force=force, inputs=[store.path, checkpoint.path, Path(data)]
        ) as partial,
    ):
        models = _Models(model, checkpoint, trust_remote_code=trust_remote_code)
        facts = ModelFacts.of(checkpoint, models.first, trust_remote_code=trust_remote_code)
        tasks = make_tasks(task, Path(data), facts, options)
        itself = is_run_itself(target, chosen, len(chosen) * len(numbers) * len(tasks))
        plan = Plan(
            build=models.build,
            store=store,
            tasks=tasks,
            regimes=[regime.name for regime in chosen],
            seeds=numbers,
            settings=settings,
            device=pick_device(device),
            include=include,
            exclude=exclude,
            attaching={
                "parametrisation": parametrisation,
                "train_rank": train_rank,
                "nonnegative": nonnegative,
            },
            log_dir=None if log_dir is None else Path(log_dir),
        )
        if not itself:
            with write_errors(partial):
                partial.mkdir()
        writer = RunWriter(target, partial, itself, store, checkpoint, settings)
        runs, signum = compare(plan, writer, progress=progress)
        result = FinetuneResult(
            output=target,
            task=task,
            metric=tasks[0].primary.name,
            runs=tuple(runs),
            summary=tuple(summarise(runs, tasks[0].primary)),
            interrupted=signum,
            setting=_common([one.describe() for one in tasks]),
        )
        if not itself:
            _write_results(result, partial / RESULTS_FILE)
    return result


class _Models:
    """Fresh models with the base's weights; the first one is built at once, to be looked at."""

    def __init__(self, spec: str, checkpoint: Checkpoint, *, trust_remote_code: bool) -> None:
        self._spec = spec
        self._checkpoint = checkpoint
        self._trust = trust_remote_code
        self._unused: nn.Module | None = self._build()

    @property
    def first(self) -> nn.Module | None:
        """The first model, as long as nobody has taken it."""
        return self._unused

    def build(self) -> nn.Module:
        """Return a model that nobody else has."""
        model, self._unused = self._unused, None
        return self._build() if model is None else model

    def _build(self) -> nn.Module:
        return build_model(self._spec, checkpoint=self._checkpoint, trust_remote_code=self._trust)


def _parse_regimes(names: Sequence[str]) -> list[Regime]:
    regimes = [parse_regime(name) for name in names]
    twice = sorted({regime.name for regime in regimes if regimes.count(regime) > 1})
    if twice or not regimes:
        raise UsageError(f"regime {', '.join(twice) or 'missing'}: expected each once")
    return regimes


def result_fields(result: FinetuneResult) -> dict[str, Any]:
    """Give a result as plain values, for ``results.json`` and ``--json``; no NaN or infinity."""
    return {
        "task": result.task,
        "output": str(result.output),
        "setting": dict(result.setting),
        "interrupted": None if result.interrupted is None else result.interrupted.name,
        "runs": [_run_fields(run) for run in result.runs],
        "summary": [_summary_fields(summary) for summary in result.summary],
    }


def _run_fields(run: Run) -> dict[str, Any]:
    return {
        "regime": run.regime,
        "seed": run.seed,
        "shots": run.shots,
        **run.facts,
        "metrics": {"before": _finite(run.before), "after": _finite(run.after)},
        "trainable_parameters": run.trainable_parameters,
        "steps": run.outcome.steps,
        "step_seconds": run.outcome.step_seconds,
        "seconds": run.seconds,
        "peak_memory_bytes": run.peak_memory_bytes,
        "ending": run.outcome.ending,
        "kept_step": run.outcome.kept,
        "worse": run.worse,
        "output": None if run.output is None else str(run.output),
    }


def _summary_fields(summary: Summary) -> dict[str, Any]:
    return {
        "regime": summary.regime,
        "metric": summary.metric,
        "shots": summary.shots,
        **summary.facts,
        "seeds": summary.seeds,
        "before": summary.before,
        "mean": summary.mean,
        "ci95": None if summary.ci95 is None else list(summary.ci95),
        "trainable_parameters": summary.trainable_parameters,
        "step_seconds": summary.step_seconds,
        "worse": summary.worse,
    }


def _common(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first, *others = settings
    return {
        name: value
        for name, value in first.items()
        if all(other.get(name) == value for other in others)
    }


def _finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _write_results(result: FinetuneResult, path: Path) -> None:
    with write_errors(path):
        path.write_text(json.dumps(result_fields(result), indent=2) + "\n", encoding="utf-8")
