"""The training loop, its optimisers, and the comparison of regimes over seeds."""

from svftool.training.interrupt import Interruption
from svftool.training.loop import Ending, Log, Outcome, train
from svftool.training.settings import Settings
from svftool.training.summary import interval

__all__ = ["Ending", "Interruption", "Log", "Outcome", "Settings", "interval", "train"]
