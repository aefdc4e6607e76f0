"""Which tensor of a fine-tune is which of its base, across the names that wrappers change.

Names propose, values decide. Equal names match first, then names that are equal without the parts
that wrappers put anywhere in them. What is left is matched by renamings: a prefix on one side for
one on the other. Where two renamings fit the same tensors, or equal names hold values that have
nothing in common, a few small matrices are read, and the renaming with the nearest values is taken.
Before that, last parts that libraries call otherwise (``gamma`` for ``weight``) and numbers of
layers that were moved are taken back to the base's. All steps are linear in the number of tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from svftool.auditing.likeness import FAR, NEAR, SAME, Likeness, Likenesses
from svftool.auditing.renaming import Renaming, RenamingSearch, doubtful_pairs, named_parts
from svftool.auditing.renumbering import Numbers, renumbered
from svftool.checkpoints import TensorInfo, plain_name
from svftool.errors import counted


@dataclass(frozen=True)
class NamePair:
    """One tensor on both sides: its name in the base and in the fine-tune."""

    base: str
    tuned: str


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
        theirs, moved, turned = renumbered(mine, base, theirs, tuned, numbers)

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
    search = RenamingSearch(named_parts(base), named_parts(tuned), Likenesses(base, likeness))
    doubtful = doubtful_pairs(found, base, tuned, search.values)
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
    values = Likenesses(base, likeness)
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
    said = (
        f"{counted(renamed, 'tensors')} matched whose names end otherwise, such as gamma for weight"
    )
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
    values: Likenesses,
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
    firsts: Sequence[str], seconds: Sequence[str], proposed: Mapping[str, str], values: Likenesses
) -> dict[str, str]:
    known = {(a, b): one[0] for a in firsts for b in seconds if (one := values.of([(a, b)]))}
    taken: dict[str, str] = {}
    for a in firsts:
        scores = {b: known[a, b] for b in seconds if (a, b) in known}
        wish = proposed.get(a)
        best = max(scores, key=lambda b: scores[b], default=None)
        if wish is not None and (wish not in scores or scores[wish] >= scores[str(best)] - SAME):
            if scores.get(wish, 1.0) >= FAR:
                taken[a] = wish
        elif best is not None and scores[best] >= NEAR:
            rivals = [s for b, s in scores.items() if b != best and s >= scores[best] - SAME]
            if not rivals:
                taken[a] = best
    counts = Counter(taken.values())
    return {a: b for a, b in taken.items() if counts[b] == 1}


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


def _gathered(
    base: Mapping[str, TensorInfo],
    tuned: Mapping[str, TensorInfo],
    found: Mapping[str, str],
    search: RenamingSearch,
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
