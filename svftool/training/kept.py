"""How much of a training was kept, and what spoke for it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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


def choose_share(trials: Sequence[SharedWay]) -> float:
    """Return the smallest share whose gain is within a standard error of the best.

    Shares count whose gain is above its own standard error, and that lose no example: a loss can
    fall because the model is less sure, while it finds fewer classes.

    Examples
    --------
    >>> choose_share([SharedWay(0.5, 0.30, 0.1), SharedWay(1.0, 0.35, 0.1)])
    0.5
    >>> choose_share([SharedWay(0.5, 0.05, 0.1), SharedWay(1.0, 0.4, 0.1, right=-1)])
    0.0
    """
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


def decide(folds: Sequence[Sequence[Judged]], steps: int) -> Safeguard:
    """Decide by what training did to the examples that each fold left out.

    Parameters
    ----------
    folds : sequence of sequence of Judged
        For each fold, what it left out, at the start and at every one of `SHARES`; nothing of a
        fold where training diverged.
    steps : int
        Steps of the trials together.
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
        right = sum(fold[place].right - fold[0].right for fold in folds)
        trials.append(SharedWay(share, *_mean_and_error(gains), right))
    share, count = choose_share(trials), sum(len(fold[0].losses) for fold in folds)
    return Safeguard(share, _why(trials, share, count), steps, count, tuple(trials))


def _why(trials: Sequence[SharedWay], share: float, count: int) -> str:
    kept = [one for one in trials if one.share == share]
    told = kept[0] if kept else max(trials, key=lambda one: one.gain)
    most = "" if kept else " at best"
    return (
        f"of {count} examples left out in turn it lowers the loss by {told.gain:.3f} ± "
        f"{told.error:.3f}{most}, and finds {told.right:+d} classes"
    )


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; a loss that is not finite is no gain."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return 0.0, 0.0
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
