"""Episodes: a class, a query image, and the support images that show the class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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
    """

    label: int
    query: int
    support: tuple[int, ...]


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


def fixed_episodes(pool: Pool, count: int, shots: int, seed: int) -> Iterator[Episode]:
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

    Yields
    ------
    Episode
        In order.
    """
    for index in range(count):
        random = np.random.default_rng([seed, index])
        yield draw_episode(pool, index % len(pool.pairs), shots, random)


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
