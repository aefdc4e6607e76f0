"""What a comparison is asked for, and what each of its runs came to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from svftool.choices.training import Settings
from svftool.factors import FactorStore
from svftool.tasks.base import Task
from svftool.training.kept import KeptPart, Safeguard, safeguard_from_plain
from svftool.training.loop import Outcome, read_curves
from svftool.training.trackers import Trackers
from svftool.training.trials import Tuning, tuning_from_plain


@dataclass(frozen=True)
class TrainingPlan:
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
    trackers : Trackers
        What follows the curves of the runs.
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
    trackers: Trackers = field(default_factory=Trackers)


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
        See `svftool.machine.peak_memory`.
    worse : bool
        The primary metric got worse.
    output : Path or None
        Where the result was written.
    setting : mapping
        What the task says of its data and its rules.
    learning_rates : mapping of str to float
        Peak learning rate of each kind of parameter.
    tuning : Tuning or None
        How these rates were chosen; None where that was not asked for.
    safeguard : Safeguard or None
        How much of the training was kept, and why; None where nothing judged it.
    support : mapping
        What the examples are known again by, see `svftool.factors.stated.Support`; empty where
        nothing is known.
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
    setting: Mapping[str, Any] = field(default_factory=dict)
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    tuning: Tuning | None = None
    safeguard: Safeguard | None = None
    support: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kept(self) -> KeptPart:
        """What of the training is in the result: all of it, a part of the way, or its start."""
        return "end" if self.safeguard is None else self.safeguard.kept

    @property
    def stem(self) -> str:
        """Name of the run, and of its files."""
        return file_stem(self.regime, self.seed, self.shots, self.facts)


def run_to_plain(run: Run) -> dict[str, Any]:
    """Return a run as values that JSON holds; floats keep every bit."""
    return {**asdict(run), "output": None if run.output is None else str(run.output)}


def run_from_plain(value: Mapping[str, Any]) -> Run:
    """Read back what `run_to_plain` gave."""
    outcome = {**value["outcome"], "curves": read_curves(value["outcome"]["curves"])}
    output, tuning, safeguard = value["output"], value.get("tuning"), value.get("safeguard")
    return Run(
        **{
            **value,
            "outcome": Outcome(**outcome),
            "output": None if output is None else Path(output),
            "tuning": None if tuning is None else tuning_from_plain(tuning),
            "safeguard": None if safeguard is None else safeguard_from_plain(safeguard),
        }
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
