"""Whether one direction was removed from many weights, or scaled in them: directional ablation."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from svftool.auditing.alignment import nearest_direction
from svftool.auditing.directional import ChangedMatrix, Edit, Leading, Scaling, Side
from svftool.numerics.chance import log_aligned

CLEAN = 0.1
"""Part of the change along a direction that need not be explained by scaling it, noise apart."""

REMOVED = 0.05
"""Part that may be left along a direction that counts as removed, noise apart."""

EDITED = 0.5
"""Part of a matrix's change that scaled directions must hold; removed ones count whatever else
happened."""

ALONE = 0.8
"""The same where no other matrix has the direction."""

SHARED = 0.9
"""Squared cosine from which two matrices have a direction in common."""

CERTAIN = 1e-6
"""Chance of agreeing directions below which an edit is a finding."""

_CLEAR = 4.0
_WORST = 0.35
_AXIS = 0.98
_SEEDS = 64
_FEW = 3


@dataclass(frozen=True)
class _Clean:
    """The directions of one side of a matrix that were scaled and nothing else.

    Attributes
    ----------
    place : int
        Of the matrix in the list of all.
    side : {"output", "input"}
    basis : (k, width) Tensor
    kept, shares : tuple of float
        What is left along each, and its part of the change.
    slack : float
        How far rounding may have moved what is left.
    log_p : float
        Chance that a change with such directions on this side looks scaled.
    own : bool
        Whether they were chosen: no pair of singular vectors of the base, which a change of a
        singular value scales on both sides.
    """

    place: int
    side: Side
    basis: Tensor
    kept: tuple[float, ...]
    shares: tuple[float, ...]
    slack: float
    log_p: float
    own: bool


def find_edits(places: Sequence[ChangedMatrix], matrices: Mapping[str, int]) -> tuple[Edit, ...]:
    """Find directions that were scaled or removed in several matrices.

    Parameters
    ----------
    places : sequence of ChangedMatrix
    matrices : mapping of str to int
        How many matrices were compared, by name of the tensor.

    Returns
    -------
    tuple of Edit

    Notes
    -----
    A matrix counts where a leading direction of its change was removed, or scaled and that is half
    of its change or more, and nothing else happened along the direction. Where the verdict is that
    singular values alone changed, none was chosen. Rounding moves a direction; what it may move, to
    first order, is allowed. Matrices are together where they have the direction in common. That
    n - 1 of N - 1 others agree with one of N by chance has at most the probability
    ``N C(N - 1, n - 1) p^(n - 1)``, with p that of a random direction within the limit. Where no
    other matrix has the direction, the chance is that of the change's other vector lying where
    scaling puts it.
    """
    pools: dict[int, list[_Clean]] = {}
    for index, place in enumerate(places):
        for one in _clean(index, place, 2 * len(places) * len(place.leading.values)):
            pools.setdefault(one.basis.shape[1], []).append(one)
    found = [edit for pool in pools.values() for edit in _edits(pool, places, matrices)]
    return tuple(sorted(found, key=lambda one: -len(one.members)))


def _clean(index: int, place: ChangedMatrix, tests: int) -> Iterator[_Clean]:
    if place.spectral:
        return
    leading = place.leading
    blurs = [_blur(leading, i) for i in range(len(leading.values))]
    scaled = {side: _scaled(place.scaling(side), blurs) for side in _SIDES}
    for side, other in (_SIDES, _SIDES[::-1]):
        kept, off = place.scaling(side).kept, place.scaling(side).off
        chosen = scaled[side]
        if sum(leading.shares[i] for i in chosen) < EDITED:
            chosen = [i for i in chosen if abs(kept[i]) <= math.hypot(REMOVED, blurs[i] or 0.0)]
        if not chosen:
            continue
        width = place.directions(other).shape[1]
        yield _Clean(
            index,
            side,
            place.directions(side)[chosen].double(),
            tuple(kept[i] for i in chosen),
            tuple(leading.shares[i] for i in chosen),
            max(blurs[i] or 0.0 for i in chosen),
            max(log_aligned(1.0 - off[i] ** 2, width) for i in chosen) + math.log(tests),
            not set(chosen) & set(scaled[other]),
        )


_SIDES: tuple[Side, Side] = ("output", "input")


def _scaled(scaling: Scaling, blurs: Sequence[float | None]) -> list[int]:
    """List the directions along which nothing happened but scaling."""
    return [
        i
        for i, (off, blur) in enumerate(zip(scaling.off, blurs, strict=True))
        if blur is not None and off <= min(_WORST, math.hypot(CLEAN, blur))
    ]


def _blur(leading: Leading, i: int) -> float | None:
    """Return how far rounding noise moves what is seen along a direction; None where it hides it.

    The noise N adds ``u'N`` to the change along u, of about the size of its edge, and turns u by
    ``N v / s``, so that ``W'u`` is off by about ``|N| |W| / (s sqrt(mn))``.
    """
    s, entries = float(leading.values[i]), leading.left.shape[1] * leading.right.shape[1]
    if s <= _CLEAR * leading.edge or s <= 0.0:
        return None
    turned = math.sqrt(leading.noise / entries * leading.base_energy) / s**2
    return math.hypot(leading.edge / s, turned)


def _edits(
    pool: Sequence[_Clean], places: Sequence[ChangedMatrix], matrices: Mapping[str, int]
) -> Iterator[Edit]:
    """Take out one shared direction after another, and join those of the same matrices."""
    left = [one.basis for one in pool]
    groups: dict[tuple[int, ...], list[tuple[Tensor, float]]] = {}
    while True:
        direction, members = _most_shared(left)
        if len({pool[j].place for j in members}) < 2:
            break
        log_p = _log_chance(direction, [pool[j] for j in members], len(pool))
        if log_p >= math.log(CERTAIN):
            break
        groups.setdefault(tuple(members), []).append((direction, log_p))
        for j in members:
            left[j] = _without(left[j], direction)
    shared = [
        _edit([pool[j] for j in chosen], found, places, matrices)
        for chosen, found in groups.items()
    ]
    together = {pool[j].place for chosen in groups for j in chosen}
    alone = [
        _edit([one], [(row, one.log_p) for row in one.basis], places, matrices)
        for one in pool
        if one.own
        and one.place not in together
        and sum(one.shares) >= ALONE
        and one.log_p < math.log(CERTAIN)
    ]
    yield from _folded(shared, _FEW)
    yield from _folded(alone, 2)


def _folded(edits: Sequence[Edit], least: int) -> Iterator[Edit]:
    """Make one finding of as many that say the same of different matrices, each of few."""
    kinds: dict[tuple[str, bool, int], list[Edit]] = {}
    for one in edits:
        key = one.side, one.removed == len(one.members), len(one.members)
        kinds.setdefault(key, []).append(one)
    for (_, _, size), alike in kinds.items():
        names = [member for one in alike for member in one.members]
        if len(alike) < least or len(set(names)) < len(names):
            yield from alike
            continue
        counts = {one.kinds: one.of for one in alike}
        yield replace(
            alike[0],
            directions=torch.cat([one.directions for one in alike]),
            members=tuple(names),
            of=sum(counts.values()),
            kinds=tuple(dict.fromkeys(kind for one in alike for kind in one.kinds)),
            kept=tuple(kept for one in alike for kept in one.kept),
            removed=sum(one.removed for one in alike),
            share=math.fsum(one.share for one in alike) / len(alike),
            log_p=max(one.log_p for one in alike),
            axis=None,
            each=size,
        )


def _most_shared(bases: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """Return the direction that most subspaces hold, and which do."""
    rows = torch.cat(list(bases))
    if not len(rows):
        return rows, []
    owners = torch.tensor([j for j, basis in enumerate(bases) for _ in range(len(basis))])
    seeds = rows[torch.linspace(0, len(rows) - 1, min(len(rows), _SEEDS)).round().long()]
    shared = _overlaps(seeds, rows, owners, len(bases)) >= SHARED
    best = shared[int(shared.sum(dim=1).argmax())]
    direction, _ = nearest_direction(
        torch.cat([bases[j] for j in best.nonzero().flatten().tolist()])
    )
    members = _overlaps(direction[None], rows, owners, len(bases))[0] >= SHARED
    return direction, members.nonzero().flatten().tolist()


def _overlaps(seeds: Tensor, rows: Tensor, owners: Tensor, count: int) -> Tensor:
    """Return the squared lengths of unit vectors projected to subspaces, (seeds, count)."""
    squares = (seeds @ rows.mT).square()
    return squares.new_zeros(len(seeds), count).index_add_(1, owners, squares)


def _without(basis: Tensor, direction: Tensor) -> Tensor:
    """Return an orthonormal basis of a subspace without a direction that it holds."""
    turned: Tensor = torch.linalg.svd(basis - (basis @ direction)[:, None] * direction).Vh
    return turned[: len(basis) - 1]


def _log_chance(direction: Tensor, members: Sequence[_Clean], tested: int) -> float:
    width = len(direction)
    if float(direction.abs().max()) ** 2 >= _AXIS:  # pruned channels: one of `width` coordinates
        logs = [math.log(min(1.0, len(one.basis) / width)) for one in members]
    else:
        logs = [log_aligned(SHARED, width, len(one.basis)) for one in members]
    others = sorted(logs)[1:]
    ways = math.log(tested) + math.log(math.comb(tested - 1, len(others)))
    return min(0.0, ways + math.fsum(others))


def _edit(
    members: Sequence[_Clean],
    found: Sequence[tuple[Tensor, float]],
    places: Sequence[ChangedMatrix],
    matrices: Mapping[str, int],
) -> Edit:
    directions = torch.stack([direction for direction, _ in found])
    kept, shares, energies, removed = [], [], [], 0
    for one in members:
        weights = (directions @ one.basis.mT).square()
        each = (weights @ torch.tensor(one.kept, dtype=weights.dtype)) / weights.sum(dim=1)
        kept.append(float(each.mean()))
        removed += bool((each.abs() <= math.hypot(REMOVED, one.slack)).all())
        shares.append(float((weights @ torch.tensor(one.shares, dtype=weights.dtype)).sum()))
        energies.append(places[one.place].leading.energy)
    names = [places[one.place].name for one in members]
    kinds = tuple(dict.fromkeys(map(kind_of, names)))
    sides = {one.side for one in members}
    peak = int(directions[0].abs().argmax())
    return Edit(
        side=sides.pop() if len(sides) == 1 else "output or input",
        directions=directions,
        members=tuple((places[one.place].name, places[one.place].index) for one in members),
        of=sum(count for name, count in matrices.items() if kind_of(name) in kinds),
        kinds=kinds,
        kept=tuple(kept),
        removed=removed,
        share=math.fsum(s * e for s, e in zip(shares, energies, strict=True)) / sum(energies),
        log_p=max(log_p for _, log_p in found),
        axis=peak if float(directions[0, peak]) ** 2 >= _AXIS and len(found) == 1 else None,
    )


_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def kind_of(name: str) -> str:
    """Return the name of a tensor with the numbers of its blocks taken out.

    Examples
    --------
    >>> kind_of("model.layers.11.mlp.down_proj.weight")
    'model.layers.*.mlp.down_proj.weight'
    """
    return _NUMBER.sub("*", name)
