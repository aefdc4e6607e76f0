"""Which examples are trained on, held out or left over: drawn per class, by seed."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svftool.errors import DataError, UsageError, counted


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
    labels: Sequence[str],
    *,
    shots: int | None,
    hold_out: float = 0.0,
    seed: int = 0,
    unit: str = "images",
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
    unit : str
        What the examples are, for messages.

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
    by_label: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        by_label.setdefault(label, []).append(index)
    parts = []
    for label, members in sorted(by_label.items()):
        if shots is not None and len(members) < shots:
            raise DataError(
                f"class {label!r} has {counted(len(members), unit)}, expected at least "
                f"{shots} for {counted(shots, 'shots')}. Lower --shots or add {unit}."
            )
        parts.append(_split(members, shots, hold_out, f"{seed}:{label}"))
    return _joined(parts)


def draw_examples(
    count: int, *, unit: str, shots: int | None, hold_out: float = 0.0, seed: int = 0
) -> Split:
    """Draw `shots` of `count` examples that have no class each, and hold a share of them out.

    Parameters
    ----------
    count : int
        Examples there are.
    unit : str
        What they are, for messages: ``texts``, ``images``.
    shots, hold_out, seed
        As in `draw_shots`.

    Raises
    ------
    DataError
        If there are fewer than `shots`.

    Examples
    --------
    >>> split = draw_examples(10, unit="texts", shots=4, hold_out=0.25)
    >>> len(split.support), len(split.held_out), len(split.rest)
    (3, 1, 6)
    """
    if shots is not None and count < shots:
        raise DataError(
            f"{counted(count, unit)}, expected at least {shots} for {counted(shots, 'shots')}. "
            f"Lower --shots or add {unit}."
        )
    return _joined([_split(list(range(count)), shots, hold_out, f"{seed}:{unit}")])


def left_out(labels: Sequence[Hashable], count: int, *, seed: int) -> list[tuple[int, ...]]:
    """Deal examples to folds that are left out of training in turn, class by class at random.

    An example alone in its class is left out of no fold: training needs one of each class.

    Parameters
    ----------
    labels : sequence
        Class of each example; all alike where they have none.
    count : int
        Folds, two or more; fewer where no class has so many examples.
    seed : int
        Chooses who is left out when.

    Returns
    -------
    list of tuple of int
        Positions that each fold leaves out, in ascending order; empty if there is none.

    Examples
    --------
    >>> folds = left_out(["cat", "cat", "dog", "dog", "eel"], 2, seed=0)
    >>> [len(fold) for fold in folds], 4 in folds[0] + folds[1]
    ([2, 2], False)
    """
    by_label: dict[Hashable, list[int]] = {}
    for position, label in enumerate(labels):
        by_label.setdefault(label, []).append(position)
    folds: list[list[int]] = [[] for _ in range(count)]
    dealt = 0
    for label, members in by_label.items():
        if len(members) > 1:
            for position in _shuffled(members, f"{seed}:fold:{label}"):
                folds[dealt % count].append(position)
                dealt += 1
    return [tuple(sorted(fold)) for fold in folds if fold]


def others(positions: Collection[int], size: int) -> tuple[int, ...]:
    """Return the positions below `size` that are not among these."""
    chosen = set(positions)
    return tuple(position for position in range(size) if position not in chosen)


def balanced_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Order of an epoch in which each class comes up equally often, one more or less.

    Classes with fewer examples repeat them, every one before any comes again; of larger ones a
    random part is shown. Classes take turns, so that batches are balanced too.

    Parameters
    ----------
    labels : (N,) int64 Tensor
        Class of each example.
    generator : torch.Generator
        Source of all randomness.

    Returns
    -------
    (N,) int64 Tensor
        Positions in `labels`.

    Examples
    --------
    >>> labels = torch.tensor([0] * 9 + [1])
    >>> labels[balanced_order(labels, torch.Generator().manual_seed(0))].bincount().tolist()
    [5, 5]
    """
    size = len(labels)
    present = labels.bincount().nonzero().flatten().tolist()
    rounds = -(-size // len(present))
    columns = []
    for label in present:
        members = (labels == label).nonzero().flatten()
        times = -(-rounds // len(members))
        shuffled = [
            members[torch.randperm(len(members), generator=generator)] for _ in range(times)
        ]
        columns.append(torch.cat(shuffled)[:rounds])
    turns = [torch.randperm(len(present), generator=generator) for _ in range(rounds)]
    table = torch.stack(columns, dim=1)
    return table.gather(1, torch.stack(turns)).flatten()[:size]


def require_query(shots: int | None, evaluation: object, unit: str) -> None:
    """Refuse to train on everything when nothing else is there to measure with.

    Raises
    ------
    UsageError
        If neither shots nor evaluation data are given.
    """
    if shots is None and evaluation is None:
        raise UsageError(
            f"all {unit} would be trained on and none measure the result. "
            "Give --shots K, which leaves the rest for evaluation, --eval PATH, or --eval none to "
            "measure nothing"
        )


def require_held_out(split: Split, hold_out: float, unit: str) -> None:
    """Refuse a share to hold out that is less than one example of any class.

    Raises
    ------
    UsageError
        Says how many there are.
    """
    if hold_out and not split.held_out:
        raise UsageError(
            f"--hold-out {hold_out:g} holds out none of the {unit} that are trained on "
            f"({len(split.support)} in all), expected one or more of a class. Raise it or --shots, "
            "or leave it out"
        )


def nothing_left(shots: int | None, unit: str) -> DataError:
    """Error for shots that leave nothing over."""
    take, leave = ("takes", "leaves") if shots == 1 else ("take", "leave")
    return DataError(
        f"{counted(shots or 0, 'shots')} {take} every one of the {unit} and {leave} none to "
        "measure with. "
        "Lower --shots, or give --eval PATH, or --eval none to measure nothing"
    )


def _split(members: list[int], shots: int | None, hold_out: float, key: str) -> Split:
    count = len(members) if shots is None else shots
    order = _shuffled(members, key)
    held = min(round(count * hold_out), count - 1)
    return Split(tuple(order[held:count]), tuple(order[:held]), tuple(order[count:]))


def _joined(parts: Sequence[Split]) -> Split:
    return Split(
        support=tuple(sorted(index for part in parts for index in part.support)),
        held_out=tuple(sorted(index for part in parts for index in part.held_out)),
        rest=tuple(sorted(index for part in parts for index in part.rest)),
    )


def _shuffled(members: list[int], key: str) -> list[int]:
    digest = hashlib.sha256(key.encode(errors="surrogatepass")).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
    return [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
