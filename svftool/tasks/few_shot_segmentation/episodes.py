"""Episodes: a class, a query image, and the support images that show the class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from svftool.tasks.few_shot_segmentation.pool import Pool


@dataclass(frozen=True)
class Episode:
    """One question put to the model.

    Attributes
    ----------
    label : int
        The class that is asked for.
    query : int
        Index in the pool of the image to segment.
    support : tuple of int
        Indices in the pool of the images that show the class.
    other : int or None
        The class that they show where, as a control, it is not the one asked for.
    """

    label: int
    query: int
    support: tuple[int, ...]
    other: int | None = None

    @property
    def shown(self) -> int:
        """The class that the support images show."""
        return self.label if self.other is None else self.other


def draw_episode(pool: Pool, query: int, shots: int, random: np.random.Generator) -> Episode:
    """Make an episode of a query image.

    Parameters
    ----------
    pool : Pool
        Where to draw from; every class must have `shots` + 1 pictures (`require_shots`).
    query : int
        Index of the query; ignored where the pool's order is by classes.
    shots : int
        How many support images.
    random : Generator
        Source of all choices.

    Returns
    -------
    Episode
        The class is uniform over those that may be asked of the query (or, by classes, over all,
        and the query uniform in it); supports are uniform over the class without repetition and
        never show the query's picture.
    """
    if pool.order == "classes":
        label = pool.classes[random.integers(len(pool.classes))]
        queries = pool.queries_of[label]
        query = queries[random.integers(len(queries))]
    else:
        asked = pool.pairs[query].query
        label = asked[random.integers(len(asked))]
    return Episode(label, query, _draw_support(pool, label, query, shots, random))


def fixed_episodes(
    pool: Pool, count: int, shots: int, seed: int, *, swapped: bool = False
) -> Iterator[Episode]:
    """Give the episodes of a test: the pool's images in order, again and again.

    Parameters
    ----------
    pool : Pool
        The test images.
    count : int
        How many episodes.
    shots : int
        Support images of each.
    seed : int
        The same seed gives the same episodes, whatever is tested on them.
    swapped : bool
        Ask the same queries for the same classes, but show supports of another class: what a model
        still finds, it finds without them.

    Yields
    ------
    Episode
        In order.
    """
    for index in range(count):
        random = np.random.default_rng([seed, index])
        episode = draw_episode(pool, index % len(pool.pairs), shots, random)
        yield _swapped(pool, episode, random) if swapped else episode


def _swapped(pool: Pool, episode: Episode, random: np.random.Generator) -> Episode:
    others = [label for label in pool.classes if label != episode.label]
    other = others[random.integers(len(others))]
    support = _draw_support(pool, other, episode.query, len(episode.support), random)
    return replace(episode, support=support, other=other)


def _draw_support(
    pool: Pool, label: int, query: int, shots: int, random: np.random.Generator
) -> tuple[int, ...]:
    candidates = pool.support_of[label]
    used = {pool.pairs[query].identity}
    chosen: list[int] = []
    for position in random.permutation(len(candidates)):
        index = candidates[position]
        identity = pool.pairs[index].identity
        if identity not in used:
            used.add(identity)
            chosen.append(index)
        if len(chosen) == shots:
            break
    return tuple(chosen)


@dataclass(frozen=True)
class Asked:
    """Episodes to score: which pool, how many, of how many shots; a purpose has its own seeds."""

    pool: Pool
    count: int
    shots: int
    purpose: int
    swapped: bool = False

    def episodes(self, seed: int) -> list[Episode]:
        """Draw them for a run's seed."""
        seed = 3 * seed + self.purpose
        return list(fixed_episodes(self.pool, self.count, self.shots, seed, swapped=self.swapped))
