"""Images with their masks, and the pools that episodes are drawn from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from svftool.errors import DataError, counted, shortlist
from svftool.few_shot.folds import ClassSplit

MINIMUM_AREA = 2 * 32 * 32
"""Pixels that a class must fill for an image to stand for it (Shaban et al., BMVC 2017)."""


@dataclass(frozen=True)
class ImageMaskPair:
    """An image with its mask.

    Attributes
    ----------
    image, mask : Path
        The two files, of one size.
    query : tuple of int
        Classes that an episode with this image as its query may ask for.
    support : tuple of int
        Classes that this image may be a support for.
    label : int or None
        Class of a binary mask; None where the mask is a map of class numbers.
    identity : str
        Equal for pairs that show the same picture.
    """

    image: Path
    mask: Path
    query: tuple[int, ...]
    support: tuple[int, ...]
    label: int | None = None
    identity: str = ""


@dataclass(frozen=True)
class ImagePool:
    """Pairs that episodes are drawn from.

    Attributes
    ----------
    pairs : tuple of ImageMaskPair
        In the order that test episodes go through them.
    classes : tuple of int
        The classes that episodes ask for.
    order : {"images", "classes"}
        A query is the next image, and its class one of the image's; or a class drawn uniformly, and
        its query one of its images.
    """

    pairs: tuple[ImageMaskPair, ...]
    classes: tuple[int, ...]
    order: Literal["images", "classes"] = "images"

    @cached_property
    def support_of(self) -> Mapping[int, tuple[int, ...]]:
        """Indices of the pairs that may support each class."""
        return self._index("support")

    @cached_property
    def queries_of(self) -> Mapping[int, tuple[int, ...]]:
        """Indices of the pairs that may be the query of each class."""
        return self._index("query")

    def _index(self, role: Literal["query", "support"]) -> dict[int, tuple[int, ...]]:
        found: dict[int, list[int]] = {label: [] for label in self.classes}
        for index, pair in enumerate(self.pairs):
            for label in getattr(pair, role):
                found[label].append(index)
        return {label: tuple(indices) for label, indices in found.items()}

    @cached_property
    def pictures(self) -> Mapping[int, int]:
        """How many different pictures may support each class."""
        return {
            label: len({self.pairs[index].identity for index in indices})
            for label, indices in self.support_of.items()
        }

    def too_small(self, shots: int) -> dict[int, int]:
        """Return the classes that have fewer than `shots` + 1 different pictures, and how many."""
        return {label: count for label, count in self.pictures.items() if count < shots + 1}

    def only(self, classes: Iterable[int]) -> ImagePool:
        """Restrict the pool to some of its classes."""
        kept = tuple(label for label in self.classes if label in set(classes))
        pairs = tuple(allow(self.pairs, query=kept, support=kept))
        return ImagePool(pairs, kept, self.order)


@dataclass(frozen=True)
class FoldData:
    """What one fold of a data set gives to train on, to choose by and to test on.

    Attributes
    ----------
    dataset : str
        ``pascal-5i``, ``coco-20i``, ``fss-1000`` or ``pairs``.
    split : ClassSplit
        The base and novel classes.
    train : ImagePool
        Training images, asked for base classes.
    held_out : ImagePool
        Images that are not in `train`, asked for base classes: what models are chosen by.
    test : ImagePool
        Images asked for novel classes.
    novel_images : int
        Training images that hold novel classes.
    removed : bool
        Those images were removed from `train`.
    notes : tuple of str
        Sentences for the user.
    """

    dataset: str
    split: ClassSplit
    train: ImagePool
    held_out: ImagePool
    test: ImagePool
    novel_images: int
    removed: bool = False
    notes: tuple[str, ...] = field(default=())


def allow(
    pairs: Iterable[ImageMaskPair], *, query: Iterable[int], support: Iterable[int]
) -> list[ImageMaskPair]:
    """Keep the pairs that have one of the classes, with those classes alone."""
    asked, given = set(query), set(support)
    kept = []
    for pair in pairs:
        new = ImageMaskPair(
            pair.image,
            pair.mask,
            tuple(label for label in pair.query if label in asked),
            tuple(label for label in pair.support if label in given),
            pair.label,
            pair.identity,
        )
        if new.query and new.support:
            kept.append(new)
    return kept


def require_shots(data: FoldData, part: Literal["training", "test"], shots: int) -> None:
    """Refuse data where a class cannot make an episode.

    Parameters
    ----------
    data : FoldData
        The fold.
    part : {"training", "test"}
        What episodes of `shots` shots will be drawn from.
    shots : int
        Support images of an episode.

    Raises
    ------
    DataError
        If a class has fewer different pictures than `shots` + 1: names and counts.
    """
    small = (data.train if part == "training" else data.test).too_small(shots)
    if not small:
        return
    held = data.held_out.pictures if part == "training" else {}
    more = {label: f", {held[label]} more held out" for label in small if held.get(label)}
    listed = (f"{data.split.name(label)} ({n}{more.get(label, '')})" for label, n in small.items())
    keep = ", --keep-novel" if part == "training" and data.removed else ""
    raise DataError(
        f"classes of the {part} data of fold {data.split.fold} with fewer than {shots + 1} "
        f"images: {len(small)}, expected {shots} for support and 1 to query: "
        f"{shortlist(listed, limit=5)}. Use fewer --shots{keep} or add images."
    )


def require_held_out(data: FoldData, shots: int) -> None:
    """Refuse held-out images that make no episode, where weights are to be chosen by them.

    Parameters
    ----------
    data : FoldData
        The fold.
    shots : int
        Support images of an episode.

    Raises
    ------
    DataError
        If no base class has `shots` + 1 different held-out pictures: how many there are.
    """
    pool = data.held_out
    most = max(pool.pictures.values(), default=0)
    if most < shots + 1:
        raise DataError(
            f"fold {data.split.fold} holds out {counted(len(pool.pairs), 'images')} of "
            f"{counted(len(pool.classes), 'base classes')}, {most} of a class at most, "
            f"expected {shots + 1} ({shots} for support and 1 to query) to choose weights by. Use "
            "--select-on last, fewer --shots or more images."
        )


# Episodes: a class, a query image, and the support images that show the class.


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


def draw_episode(pool: ImagePool, query: int, shots: int, random: np.random.Generator) -> Episode:
    """Make an episode of a query image.

    Parameters
    ----------
    pool : ImagePool
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
    pool: ImagePool, count: int, shots: int, seed: int, *, swapped: bool = False
) -> Iterator[Episode]:
    """Yield the episodes of a test: the pool's images in order, again and again.

    Parameters
    ----------
    pool : ImagePool
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


def _swapped(pool: ImagePool, episode: Episode, random: np.random.Generator) -> Episode:
    others = [label for label in pool.classes if label != episode.label]
    other = others[random.integers(len(others))]
    support = _draw_support(pool, other, episode.query, len(episode.support), random)
    return replace(episode, support=support, other=other)


def _draw_support(
    pool: ImagePool, label: int, query: int, shots: int, random: np.random.Generator
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

    pool: ImagePool
    count: int
    shots: int
    purpose: int
    swapped: bool = False

    def episodes(self, seed: int) -> list[Episode]:
        """Draw them for a run's seed."""
        seed = 3 * seed + self.purpose
        return list(fixed_episodes(self.pool, self.count, self.shots, seed, swapped=self.swapped))
