"""How a run trains: budget, optimiser, schedule, precision.

How the defaults were chosen is written down in docs/results.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from svftool.errors import UsageError

Precision = Literal["fp32", "bf16", "fp16"]
OptimizerName = Literal["adamw", "sgd"]
SafeguardChoice = Literal["auto", "always", "never"]

GUARDED_TASKS = ("classification", "text-classification")
"""Tasks whose examples can be judged one by one, see `svftool.training.safeguard`."""

SHORTEST_RUN = 100
_MOST = 10**9
"""More steps, passes or examples a step than any run has; beyond, products leave the floats."""

EPOCHS = 10

LEARNING_RATES = {
    "head": 1e-3,
    "singular_values": 2e-3,
    "bias": 1e-3,
    "norm": 1e-3,
    "lora": 1e-3,
    "backbone": 2e-5,
}
"""Peak learning rate of each kind of parameter with AdamW."""

SGD_FACTOR = 10.0
"""What the rates above are multiplied by for SGD with momentum."""


@dataclass(frozen=True)
class Settings:
    """Choices of one comparison; all its runs share them.

    Attributes
    ----------
    steps : int or None
        Optimiser steps; None goes by `epochs`.
    epochs : float or None
        Passes over the support set; with neither, 10 epochs and at least 100 steps.
    batch_size : int
        Examples a step; a smaller support set is taken whole.
    optimizer : {"adamw", "sgd"}
        SGD has momentum 0.9.
    lr, head_lr : float or None
        Peak learning rates of the backbone and of the head; None takes the defaults.
    safeguard : {"auto", "always", "never"}
        Whether examples left out in turn decide how much of the training is kept; ``auto`` where
        there are few of them and neither length nor rates are given. See
        `svftool.training.safeguard`.
    tune_lr : bool
        Choose a factor of these rates for each run, on its support set alone.
    lr_scale : float
        Factor of all of these rates.
    head_scale : float
        Factor of the head's default rate: what its start calls for, see `Prepared`.
    decay : float
        Decoupled decay of every trained tensor towards where it started: each step takes the share
        of learning rate times decay of the way back.
    head_decay : float or None
        That of the head; None takes `decay`.
    head_first : int
        Steps in which the head alone is trained before everything else joins, whose rate then
        rises and falls over the steps that are left: linear probing, then fine-tuning (Kumar et
        al. 2022, arXiv 2202.10054).
    warmup : float
        Share of the steps in which the rate rises linearly; a cosine takes it to 0 afterwards.
    clip : float or None
        Largest norm of the gradient of all trained tensors together.
    precision : {"fp32", "bf16", "fp16"}
        Precision of the network's products, by autocast; trained tensors stay float32.
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 16
    optimizer: OptimizerName = "adamw"
    lr: float | None = None
    head_lr: float | None = None
    tune_lr: bool = False
    lr_scale: float = 1.0
    head_scale: float = 1.0
    decay: float = 0.0
    head_decay: float | None = None
    head_first: int = 0
    warmup: float = 0.1
    clip: float | None = 1.0
    precision: Precision = "fp32"
    safeguard: SafeguardChoice = "auto"

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise UsageError(
                "--steps and --epochs both set the length of training. Give one of them"
            )
        for name, value in (("steps", self.steps), ("epochs", self.epochs), ("lr", self.lr)):
            if value is not None and value <= 0:
                raise UsageError(f"--{name} is {value}, expected more than 0")
        for name, value in (
            ("steps", self.steps), ("epochs", self.epochs), ("batch-size", self.batch_size),
            ("head-first", self.head_first),
        ):  # fmt: skip
            if value is not None and value > _MOST:
                raise UsageError(f"--{name} is over {_MOST}, expected less")
        if self.head_first < 0:
            raise UsageError(f"--head-first is {self.head_first}, expected at least 0")
        if self.batch_size < 1:
            raise UsageError(f"--batch-size is {self.batch_size}, expected at least 1")

    def step_count(self, examples: int) -> int:
        """Optimiser steps for a support set of this many examples.

        Examples
        --------
        >>> Settings().step_count(1000), Settings().step_count(10)
        (625, 100)
        >>> Settings(steps=7).step_count(100)
        7
        """
        if self.steps is not None:
            return self.steps
        batch = min(self.batch_size, examples)
        if self.epochs is not None:
            return max(1, round(self.epochs * examples / batch))
        return max(SHORTEST_RUN, round(EPOCHS * examples / batch))

    @property
    def guarded(self) -> bool:
        """Whether runs of few examples are judged by what they leave out.

        Examples
        --------
        >>> Settings().guarded, Settings(steps=50).guarded
        (True, False)
        >>> Settings(steps=50, safeguard="always").guarded
        True
        """
        given = (self.steps, self.epochs, self.lr, self.head_lr)
        by_default = all(one is None for one in given)
        return self.safeguard == "always" or (self.safeguard == "auto" and by_default)

    def learning_rate(self, group: str) -> float:
        """Peak learning rate of one kind of parameter: ``head``, ``singular_values`` ..."""
        given, scale = (self.head_lr, self.head_scale) if group == "head" else (self.lr, 1.0)
        if given is None:
            given = scale * LEARNING_RATES[group]
            given *= SGD_FACTOR if self.optimizer == "sgd" else 1.0
        return given * self.lr_scale

    def decay_of(self, group: str) -> float:
        """Decay of one kind of parameter towards where it started."""
        return self.decay if group != "head" or self.head_decay is None else self.head_decay

    def scaled(self, factor: float) -> Settings:
        """Return the same settings with every learning rate multiplied."""
        return replace(self, lr_scale=self.lr_scale * factor)


def check_safeguard(choice: str, task: str) -> None:
    """Refuse ``--safeguard always`` for a task whose examples cannot be judged one by one.

    Raises
    ------
    UsageError
        Names the tasks that can.
    """
    if choice == "always" and task not in GUARDED_TASKS:
        raise UsageError(
            f"--safeguard always: not for task {task}, expected {' or '.join(GUARDED_TASKS)}. "
            "Leave the option out"
        )
