"""The training loop, its optimisers, and the comparison of regimes over seeds."""

from svftool.choices.training import Settings
from svftool.training.compare import compare
from svftool.training.group import ALONE, Group, Interruption, joined_group
from svftool.training.loop import Ending, Log, Outcome, train
from svftool.training.plan import Run, TrainingPlan, file_stem
from svftool.training.results import Summary, interval, summarise
from svftool.training.state import State, StateFile
from svftool.training.trackers import Trackers
from svftool.training.trials import Trial, Tuning, tuning_to_plain
from svftool.training.workspace import Journal

__all__ = [
    "ALONE",
    "Ending",
    "Group",
    "Interruption",
    "Journal",
    "Log",
    "Outcome",
    "Run",
    "Settings",
    "State",
    "StateFile",
    "Summary",
    "Trackers",
    "TrainingPlan",
    "Trial",
    "Tuning",
    "compare",
    "file_stem",
    "interval",
    "joined_group",
    "summarise",
    "train",
    "tuning_to_plain",
]
