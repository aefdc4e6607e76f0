"""What ``finetune`` found, as dataclasses and as plain values for scripts."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svftool.checkpoints import write_errors
from svftool.training import Run, Summary, tuning_to_plain

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
        "learning_rates": dict(run.learning_rates),
        "tuning": None if run.tuning is None else tuning_to_plain(run.tuning),
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


def common_setting(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Give what all runs say alike of their data and rules."""
    first, *others = settings
    return {
        name: value
        for name, value in first.items()
        if all(other.get(name) == value for other in others)
    }


def _finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def write_results(result: FinetuneResult, path: Path) -> None:
    """Write ``results.json``."""
    with write_errors(path):
        path.write_text(json.dumps(result_fields(result), indent=2) + "\n", encoding="utf-8")
