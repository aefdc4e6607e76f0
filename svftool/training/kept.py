"""How much of a training was kept, and what spoke for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from svftool.errors import counted
from svftool.training.trials import mean_and_error

SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)
"""Parts of the way from the start to the end of training that are tried."""

KeptPart = Literal["start", "part", "end"]


@dataclass(frozen=True)
class SharedWay:
    """What a part of the way does to examples that were left out.

    Attributes
    ----------
    share : float
        Part of the way from the start to the end of training.
    gain : float
        How much less the loss is there than at the start, in nats: the mean over the examples.
    error : float
        Standard error of this mean.
    right : int
        How many more of them the model finds the class of.
    """

    share: float
    gain: float
    error: float
    right: int = 0

    @property
    def harmful(self) -> bool:
        """Whether the loss is higher by more than two standard errors, with fewer classes right."""
        return self.gain < -2 * self.error and self.right < 0


@dataclass(frozen=True)
class Safeguard:
    """How much of a run's training is kept.

    Attributes
    ----------
    share : float
        Part of the way from the start to the end; with 0 the run is not trained at all.
    why : str
        What spoke for it.
    steps : int
        Optimiser steps of the trials together.
    examples : int
        Examples that were left out and judged.
    trials : tuple of SharedWay
        What was tried, by share; none where nothing could be left out.
    """

    share: float
    why: str
    steps: int = 0
    examples: int = 0
    trials: tuple[SharedWay, ...] = ()

    @property
    def kept(self) -> KeptPart:
        """What is kept, in a word."""
        if self.share in (0.0, 1.0):
            return "end" if self.share else "start"
        return "part"


def safeguard_from_plain(value: Mapping[str, Any]) -> Safeguard:
    """Read back what `dataclasses.asdict` gave."""
    trials = tuple(SharedWay(**one) for one in value["trials"])
    return Safeguard(**{**value, "trials": trials})


def choose_share(trials: Sequence[SharedWay], *, new_head: bool) -> float:
    """Return the share of the way that is kept.

    A new head starts from the means of the very examples that it is trained on: they speak for it
    already, and training has to show that it helps. Shares count whose gain is above its own
    standard error, and that lose no example: a loss can fall because the model is less sure, while
    it finds fewer classes. The smallest one whose gain is within a standard error of the best is
    taken.

    A head that came with the checkpoint has not seen these examples, and half of them say too
    little of what all of them do: the largest share is taken that does no harm.

    Parameters
    ----------
    trials : sequence of SharedWay
        By share.
    new_head : bool
        Whether the head was made of the support set.

    Examples
    --------
    >>> choose_share([SharedWay(0.5, 0.30, 0.1), SharedWay(1.0, 0.35, 0.1)], new_head=True)
    0.5
    >>> choose_share([SharedWay(0.5, 0.05, 0.1), SharedWay(1.0, -0.1, 0.1)], new_head=True)
    0.0
    >>> choose_share([SharedWay(0.5, 0.05, 0.1), SharedWay(1.0, -0.1, 0.1)], new_head=False)
    1.0
    """
    if not new_head:
        return max((one.share for one in trials if not one.harmful), default=0.0)
    fit = [one for one in trials if one.gain > one.error and one.right >= 0]
    if not fit:
        return 0.0
    best = max(fit, key=lambda one: one.gain)
    return min(one.share for one in fit if one.gain >= best.gain - best.error)


@dataclass(frozen=True)
class Judged:
    """What a model makes of each example.

    Attributes
    ----------
    losses : list of float
        Cross-entropy of each, in nats.
    right : int
        For how many it finds the class.
    """

    losses: list[float]
    right: int


def decide(folds: Sequence[Sequence[Judged]], steps: int, *, new_head: bool) -> Safeguard:
    """Decide by what training did to the examples that each fold left out.

    Parameters
    ----------
    folds : sequence of sequence of Judged
        For each fold, what it left out, at the start and at every one of `SHARES`; nothing of a
        fold where training diverged.
    steps : int
        Steps of the trials together.
    new_head : bool
        See `choose_share`.
    """
    if not all(folds):
        return Safeguard(0.0, "training diverged on a half of the examples", steps)
    trials = []
    for place, share in enumerate(SHARES, 1):
        gains = [
            before - after
            for fold in folds
            for before, after in zip(fold[0].losses, fold[place].losses, strict=True)
        ]
        if not all(map(math.isfinite, gains)):
            continue
        right = sum(fold[place].right - fold[0].right for fold in folds)
        trials.append(SharedWay(share, *mean_and_error(gains), right))
    share, count = (
        choose_share(trials, new_head=new_head),
        sum(len(fold[0].losses) for fold in folds),
    )
    return Safeguard(share, _why(trials, share, count), steps, count, tuple(trials))


def _why(trials: Sequence[SharedWay], share: float, count: int) -> str:
    if not trials:
        return f"of {counted(count, 'examples')} left out in turn some have no finite loss after it"
    kept = [one for one in trials if one.share == share]
    told = kept[0] if kept else max(trials, key=lambda one: one.gain)
    most = "" if kept else " at best"
    change = f"{'raises' if told.gain < 0 else 'lowers'} the loss by {abs(told.gain):.3f}"
    return (
        f"of {counted(count, 'examples')} left out in turn it {change} ± {told.error:.3f}{most}, "
        f"and finds {told.right:+d} {'class' if abs(told.right) == 1 else 'classes'}"
    )
