"""Which tensor of a fine-tune is which of its base, across the names that wrappers change.

Names propose, values decide. Equal names match first, then names that are equal without the parts
that wrappers put anywhere in them. What is left is matched by renamings: a prefix on one side for
one on the other. Where two renamings fit the same tensors, or equal names hold values that have
nothing in common, a few small matrices are read, and the renaming with the nearest values is taken.
Before that, last parts that libraries call otherwise (``gamma`` for ``weight``) and numbers of
layers that were moved are taken back to the base's. All steps are linear in the number of tensors.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from svftool.checkpoints import TensorInfo, plain_name
from svftool.errors import shortlist

PREFIXES = (
    "module.", "_orig_mod.", "model.", "backbone.", "body.", "encoder.", "base_model.",
    "base_model.model.", "transformer.", "state_dict.", "net.", "network.", "student.",
)  # fmt: skip
"""What wrappers and detectors put before the names of a backbone: one tensor is enough to take
them for a prefix. Any other needs `ENOUGH` tensors that agree, or values that do."""

ENOUGH = 3

Likeness = Callable[[str, str], tuple[float, float] | None]
"""Of a tensor of the base and one of the fine-tune: their cosine, and the norm of the difference
over that of the base's. None where values cannot tell."""

Numbers = Callable[[str, bool], Tensor | None]
"""Some numbers of a tensor of the base, or of the fine-tune where True; always the same places."""

_FAR, _NEAR = 0.2, 0.5
_SAME = 0.05
_SAMPLES, _STRATA, _READS = 3, 32, 1024
_CROWD = 64


@dataclass(frozen=True)
class NamePair:
    """One tensor on both sides: its name in the base and in the fine-tune."""

    base: str
    tuned: str


@dataclass(frozen=True)
class Renaming:
    """A prefix on either side that stands for one on the other, and how many tensors it matched.

    A part ``#`` stands for the same number on both sides.
    """

    base: str
    tuned: str
    count: int

    def __str__(self) -> str:
        return (
            f"{self.count} tensors matched by taking {self.base or 'nothing'!r} off the base's "
            f"names and {self.tuned or 'nothing'!r} off the fine-tune's"
        )

    @property
    def ways(self) -> str:
        """The two prefixes in short."""
        return f"{self.base or 'nothing'!r} for {self.tuned or 'nothing'!r}"


@dataclass(frozen=True)
class Matching:
    """How the tensors of two checkpoints correspond; every tensor of both sides is in one place.

    Attributes
    ----------
    pairs : tuple of NamePair
        Same name up to prefixes, same shape; in the base's order.
    misshapen : tuple of NamePair
        Same name, another shape.
    base_only, tuned_only : tuple of str
        Names without a counterpart.
    renamings : tuple of Renaming
        The prefixes that were dropped, those with the most tensors first.
    unwrapped : int
        Tensors whose names are equal without the parts of wrappers.
    ties : tuple of (Renaming, Renaming)
        Renamings that fit the same tensors equally well; those tensors have no counterpart.
    moved : tuple of str
        Which layers have another number, and which tensors another last part, as sentences.
    crossed : tuple of NamePair
        Pairs whose base's name is that of another tensor in the fine-tune, which a program that
        goes by names would load in its place.
    """

    pairs: tuple[NamePair, ...]
    misshapen: tuple[NamePair, ...]
    base_only: tuple[str, ...]
    tuned_only: tuple[str, ...]
    renamings: tuple[Renaming, ...] = ()
    unwrapped: int = 0
    ties: tuple[tuple[Renaming, Renaming], ...] = ()
    moved: tuple[str, ...] = ()
    crossed: tuple[NamePair, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What was dropped, as sentences."""
        wrapped = f"{self.unwrapped} tensors matched by taking wrappers out of their names"
        said = (*((wrapped,) if self.unwrapped else ()), *map(str, self.renamings))
        return (*said, *self.moved)

    def say_tie(self) -> str:
        """Name the renamings of the first tie."""
        first, second = self.ties[0]
        return (
            f"{first.count} tensors fit in two ways that values do not tell apart: taking "
            f"{first.ways}, or {second.ways}"
        )


def match_names(
    base: Mapping[str, TensorInfo],
    tuned: Mapping[str, TensorInfo],
    likeness: Likeness | None = None,
    numbers: Numbers | None = None,
) -> Matching:
    """Match the tensors of two checkpoints by name, shape and, where names do not tell, values.

    Parameters
    ----------
    base, tuned : mapping of str to TensorInfo
        Tensors of both sides.
    likeness : callable, optional
        Compares the values of two tensors of one shape; without it names decide alone.
    numbers : callable, optional
        Some numbers of a tensor; without it layers keep their numbers.
    """
    mine, theirs = _usual_names(base, tuned), _usual_names(tuned, base)
    moved: list[str] = []
    turned: set[str] = set()
    if numbers is not None:
        theirs, moved, turned = _renumbered(mine, base, theirs, tuned, numbers)

    def like(a: str, b: str) -> tuple[float, float] | None:
        return None if likeness is None else likeness(mine[a], theirs[b])

    sides = [
        {alias: infos[name] for alias, name in names.items()}
        for names, infos in ((mine, base), (theirs, tuned))
    ]
    matching = _match(sides[0], sides[1], None if likeness is None else like)
    found = _by_own_names(matching, mine, theirs, base, tuned, likeness, moved)
    crossed = _crossed(found, tuned)
    known = {one.base for one in crossed}
    also = (one for one in found.pairs if one.tuned in turned and one.base not in known)
    return replace(found, crossed=(*crossed, *also))


def _match(
    base: Mapping[str, TensorInfo], tuned: Mapping[str, TensorInfo], likeness: Likeness | None
) -> Matching:
    found = {name: name for name in base if name in tuned}
    wrapped = _unwrapped(base, tuned, found)
    found |= wrapped
    search = _Search(_named(base), _named(tuned), _Values(base, likeness))
    doubtful = _doubtful(found, base, tuned, search.values)
    taken = {found[name] for name in found if name not in doubtful}
    left = [name for name in base if name not in found or name in doubtful]
    right = [name for name in tuned if name not in taken]
    if left and right:
        firm = {name: other for name, other in found.items() if name not in doubtful}
        renamed = search.run(left, right, set(doubtful), set(doubtful.values()))
        firm |= renamed
        used = set(firm.values())
        firm |= {a: b for a, b in doubtful.items() if a not in firm and b not in used}
        found = firm
        search.place_misshapen(found, left, right)
    unwrapped = sum(found.get(name) == other for name, other in wrapped.items())
    return _gathered(base, tuned, found, search, unwrapped)


# Last parts of a name that say the same.


_USUAL = {"gamma": "weight", "beta": "bias", "g": "weight", "b": "bias", "w": "weight"} | {
    "scale": "weight"
}
_PARAMETRISED = {"original0": "_g", "original1": "_v", "original": "_orig"}


def _usual_names(
    infos: Mapping[str, TensorInfo], other: Mapping[str, TensorInfo]
) -> dict[str, str]:
    """Return own names by those they are matched under: usual ones where only the other has them.

    A name that two tensors of a side would get is left to neither.
    """
    wanted = {name: name if name in other else _usual(name) for name in infos}
    counts = Counter(wanted.values())
    return {(wish if counts[wish] == 1 else name): name for name, wish in wanted.items()}


def _usual(name: str) -> str:
    """Return a name with the last part that most libraries use.

    Examples
    --------
    >>> _usual("LayerNorm.gamma"), _usual("conv.parametrizations.weight.original0")
    ('LayerNorm.weight', 'conv.weight_g')
    """
    *module, last = name.split(".")
    if len(module) > 1 and module[-2] == "parametrizations" and last in _PARAMETRISED:
        return ".".join((*module[:-2], module[-1] + _PARAMETRISED[last]))
    return ".".join((*module, _USUAL.get(last, last)))


def _by_own_names(
    matching: Matching,
    mine: Mapping[str, str],
    theirs: Mapping[str, str],
    base: Mapping[str, TensorInfo],
    tuned: Mapping[str, TensorInfo],
    likeness: Likeness | None,
    moved: Sequence[str],
) -> Matching:
    """Return a matching by the tensors' own names, with last parts that values decide."""
    values = _Values(base, likeness)
    pairs = {mine[pair.base]: theirs[pair.tuned] for pair in matching.pairs}
    misshapen = tuple(NamePair(mine[one.base], theirs[one.tuned]) for one in matching.misshapen)
    changed = {a: b for a, b in pairs.items() if _last(a) != _last(b)}
    left = [mine[name] for name in matching.base_only]
    right = [theirs[name] for name in matching.tuned_only]
    decided = _last_parts(changed, left, right, base, tuned, values)
    for name in changed:
        del pairs[name]
    pairs |= decided
    used = {*pairs.values(), *(one.tuned for one in misshapen)}
    placed = {*pairs, *(one.base for one in misshapen)}
    renamed = sum(_last(a) != _last(b) for a, b in decided.items())
    said = f"{renamed} tensors matched whose names end otherwise, such as gamma for weight"
    return replace(
        matching,
        pairs=tuple(NamePair(name, pairs[name]) for name in base if name in pairs),
        misshapen=misshapen,
        base_only=tuple(name for name in base if name not in placed),
        tuned_only=tuple(name for name in tuned if name not in used),
        moved=(*moved, *((said,) if renamed else ())),
    )


def _crossed(matching: Matching, tuned: Mapping[str, TensorInfo]) -> tuple[NamePair, ...]:
    """Return pairs where the fine-tune has the base's name, under its usual prefix, for another."""
    most = max(matching.renamings, key=lambda one: one.count, default=None)
    prefixes = [("", "")]
    if most is not None and "#" not in most.base + most.tuned:
        prefixes.append((most.base, most.tuned))
    return tuple(
        pair
        for pair in matching.pairs
        if pair.base != pair.tuned
        and any(
            pair.base.startswith(mine)
            and (same := theirs + pair.base.removeprefix(mine)) != pair.tuned
            and same in tuned
            for mine, theirs in prefixes
        )
    )


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _module(name: str) -> str:
    return plain_name(name).rpartition(".")[0]


def _last_parts(
    proposed: Mapping[str, str],
    left: Sequence[str],
    right: Sequence[str],
    base: Mapping[str, TensorInfo],
    tuned: Mapping[str, TensorInfo],
    values: _Values,
) -> dict[str, str]:
    """Match tensors of one module and shape whose last parts differ; names propose, values decide.

    Where values know none of them the proposal stands, and what names do not propose is left out.
    """
    groups: dict[tuple[str, str, tuple[int, ...]], tuple[list[str], list[str]]] = {}
    homes = {_module(a): _module(b) for a, b in proposed.items()}
    for a in (*proposed, *left):
        home = homes.get(_module(a), _module(a))
        groups.setdefault((home, "", base[a].shape), ([], []))[0].append(a)
    for b in (*proposed.values(), *right):
        group = groups.get((_module(b), "", tuned[b].shape))
        if group is not None:
            group[1].append(b)
    found: dict[str, str] = {}
    for firsts, seconds in groups.values():
        if seconds and len(firsts) <= _FEW and len(seconds) <= _FEW:
            found |= _decided(firsts, seconds, proposed, values)
        else:
            found |= {a: proposed[a] for a in firsts if a in proposed}
    return found


_FEW = 8


def _decided(
    firsts: Sequence[str], seconds: Sequence[str], proposed: Mapping[str, str], values: _Values
) -> dict[str, str]:
    known = {(a, b): one[0] for a in firsts for b in seconds if (one := values.of([(a, b)]))}
    taken: dict[str, str] = {}
    for a in firsts:
        scores = {b: known[a, b] for b in seconds if (a, b) in known}
        wish = proposed.get(a)
        best = max(scores, key=lambda b: scores[b], default=None)
        if wish is not None and (wish not in scores or scores[wish] >= scores[str(best)] - _SAME):
            if scores.get(wish, 1.0) >= _FAR:
                taken[a] = wish
        elif best is not None and scores[best] >= _NEAR:
            rivals = [s for b, s in scores.items() if b != best and s >= scores[best] - _SAME]
            if not rivals:
                taken[a] = best
    counts = Counter(taken.values())
    return {a: b for a, b in taken.items() if counts[b] == 1}


# Layers that have another number in the fine-tune: moved, turned round, or some left out.


_Series = dict[str, dict[str, str]]
_LAYERS, _CHECKED, _SMALL = 256, 4, 1 << 16


def _renumbered(
    mine: Mapping[str, str],
    base: Mapping[str, TensorInfo],
    theirs: Mapping[str, str],
    tuned: Mapping[str, TensorInfo],
    numbers: Numbers,
) -> tuple[dict[str, str], list[str], set[str]]:
    """Give layers of the fine-tune the numbers of those of the base that hold their values.

    Returns
    -------
    renamed : dict of str to str
        `theirs` under those numbers.
    said : list of str
        What was renumbered, as sentences.
    turned : set of str
        Tensors of series in which a later layer of the base comes earlier.
    """
    ours, others = _all_series(mine), _all_series(theirs)
    renamed, said, turned = dict(theirs), [], set()
    for prefix, other in _series_pairs(ours, others):
        one = ours[prefix]
        shape = {tail: base[mine[name]] for layer in one.values() for tail, name in layer.items()}
        rival = {
            tail: tuned[theirs[name]]
            for layer in others[other].values()
            for tail, name in layer.items()
        }
        tail = _telling(one, others[other], shape, rival)
        if tail is None:
            continue
        first = {i: mine[layer[tail]] for i, layer in one.items() if tail in layer}
        second = {i: theirs[layer[tail]] for i, layer in others[other].items() if tail in layer}
        order = _order(first, second, shape[tail].numel, numbers)
        if not order:
            continue
        path = [int(order[index]) for index in sorted(order, key=int)]
        if path != sorted(path):
            turned |= {theirs[name] for layer in others[other].values() for name in layer.values()}
        # What holds no layer of the base gets a number that no layer of it has.
        renamed |= {
            _at(name, other, order.get(index, f"{index}'")): renamed.pop(name)
            for index, layer in others[other].items()
            for name in layer.values()
        }
        changes = [f"{index} for {order[index]}" for index in order if order[index] != index]
        said.append(
            f"{len(order)} layers of {other.rstrip('.')} matched in another order: "
            f"{shortlist(changes, 4)}"
        )
    return renamed, said, turned


def _all_series(names: Iterable[str]) -> dict[str, _Series]:
    """Return names by what stands before their first number, the number, and what follows."""
    found: dict[str, _Series] = {}
    for name in names:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts[:-1]) if part.isdecimal()), None)
        if at is not None:
            prefix = "".join(f"{part}." for part in parts[:at])
            tail = plain_name(".".join(parts[at + 1 :]))
            found.setdefault(prefix, {}).setdefault(parts[at], {})[tail] = name
    return found


def _series_pairs(
    ours: Mapping[str, _Series], others: Mapping[str, _Series]
) -> Iterator[tuple[str, str]]:
    """Yield the series of both sides that correspond by their prefix, or else by what they hold."""
    plain: dict[str, list[str]] = defaultdict(list)
    for prefix in others:
        plain[plain_name(f"{prefix}x")].append(prefix)
    left, used = [], set()
    for prefix in ours:
        same = [prefix] if prefix in others else plain.get(plain_name(f"{prefix}x"), [])
        if len(same) == 1:
            used.add(same[0])
            yield prefix, same[0]
        else:
            left.append(prefix)
    held: dict[frozenset[str], list[str]] = defaultdict(list)
    for prefix in others:
        if prefix not in used:
            held[_tails(others[prefix])].append(prefix)
    for prefix in left:
        alike = held.get(_tails(ours[prefix]), [])
        if len(alike) == 1 and sum(_tails(ours[p]) == _tails(ours[prefix]) for p in left) == 1:
            yield prefix, alike[0]


def _tails(series: _Series) -> frozenset[str]:
    return frozenset(tail for layer in series.values() for tail in layer)


def _telling(
    one: _Series,
    other: _Series,
    shapes: Mapping[str, TensorInfo],
    rivals: Mapping[str, TensorInfo],
) -> str | None:
    """Return the smallest matrix that most layers of both sides have."""
    if not 1 < len(one) <= _LAYERS or len(other) > _LAYERS:
        return None
    counts = Counter(tail for layer in (*one.values(), *other.values()) for tail in layer)
    fit = [
        (-counts[tail], info.numel, tail)
        for tail, info in shapes.items()
        if tail in rivals
        and rivals[tail].shape == info.shape
        and len(info.shape) > 1
        and info.numel >= 16
    ]
    return min(fit)[2] if fit else None


def _order(
    first: Mapping[str, str], second: Mapping[str, str], size: int, numbers: Numbers
) -> dict[str, str]:
    """Return the base's number of each layer of the fine-tune; empty where all have their own."""
    common = sorted(first.keys() & second.keys(), key=int)
    step = 1 if size <= _SMALL else max(1, len(common) // _CHECKED)
    checked = {*common[::step], *common[-1:]}
    read: dict[tuple[str, bool], Tensor | None] = {}

    def unit(name: str, side: bool) -> Tensor | None:
        if (name, side) not in read:
            read[name, side] = numbers(name, side)
        return read[name, side]

    def stays(index: str) -> bool:
        a, b = unit(first[index], False), unit(second[index], True)
        return a is None or b is None or len(a) != len(b) or abs(float(a @ b)) >= _FAR

    if common and all(stays(index) for index in checked):
        return {}
    rows = {i: v for i, name in first.items() if (v := unit(name, False)) is not None}
    columns = {i: v for i, name in second.items() if (v := unit(name, True)) is not None}
    if not rows or not columns or len({len(v) for v in (*rows.values(), *columns.values())}) > 1:
        return {}
    cosines = (torch.stack(list(columns.values())) @ torch.stack(list(rows.values())).T).abs()
    mine, found = list(rows), {}
    for index, near in zip(columns, cosines, strict=True):
        best = int(near.argmax())
        # A tie is no order, and neither is a layer that two of the fine-tune came from.
        rivals = (near >= near[best] - _SAME).sum() + (cosines[:, best] >= near[best] - _SAME).sum()
        if near[best] >= _NEAR and rivals == 2:
            found[index] = mine[best]
    return found if any(index != other for index, other in found.items()) else {}


def _at(name: str, prefix: str, number: str) -> str:
    rest = name.removeprefix(prefix).partition(".")[2]
    return f"{prefix}{number}.{rest}"


def say_shapes(before: tuple[int, ...], after: tuple[int, ...]) -> str:
    """Say that a tensor has another shape in the fine-tune than in the base."""
    hint = ", stored transposed" if len(before) == 2 and before == after[::-1] else ""
    return f"shape {before} in the base, {after} in the fine-tune{hint}"


def _unwrapped(
    base: Mapping[str, TensorInfo], tuned: Mapping[str, TensorInfo], found: Mapping[str, str]
) -> dict[str, str]:
    """Match what is equal without wrappers, where one tensor of either side has that name."""
    taken = set(found.values())
    sides: list[dict[str, list[str]]] = [{}, {}]
    for groups, names in zip(
        sides, ((n for n in base if n not in found), (n for n in tuned if n not in taken)),
        strict=True,
    ):  # fmt: skip
        for name in names:
            groups.setdefault(plain_name(name), []).append(name)
    return {
        mine[0]: sides[1][plain][0]
        for plain, mine in sides[0].items()
        if len(mine) == len(sides[1].get(plain, ())) == 1
    }


@dataclass(frozen=True)
class _Name:
    """A name in parts, without wrappers where the rest tells it from all others."""

    parts: tuple[str, ...]
    shape: tuple[int, ...]

    def splits(self) -> Iterator[tuple[int, tuple[str, ...], str]]:
        """Yield where the tail begins, the numbers before it, and the tail."""
        numbers: tuple[str, ...] = ()
        tail = ".".join(self.parts)
        for index, part in enumerate(self.parts):
            yield index, numbers, tail
            tail = tail[len(part) + 1 :]
            if part.isdecimal():
                numbers = (*numbers, part)

    def prefix(self, end: int, *, literal: bool) -> str:
        """Return the parts before a tail, numbers as ``#`` unless asked for literally."""
        return "".join(
            f"{'#' if part.isdecimal() and not literal else part}." for part in self.parts[:end]
        )


def _named(infos: Mapping[str, TensorInfo]) -> dict[str, _Name]:
    plain = {name: plain_name(name) for name in infos}
    counts = Counter(plain.values())
    return {
        name: _Name(
            tuple((plain[name] if counts[plain[name]] == 1 else name).split(".")), one.shape
        )
        for name, one in infos.items()
    }


@dataclass
class _Values:
    """Reads a bounded number of small matrices, each pair of them once."""

    infos: Mapping[str, TensorInfo]
    likeness: Likeness | None
    known: dict[tuple[str, str], tuple[float, float] | None] = field(default_factory=dict)

    def of(self, pairs: Iterable[tuple[str, str]]) -> tuple[float, float] | None:
        """Return the lowest absolute cosine and the mean distance of a few pairs."""
        found = [one for pair in pairs if (one := self._of_one(pair)) is not None]
        if not found:
            return None
        return min(abs(c) for c, _ in found), sum(d for _, d in found) / len(found)

    def sample(self, pairs: Sequence[tuple[str, str]], count: int) -> list[tuple[str, str]]:
        """Choose the smallest matrices that tell something."""
        sizes = ((self.infos[pair[0]], pair) for pair in pairs)
        fit = [(one.numel, pair) for one, pair in sizes if len(one.shape) > 1 and one.numel >= 16]
        return [pair for _, pair in heapq.nsmallest(count, fit)]

    def _of_one(self, pair: tuple[str, str]) -> tuple[float, float] | None:
        if self.likeness is None:
            return None
        if pair not in self.known:
            spent = len(self.known) >= _READS
            self.known[pair] = None if spent else self.likeness(*pair)
        return self.known[pair]


def _doubtful(
    found: Mapping[str, str],
    base: Mapping[str, TensorInfo],
    tuned: Mapping[str, TensorInfo],
    values: _Values,
) -> dict[str, str]:
    """Return pairs of equal names that may be wrong: other shapes, or values far from each other.

    The values of a part of the network are judged by a few of its matrices.
    """
    doubtful = {a: b for a, b in found.items() if base[a].shape != tuned[b].shape}
    strata: dict[tuple[str, ...], list[tuple[str, str]]] = defaultdict(list)
    for name, other in found.items():
        if name not in doubtful:
            strata[_stratum(name)].append((name, other))
    for pairs in heapq.nlargest(_STRATA, strata.values(), key=len):
        judged = values.of(values.sample(pairs, 1))
        if judged is not None and judged[0] < _FAR:
            more = [values.of([pair]) for pair in values.sample(pairs, _SAMPLES)]
            if all(one is None or one[0] < _FAR for one in more):
                doubtful |= dict(pairs)
    return doubtful


def _stratum(name: str) -> tuple[str, ...]:
    """Return the parts of a name's module, the same for every number in it."""
    return tuple("#" if part.isdecimal() else part for part in name.split(".")[:-1])


_Key = tuple[str, str]
_Pairs = list[tuple[str, str]]


class _Search:
    """Finds the renamings that match what equal names have left."""

    def __init__(
        self, base: Mapping[str, _Name], tuned: Mapping[str, _Name], values: _Values
    ) -> None:
        self.base, self.tuned, self.values = base, tuned, values
        self.renamings: list[Renaming] = []
        self.ties: list[tuple[Renaming, Renaming]] = []
        self._doubtful: tuple[set[str], set[str]] = (set(), set())
        self._votes: dict[_Key, _Pairs] = {}
        self._keys: tuple[dict[str, list[_Key]], dict[str, list[_Key]]] = ({}, {})
        self._found: dict[str, str] = {}
        self._used: set[str] = set()

    def run(
        self, left: Sequence[str], right: Sequence[str], mine: set[str], theirs: set[str]
    ) -> dict[str, str]:
        """Match what is left; `mine` and `theirs` are matched already and need better values."""
        self._doubtful = mine, theirs
        self._votes = _votes(self.base, self.tuned, left, right)
        self._keys = defaultdict(list), defaultdict(list)
        for key, pairs in self._votes.items():
            for side, names in zip(self._keys, zip(*pairs, strict=True), strict=True):
                for name in names:
                    side[name].append(key)
        heap = [self._entry(key, len(pairs)) for key, pairs in self._votes.items()]
        heapq.heapify(heap)
        while heap:
            count, _, key = heapq.heappop(heap)
            pairs = self._free(key)
            if pairs and len(pairs) < -count:
                heapq.heappush(heap, self._entry(key, len(pairs)))
            elif pairs:
                best = self._decide(key, pairs)
                if best is not None and best != key:
                    heapq.heappush(heap, self._entry(key, len(pairs)))
        return self._found

    def _entry(self, key: _Key, count: int) -> tuple[int, int, _Key]:
        # Of prefixes that match as many tensors the shortest comes first.
        return -count, len(key[0]) + len(key[1]), key

    def _free(self, key: _Key) -> _Pairs:
        return [(a, b) for a, b in self._votes[key] if a not in self._found and b not in self._used]

    def _decide(self, key: _Key, pairs: _Pairs) -> _Key | None:
        """Take a renaming, or the rival that values favour; None where neither is taken."""
        best, kept = key, pairs
        for rival in self._rivals(key, pairs):
            others = self._free(rival)
            better = self._better(kept, others)
            if better is None and len(others) == len(kept):
                if self._known(best, kept) and not self._doubted(kept + others):
                    self.ties.append((Renaming(*best, len(kept)), Renaming(*rival, len(others))))
                self._votes[key] = self._votes[rival] = []
                return None
            if better:
                best, kept = rival, others
        if not self._acceptable(best, kept):
            self._votes[best] = []
            return None if best == key else best
        self._found |= dict(kept)
        self._used |= {other for _, other in kept}
        self.renamings.append(Renaming(*best, len(kept)))
        return best

    def _rivals(self, key: _Key, pairs: _Pairs) -> list[_Key]:
        """List the renamings that would match at least half of the same tensors otherwise."""
        shared: Counter[_Key] = Counter()
        for a, b in pairs:
            shared.update({*self._keys[0][a], *self._keys[1][b]} - {key})
        likely = [one for one, count in shared.items() if 2 * count >= len(pairs)]
        return sorted(likely, key=lambda one: (-shared[one], one))

    def _better(self, pairs: _Pairs, others: _Pairs) -> bool | None:
        """Whether the others' values are nearer; None where there is nothing to choose by."""
        lefts, rights = {a for a, _ in others}, {b for _, b in others}
        common = [(a, b) for a, b in pairs if a in lefts or b in rights]
        if not common:
            return False
        sample = self.values.sample(common, _SAMPLES)
        mine = {a for a, _ in sample}, {b for _, b in sample}
        theirs = [(a, b) for a, b in others if a in mine[0] or b in mine[1]]
        ours, rival = self.values.of(sample), self.values.of(theirs[: 2 * _SAMPLES])
        if ours is None or rival is None or (ours[0] < _FAR and rival[0] < _FAR):
            return None
        if abs(ours[1] - rival[1]) <= _SAME * max(ours[1], rival[1]):
            return None
        return rival[1] < ours[1]

    def _acceptable(self, key: _Key, pairs: _Pairs) -> bool:
        if self._known(key, pairs) and not self._doubted(pairs):
            return True
        near = self.values.of(self.values.sample(pairs, _SAMPLES))
        return near is not None and near[0] >= _NEAR

    def _doubted(self, pairs: _Pairs) -> bool:
        """Whether a tensor has a counterpart of its own name, which only values could overrule."""
        return any(a in self._doubtful[0] or b in self._doubtful[1] for a, b in pairs)

    def _known(self, key: _Key, pairs: _Pairs) -> bool:
        """Whether names alone are enough: usual prefixes, or enough tensors under one prefix."""
        if all(not prefix or prefix in PREFIXES for prefix in key):
            return True
        ends = [prefix.count(".") for prefix in key]
        literal = Counter(self.base[a].prefix(ends[0], literal=True) for a, _ in pairs)
        return max(literal.values()) >= ENOUGH

    def place_misshapen(
        self, found: dict[str, str], left: Iterable[str], right: Iterable[str]
    ) -> None:
        """Match what a renaming fits by name, in another shape."""
        used = set(found.values())
        free = {".".join(self.tuned[name].parts): name for name in right if name not in used}
        by_prefix: dict[str, list[str]] = defaultdict(list)
        for one in self.renamings:
            by_prefix[one.base].append(one.tuned)
        for name in left:
            if name in found or not free:
                continue
            for other in self._renamed(self.base[name], by_prefix):
                if other in free:
                    found[name] = free.pop(other)
                    break

    def _renamed(self, name: _Name, by_prefix: Mapping[str, list[str]]) -> Iterator[str]:
        for end, numbers, tail in name.splits():
            for literal in (False, True):
                for tuned in by_prefix.get(name.prefix(end, literal=literal), ()):
                    parts = iter(numbers)
                    filled = [next(parts, "#") if p == "#" else p for p in tuned.split(".")]
                    yield ".".join(filled) + tail


def _votes(
    base: Mapping[str, _Name],
    tuned: Mapping[str, _Name],
    left: Iterable[str],
    right: Sequence[str],
) -> dict[_Key, _Pairs]:
    """Gather the pairs of names with one longest common tail, by what stands before it.

    Numbers before the tail must be equal on both sides; or one side has none, and the other's are
    part of the prefix. Tails that many tensors share say nothing and are passed over.
    """
    tails = _Tails(tuned, right, _unnumbered(base, left))
    votes: dict[_Key, _Pairs] = {}
    for name in left:
        one = base[name]
        for end, numbers, tail in one.splits():
            for theirs, start, literal in tails.find(tail, one.shape, numbers):
                two = tuned[theirs]
                if end and start and one.parts[end - 1] == two.parts[start - 1]:
                    continue  # a longer tail is common
                key = one.prefix(end, literal=literal), two.prefix(start, literal=literal)
                votes.setdefault(key, []).append((name, theirs))
    return votes


_Tail = tuple[str, tuple[int, ...]]


def _unnumbered(names: Mapping[str, _Name], chosen: Iterable[str]) -> set[_Tail]:
    """Return the tails before which a name has no number."""
    found: set[_Tail] = set()
    for name in chosen:
        one = names[name]
        found.update((tail, one.shape) for _, numbers, tail in one.splits() if not numbers)
    return found


class _Tails:
    """The tensors of the fine-tune by the ends of their names."""

    def __init__(
        self, names: Mapping[str, _Name], chosen: Iterable[str], wanted: set[_Tail]
    ) -> None:
        self._equal: dict[tuple[_Tail, tuple[str, ...]], list[tuple[str, int]]] = {}
        self._numbered: dict[_Tail, list[tuple[str, int]]] = {}
        for name in chosen:
            one = names[name]
            for end, numbers, text in one.splits():
                tail = text, one.shape
                self._equal.setdefault((tail, numbers), []).append((name, end))
                if numbers and tail in wanted:
                    self._numbered.setdefault(tail, []).append((name, end))

    def find(
        self, text: str, shape: tuple[int, ...], numbers: tuple[str, ...]
    ) -> Iterator[tuple[str, int, bool]]:
        """Yield names with a tail, where it begins, and whether numbers belong to the prefix."""
        tail = text, shape
        same = self._equal.get((tail, numbers), ())
        other = self._equal.get((tail, ()), ()) if numbers else self._numbered.get(tail, ())
        for found, literal in ((same, False), (other, True)):
            if len(found) <= _CROWD:
                yield from ((name, start, literal) for name, start in found)


def _gathered(
    base: Mapping[str, TensorInfo],
    tuned: Mapping[str, TensorInfo],
    found: Mapping[str, str],
    search: _Search,
    unwrapped: int,
) -> Matching:
    both = [NamePair(name, found[name]) for name in base if name in found]
    fits = [base[pair.base].shape == tuned[pair.tuned].shape for pair in both]
    taken = set(found.values())
    return Matching(
        pairs=tuple(pair for pair, fit in zip(both, fits, strict=True) if fit),
        misshapen=tuple(pair for pair, fit in zip(both, fits, strict=True) if not fit),
        base_only=tuple(name for name in base if name not in found),
        tuned_only=tuple(name for name in tuned if name not in taken),
        renamings=tuple(search.renamings),
        unwrapped=unwrapped,
        ties=tuple(search.ties),
    )
