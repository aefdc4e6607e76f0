"""The training loop, its optimisers, and the comparison of regimes over seeds."""

from svftool.training.compare import Plan, Run, Summary, compare, file_stem, summarise
from svftool.training.devices import pick_device
from svftool.training.interrupt import Interruption
from svftool.training.loop import Ending, Log, Outcome, train
from svftool.training.settings import Settings
from svftool.training.summary import interval

__all__ = [
    "Ending",
    "Interruption",
    "Log",
    "Outcome",
    "Plan",
    "Run",
    "Settings",
    "Summary",
    "compare",
    "file_stem",
    "interval",
    "pick_device",
    "summarise",
    "train",
]
