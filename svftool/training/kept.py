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
    """

    share: float
    gain: float
    error: float


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

    The best gain, and that of the share, must be above zero by their own standard errors.

    Examples
    --------
    >>> choose_share([SharedWay(0.5, 0.30, 0.1), SharedWay(1.0, 0.35, 0.1)])
    0.5
    >>> choose_share([SharedWay(0.5, 0.05, 0.1), SharedWay(1.0, -0.4, 0.1)])
    0.0
    """
    best = max(trials, key=lambda one: one.gain)
    enough = [one.share for one in trials if one.gain > one.error]
    near = [one.share for one in trials if one.gain >= best.gain - best.error]
    return min(set(enough) & set(near), default=0.0) if best.gain > best.error else 0.0


def decide(losses: Sequence[Sequence[Sequence[float]]], steps: int) -> Safeguard:
    """Decide by what training did to the examples that each fold left out.

    Parameters
    ----------
    losses : sequence of sequence of sequence of float
        For each fold, at the start and at every one of `SHARES`, the loss of every example that it
        left out; nothing of a fold where training diverged.
    steps : int
        Steps of the trials together.
    """
    if not all(losses):
        return Safeguard(0.0, "training diverged on a half of the examples", steps)
    before = [value for fold in losses for value in fold[0]]
    trials = []
    for place, share in enumerate(SHARES, 1):
        after = [value for fold in losses for value in fold[place]]
        gains = [start - end for start, end in zip(before, after, strict=True)]
        trials.append(SharedWay(share, *_mean_and_error(gains)))
    share = choose_share(trials)
    best = max(trials, key=lambda one: one.gain)
    told = next((one for one in trials if one.share == share), best)
    what = f"on the {len(before)} examples left out in turn"
    if share:
        why = f"{what} it lowers the loss by {told.gain:.3f} ± {told.error:.3f}"
    else:
        why = f"{what} training lowers the loss by {told.gain:.3f} ± {told.error:.3f} at best"
    return Safeguard(share, why, steps, len(before), tuple(trials))


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; a loss that is not finite is no gain."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return 0.0, 0.0
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
