"""How a run trains: budget, optimiser, schedule, precision.

How the defaults were chosen is written down in docs/results.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from svftool.choices.regimes import Regime, parse_regime
from svftool.errors import UsageError, brief, shortlist

Precision = Literal["fp32", "bf16", "fp16"]
OptimizerName = Literal["adamw", "sgd"]
FrozenDtype = Literal["float32", "bfloat16"]
SafeguardChoice = Literal["auto", "always", "never"]

GUARDED_TASKS = ("classification", "text-classification")
"""Tasks whose examples can be judged one by one, see `svftool.training.safeguard`."""

SHORTEST_RUN = 100
MOST_WORKERS = 256
_FLAGS = {"clip": "--clip-grad"}
_MOST = 10**9
"""More steps, passes or examples a step than any run has; beyond, products leave the floats."""
_LIMITS = {
    "batch_size": (1, _MOST), "accumulate": (1, _MOST), "patience": (1, _MOST),
    "steps": (1, _MOST), "epochs": (0, _MOST), "head_first": (0, _MOST), "warmup": (0, _MOST),
    "label_smoothing": (0, 1), "workers": (0, MOST_WORKERS),
}  # fmt: skip
"""The smallest and the largest value of each number."""

EPOCHS = 10

LEARNING_RATES = {
    "head": 1e-3,
    "singular_values": 2e-3,
    "entries": 2e-3,
    "scales": 2e-3,
    "remainder": 1e-3,
    "bias": 1e-3,
    "norm": 1e-3,
    "lora": 1e-3,
    "backbone": 2e-5,
}
"""Peak learning rate of each kind of parameter with AdamW.

Entries and scales are measured in the same unit as singular values, a share of what is there; a
remainder is a LoRA of its own.
"""

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
    lr_of : mapping of str to float
        Rates of single regimes, in place of `lr`.
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
        Share of the steps in which the rate rises linearly, or their number from 1 on; a cosine
        takes it to 0 afterwards.
    clip : float or None
        Largest norm of the gradient of all trained tensors together.
    precision : {"fp32", "bf16", "fp16"}
        Precision of the network's products, by autocast; trained tensors stay float32.
    dtype : {"float32", "bfloat16"}
        Of frozen matrices: weights and singular vectors. Vectors, singular values and all that is
        trained stay float32; products are then those of ``bf16``, measuring included.
    accumulate : int
        Batches whose gradients are added up to one step: as a batch that many times as large, for
        the memory of one.
    label_smoothing : float
        Share of each label that is dealt out evenly over all classes (Szegedy et al. 2016, arXiv
        1512.00567); in training alone.
    patience : int or None
        Measurements of the held-out examples without a better one after which a run stops; there
        are ten in a whole run.
    workers : int
        Processes that load batches ahead of the steps; 0 loads each when it is its turn. The
        batches are the same.
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 16
    optimizer: OptimizerName = "adamw"
    lr: float | None = None
    lr_of: Mapping[str, float] = field(default_factory=dict, hash=False)
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
    dtype: FrozenDtype = "float32"
    accumulate: int = 1
    label_smoothing: float = 0.0
    patience: int | None = None
    workers: int = 0
    safeguard: SafeguardChoice = "auto"

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise UsageError(
                "--steps and --epochs both set the length of training. Give one of them"
            )
        for name in ("steps", "epochs", "lr", "head_lr", "clip"):
            _require_positive(_flag(name), getattr(self, name))
        for regime, rate in self.lr_of.items():
            _require_positive(f"--lr {regime}", rate)
        for name, (least, most) in _LIMITS.items():
            _require_within(_flag(name), getattr(self, name), least, most)
        if self.dtype == "bfloat16" and self.precision == "fp16":
            raise UsageError(
                "--precision fp16: with --dtype bfloat16 products are of bfloat16. Leave it out"
            )
        if self.label_smoothing == 1.0:
            raise UsageError("--label-smoothing is 1, expected less: nothing is left of the labels")

    @property
    def products(self) -> Precision:
        """Precision of the network's products: with frozen bfloat16, that of bfloat16."""
        return "bf16" if self.dtype == "bfloat16" else self.precision

    @property
    def examples_a_step(self) -> int:
        """Examples that a step's gradient is the mean over, at most."""
        return self.batch_size * self.accumulate

    def of_regime(self, name: str) -> Settings:
        """Return the settings of one regime: its own rate is the rate."""
        asked = parse_regime(name) if self.lr_of else None
        found = [
            rate for one, rate in self.lr_of.items() if asked and parse_regime(one).same(asked)
        ]
        return replace(self, lr=found[0] if found else self.lr, lr_of={})

    def for_bits(self) -> dict[str, Any]:
        """Return what the bits of a result depend on, as plain values."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        del plain["workers"]
        return {**plain, "lr_of": dict(self.lr_of)}

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
        batch = min(self.examples_a_step, examples)
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


def _flag(name: str) -> str:
    return _FLAGS.get(name, f"--{name.replace('_', '-')}")


def _require_within(what: str, value: float | None, least: float, most: float) -> None:
    if value is None:
        return
    if value > most:
        raise UsageError(f"{what} is over {most}, expected less")
    if not value >= least:
        raise UsageError(f"{what} is {value}, expected at least {least}")


def _require_positive(what: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise UsageError(f"{what} is {value}, expected more than 0")


def parse_rates(text: str | None) -> tuple[float | None, dict[str, float]]:
    """Read learning rates: one for all regimes, some for single ones, or both.

    Parameters
    ----------
    text : str or None
        ``1e-3``, ``svf=1e-2,full=1e-4``, or ``1e-3,full=1e-4``.

    Returns
    -------
    tuple of float or None and dict
        The rate of all others, and those of regimes by name.

    Raises
    ------
    UsageError
        If a part is no rate, or a regime is named twice or unknown.

    Examples
    --------
    >>> parse_rates("1e-3,svf=1e-2"), parse_rates(None)
    ((0.001, {'svf': 0.01}), (None, {}))
    """
    common: list[float] = []
    single: dict[str, float] = {}
    for part in [] if text is None else text.split(","):
        name, equals, number = part.rpartition("=")
        rate = _rate(number, text)
        if not equals:
            common.append(rate)
            continue
        asked = parse_regime(name)
        regime = asked.name
        if any(parse_regime(one).same(asked) for one in single):
            raise UsageError(f"--lr {brief(text)}: {regime} twice, expected each regime once")
        if regime == "head":
            raise UsageError("--lr head: the head has a rate of its own. Use --head-lr")
        single[regime] = rate
    if len(common) > 1:
        raise UsageError(f"--lr {brief(text)}: two rates without a regime, expected one")
    return (common[0] if common else None), single


def _rate(text: str, whole: object) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not math.isfinite(rate):
        raise UsageError(
            f"--lr {brief(whole)}, expected a number such as 1e-3, or one a regime such as "
            "svf=1e-2,full=1e-4"
        )
    return rate


def check_named(option: str, names: Iterable[str], regimes: Iterable[str]) -> None:
    """Refuse an option that names a regime which is not trained.

    Parameters
    ----------
    option : str
        Such as ``--lr``.
    names : iterable of str
        What it names.
    regimes : iterable of str
        What ``--regime`` names.

    Raises
    ------
    UsageError
        If one is not among the others.
    """
    asked = [parse_regime(name) for name in regimes]
    missing = [name for name in names if spelt_among(name, asked) is None]
    if missing:
        raise UsageError(
            f"{option} {shortlist(missing)}: not among the regimes that are trained, "
            f"{shortlist([one.name for one in asked])}. Add it to --regime"
        )


def spelt_among(name: str, regimes: Iterable[Regime]) -> str | None:
    """Return the name by which a regime stands among others; None where it is not among them.

    Examples
    --------
    >>> spelt_among("bias+svf", [parse_regime("head"), parse_regime("svf+bias")])
    'svf+bias'
    """
    asked = parse_regime(name)
    return next((one.name for one in regimes if one.same(asked)), None)


UNMEASURED = "none"
"""The value of ``--eval`` with which nothing is measured."""


def check_comparison(
    settings: Settings,
    regimes: Sequence[str],
    *,
    against: str | None,
    task: str,
    options: Mapping[str, Any],
) -> None:
    """Refuse settings that the regimes, the task or its options leave without a meaning.

    Parameters
    ----------
    settings : Settings
    regimes : sequence of str
        What is trained.
    against : str or None
        The regime that the others are held against.
    task : str
        The value of ``--task``.
    options : mapping
        The task's own, those that were given.

    Raises
    ------
    UsageError
        Names the option, and the way out.
    """
    few_shot = task == "few-shot-segmentation"  # it holds examples out by itself, see --select-on
    check_named("--lr", settings.lr_of, regimes)
    alone, steps = settings.head_first, settings.steps
    if steps is not None and alone >= steps and any(name.strip() != "head" for name in regimes):
        raise UsageError(f"--head-first is {alone}, expected fewer than the {steps} of --steps")
    if settings.label_smoothing and few_shot:
        raise UsageError(f"--label-smoothing has no meaning for --task {task}. Leave it out")
    if settings.patience is not None:
        _require_held_out(options, few_shot=few_shot)
    if against is None:
        return
    check_named("--against", [parse_regime(against).name], regimes)
    if len(regimes) < 2:
        raise UsageError("--against: a single regime, expected others beside it in --regime")
    if str(options.get("evaluation")) == UNMEASURED:
        raise UsageError("--against: --eval none measures nothing that could be compared")


def _require_held_out(options: Mapping[str, Any], *, few_shot: bool) -> None:
    if few_shot and options.get("select_on", "base") == "last":
        raise UsageError("--patience: --select-on last holds nothing out to stop by")
    if not few_shot and not options.get("hold_out"):
        raise UsageError(
            "--patience: no examples are held out to stop by. Keep a share of the shots with "
            "--hold-out 0.2"
        )


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
