"""Which examples are trained on, held out or left over: drawn per class, by seed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from svftool.errors import DataError


@dataclass(frozen=True)
class Split:
    """Indices into one list of examples, each in ascending order.

    Attributes
    ----------
    support : tuple of int
        Examples to train on.
    held_out : tuple of int
        Examples kept from the support set to choose the best weights by.
    rest : tuple of int
        Examples that were not drawn.
    """

    support: tuple[int, ...]
    held_out: tuple[int, ...]
    rest: tuple[int, ...]


def draw_shots(
    labels: Sequence[str], *, shots: int | None, hold_out: float = 0.0, seed: int = 0
) -> Split:
    """Draw `shots` examples of each class at random, and hold a share of them out.

    What is drawn of a class depends on the seed, its name and its number of examples alone.

    Parameters
    ----------
    labels : sequence of str
        Class of each example.
    shots : int or None
        Examples a class; None takes all of them.
    hold_out : float
        Share of each class's drawn examples that is held out, in [0, 1). At least one example of
        each class is left to train on.
    seed : int
        Chooses the draw.

    Raises
    ------
    DataError
        If a class has fewer examples than `shots`.

    Examples
    --------
    >>> split = draw_shots(["cat", "cat", "cat", "dog", "dog"], shots=2)
    >>> len(split.support), len(split.rest)
    (4, 1)
    """
    support: list[int] = []
    held_out: list[int] = []
    rest: list[int] = []
    by_label: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        by_label.setdefault(label, []).append(index)
    for label, members in sorted(by_label.items()):
        count = len(members) if shots is None else shots
        if len(members) < count:
            raise DataError(
                f"class {label!r} has {len(members)} images, expected at least {count} "
                f"for {count} shots. Lower --shots or add images."
            )
        order = _shuffled(members, f"{seed}:{label}")
        held = min(round(count * hold_out), count - 1)
        held_out += order[:held]
        support += order[held:count]
        rest += order[count:]
    return Split(tuple(sorted(support)), tuple(sorted(held_out)), tuple(sorted(rest)))


def _shuffled(members: list[int], key: str) -> list[int]:
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
    return [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
