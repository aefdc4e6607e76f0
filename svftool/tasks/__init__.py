"""Kinds of data behind one small protocol: what is trained on, its loss and its metrics."""

from svftool.tasks.base import Draw, Metric, Part, Prepared, Task, to_device

__all__ = ["Draw", "Metric", "Part", "Prepared", "Task", "to_device"]
