"""Kinds of data behind one small protocol: what is trained on, its loss and its metrics."""

from svftool.tasks.base import (
    Counts,
    Draw,
    Folds,
    Metric,
    Part,
    Predicts,
    Prepared,
    Task,
    to_device,
)

__all__ = ["Counts", "Draw", "Folds", "Metric", "Part", "Predicts", "Prepared", "Task", "to_device"]
