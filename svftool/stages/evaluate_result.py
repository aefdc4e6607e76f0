"""What ``evaluate`` found, as dataclasses and as plain values for scripts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svftool.stages.settings import SourcedSetting


@dataclass(frozen=True)
class Evaluation:
    """One evaluation.

    Attributes
    ----------
    seed : int
        What chose the examples that were left out, or the episodes.
    shots : int or None
        Examples a class that were left out; supports of an episode in few-shot segmentation.
    facts : mapping of str to int
        What tells it from the others, such as its fold.
    metrics : mapping of str to float
        By name.
    seconds : float
        Wall time, from building the model to measuring it.
    """

    seed: int
    shots: int | None
    facts: Mapping[str, int]
    metrics: Mapping[str, float]
    seconds: float


@dataclass(frozen=True)
class EvaluateResult:
    """What `evaluate` found.

    Attributes
    ----------
    checkpoint : Path
        The dense checkpoint or the factors.
    tuned : Path or None
        The tuned file.
    task, metric : str
        The task and its primary metric.
    runs : tuple of Evaluation
        One, or one a fold.
    setting : mapping
        What the first task says of its data and its rules.
    settings : mapping of str to SourcedSetting
        What the numbers depend on, and where each came from.
    seen : int or None
        Examples that the weights were trained on, of those measured; None where that is not known.
    predictions, pictures : Path or None
        Where predictions were written, and the pictures that belong to them.
    """

    checkpoint: Path
    tuned: Path | None
    task: str
    metric: str
    runs: tuple[Evaluation, ...]
    setting: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, SourcedSetting] = field(default_factory=dict)
    seen: int | None = None
    predictions: Path | None = None
    pictures: Path | None = None


def settings_fields(settings: Mapping[str, SourcedSetting]) -> dict[str, dict[str, Any]]:
    """Return settings as plain values for scripts."""
    return {name: {"value": one.value, "source": one.source} for name, one in settings.items()}


def result_fields(result: EvaluateResult) -> dict[str, Any]:
    """Return a result as plain values for scripts; no NaN or infinity."""
    return {
        "task": result.task,
        "checkpoint": str(result.checkpoint),
        "tuned": None if result.tuned is None else str(result.tuned),
        "metric": result.metric,
        "setting": dict(result.setting),
        "settings": settings_fields(result.settings),
        "seen_in_training": result.seen,
        "runs": [
            {
                "seed": run.seed,
                "shots": run.shots,
                **run.facts,
                "metrics": {
                    name: value if math.isfinite(value) else None
                    for name, value in run.metrics.items()
                },
                "seconds": run.seconds,
            }
            for run in result.runs
        ],
        "predictions": None if result.predictions is None else str(result.predictions),
        "pictures": None if result.pictures is None else str(result.pictures),
    }
