"""Weights of a merge's inputs by data: which are tried, and when they take the start's place.

Numbers in, numbers out: what a loss is, and how it is measured, is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

Factors = tuple[float, ...]
"""What the start weight of each input is multiplied by."""

LARGEST = 1.5
"""Size that no weight goes beyond, unless it was given so: the bound of LoraHub (see below)."""
LEAST_STEP = 0.125
"""Step at which the search ends."""
FOLDS = 5
"""Parts of the data that are left out in turn, at most."""
_EQUAL = 1e-3
"""Share of the start's loss below which two losses are equal: where all examples are right, the
loss falls for as long as the weights grow, and nothing is gained."""


@dataclass(frozen=True)
class Gain:
    """A mean difference of losses.

    Attributes
    ----------
    mean : float
    error : float
        Its standard error, from the differences of the parts; NaN of one part.
    """

    mean: float
    error: float


@dataclass(frozen=True)
class Parts:
    """Parts of the data, one example each where there are few; of each a mean loss is known.

    Attributes
    ----------
    sizes : tuple of float
        What each counts in the mean over all: its examples, tokens or pixels.
    """

    sizes: tuple[float, ...]

    def mean(self, losses: Sequence[float], among: Collection[int] | None = None) -> float:
        """Return the mean loss over all parts, or some."""
        chosen = range(len(self.sizes)) if among is None else among
        total = sum(self.sizes[index] for index in chosen)
        return sum(self.sizes[index] * losses[index] for index in chosen) / total

    def gain(self, before: Sequence[float], after: Sequence[float]) -> Gain:
        """Return by how much losses are lower after than before, paired part by part.

        With sizes s and differences d the mean is ``m = sum(s d) / sum(s)`` and its error
        ``sqrt(n / (n - 1) sum((s (d - m))^2)) / sum(s)``, that of a ratio of means.

        Examples
        --------
        >>> Parts((1.0, 1.0)).gain([3.0, 1.0], [1.0, 1.0])
        Gain(mean=1.0, error=1.0)
        """
        count, total = len(self.sizes), sum(self.sizes)
        if not all(map(math.isfinite, (*before, *after))):
            return Gain(self.mean(before) - self.mean(after), math.nan)
        changes = [one - two for one, two in zip(before, after, strict=True)]
        mean = self.mean(changes)
        if count < 2:
            return Gain(mean, math.nan)
        squares = sum((s * (d - mean)) ** 2 for s, d in zip(self.sizes, changes, strict=True))
        return Gain(mean, math.sqrt(count / (count - 1) * squares) / total)


@dataclass(frozen=True)
class WeightTrial:
    """Weights that were tried.

    Attributes
    ----------
    factors : tuple of float
    losses : tuple of float
        Of each part; infinite where the inputs cannot be merged with these weights.
    """

    factors: Factors
    losses: tuple[float, ...]

    @property
    def distance(self) -> float:
        """How far from the start: the sum over inputs of what the factor is off 1."""
        return sum(abs(one - 1.0) for one in self.factors)


@dataclass(frozen=True)
class _Point:
    """A place of the search: a factor of all inputs, and one of each."""

    scale: float
    ratios: Factors

    @property
    def factors(self) -> Factors:
        return tuple(self.scale * one for one in self.ratios)

    def moved(self, direction: int | None, step: float, most: Sequence[float]) -> _Point:
        """Go along a direction: all inputs together, or one; as far as it is allowed."""
        if direction is None:
            bounds = [one / ratio for one, ratio in zip(most, self.ratios, strict=True) if ratio]
            return replace(self, scale=min([self.scale * (1.0 + step / 2.0), *bounds]))
        ratios = list(self.ratios)
        largest = most[direction] / self.scale
        ratios[direction] = min(max(ratios[direction] + step, 0.0), largest)
        return replace(self, ratios=tuple(ratios))


def largest_factors(weights: Sequence[float]) -> tuple[float, ...]:
    """Return what each start weight may be multiplied by at most; 1 where it is 0 or large.

    Examples
    --------
    >>> largest_factors([1.0, -0.5, 2.0, 0.0])
    (1.5, 3.0, 1.0, 1.0)
    """
    return tuple(max(1.0, LARGEST / abs(one)) if one else 1.0 for one in weights)


def search_weights(
    score: Callable[[Factors], Sequence[float]],
    weights: Sequence[float],
    parts: Parts,
    trials: int,
) -> list[WeightTrial]:
    """Try weights around the start, which comes first.

    A compass search: from the best so far, all inputs together are made smaller and larger, then
    each by itself. What lowers the loss, by more than a thousandth of the start's, is kept at once.
    With step h the common factor goes by ``1 -+ h / 2`` and that of one input by ``-+ h``; h begins
    at 1, so that each input is also left out, and is halved where a whole round finds nothing.
    Nothing is random.

    Parameters
    ----------
    score : callable
        Gives the losses of the parts for factors of the start weights. Called once for each.
    weights : sequence of float
        Of the start. One that is 0 stays so, and none grows beyond `LARGEST`.
    parts : Parts
    trials : int
        Times that `score` is called, at most.

    Returns
    -------
    list of WeightTrial
        In the order that they were tried.

    References
    ----------
    T. G. Kolda, R. M. Lewis and V. Torczon, Optimization by direct search, SIAM Review 45 (2003).
    Mixing coefficients of experts chosen on a few examples: Q. Sun et al., Transformer-Squared,
    arXiv 2501.06252, who search with the cross-entropy method; and with bounds on the weights
    C. Huang et al., LoraHub, arXiv 2307.13269.

    Examples
    --------
    >>> found = search_weights(lambda f: [abs(f[0] - 0.5) + f[1]], [1.0, 1.0], Parts((1.0,)), 30)
    >>> min(found, key=lambda one: one.losses[0]).factors
    (0.5, 0.0)
    """
    start, most = _Point(1.0, tuple(1.0 for _ in weights)), largest_factors(weights)
    tried = {start.factors: WeightTrial(start.factors, tuple(score(start.factors)))}
    best, lowest, step = start, parts.mean(tried[start.factors].losses), 1.0
    equal = _EQUAL * abs(lowest)
    while step >= LEAST_STEP:
        moved = False
        for nearby in _directions(weights):
            for sign in (-1.0, 1.0):
                point = best.moved(nearby, sign * step, most)
                if point.factors in tried:
                    continue
                if len(tried) >= trials:
                    return list(tried.values())
                trial = WeightTrial(point.factors, tuple(score(point.factors)))
                tried[point.factors] = trial
                if (found := parts.mean(trial.losses)) < lowest - equal:
                    best, lowest, moved = point, found, True
                    break
        step = step if moved else step / 2.0
    return list(tried.values())


def _directions(weights: Sequence[float]) -> Iterator[int | None]:
    active = [index for index, one in enumerate(weights) if one]
    if len(active) > 1:  # one input by itself is all of them, and can be left out
        yield None
    yield from active


def lowest_of(
    tried: Sequence[WeightTrial], parts: Parts, among: Collection[int] | None = None
) -> WeightTrial:
    """Return the weights with the lowest mean loss; of equal ones those nearest to the start.

    Parameters
    ----------
    tried : sequence of WeightTrial
        The start first.
    parts : Parts
    among : collection of int, optional
        The parts that count.
    """
    means = [parts.mean(one.losses, among) for one in tried]
    highest = min(means) + _EQUAL * abs(parts.mean(tried[0].losses))
    equal = [one for one, mean in zip(tried, means, strict=True) if mean <= highest]
    return min(equal, key=lambda one: one.distance)


@dataclass(frozen=True)
class TrialChoice:
    """Which weights are taken.

    Attributes
    ----------
    best : WeightTrial
        The lowest loss on all of the data.
    chosen : WeightTrial
        The same, or the start.
    gain : Gain
        By how much the loss is lower than the start's on parts that had no say in the choice.
    """

    best: WeightTrial
    chosen: WeightTrial
    gain: Gain


def choose_trial(tried: Sequence[WeightTrial], parts: Parts) -> TrialChoice:
    """Take the best weights where they hold on data that had no say, else the start.

    Of a few examples the best of many weights is good by chance too. So the parts are left out in
    turn, a fifth at a time: of all weights tried those with the lowest loss on the others are
    measured on what was left out. The start stays unless the mean gain there is larger than its
    standard error. (The path of the search has seen all parts; the choice has not.)

    Parameters
    ----------
    tried : sequence of WeightTrial
        The start first.
    parts : Parts
        Two or more, in random order.

    References
    ----------
    The rule of one standard error: L. Breiman et al., Classification and Regression Trees (1984),
    section 3.4.3.

    Examples
    --------
    >>> tried = [WeightTrial((1.0,), (1.0, 1.0, 1.0)), WeightTrial((0.5,), (0.7, 0.8, 0.75))]
    >>> choose_trial(tried, Parts((1.0, 1.0, 1.0))).chosen.factors
    (0.5,)
    """
    start, best = tried[0], lowest_of(tried, parts)
    count = len(parts.sizes)
    folds = min(FOLDS, count)
    held = [0.0] * count
    for fold in range(folds):
        left_out = range(fold, count, folds)
        others = [index for index in range(count) if index % folds != fold]
        found = lowest_of(tried, parts, others)
        for index in left_out:
            held[index] = found.losses[index]
    gain = parts.gain(start.losses, held)
    return TrialChoice(best, best if gain.mean > gain.error else start, gain)
