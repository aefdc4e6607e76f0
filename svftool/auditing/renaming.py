"""Renamings that match what equal names leave: a prefix on one side for one on the other."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from svftool.auditing.likeness import FAR, NEAR, SAME, Likenesses
from svftool.checkpoints import TensorInfo, plain_name
from svftool.errors import counted

PREFIXES = (
    "module.", "_orig_mod.", "model.", "backbone.", "body.", "encoder.", "base_model.",
    "base_model.model.", "transformer.", "state_dict.", "net.", "network.", "student.",
)  # fmt: skip
"""What wrappers and detectors put before the names of a backbone: one tensor is enough to take
them for a prefix. Any other needs `ENOUGH` tensors that agree, or values that do."""

ENOUGH = 3
_SAMPLES = 3
_STRATA = 32
_CROWD = 64


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
            f"{counted(self.count, 'tensors')} matched by taking {self.base or 'nothing'!r} off "
            f"the base's names and {self.tuned or 'nothing'!r} off the fine-tune's"
        )

    @property
    def ways(self) -> str:
        """The two prefixes in short."""
        return f"{self.base or 'nothing'!r} for {self.tuned or 'nothing'!r}"


@dataclass(frozen=True)
class NameParts:
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


def named_parts(infos: Mapping[str, TensorInfo]) -> dict[str, NameParts]:
    """Return each name in parts, without wrappers where that leaves it the only one."""
    plain = {name: plain_name(name) for name in infos}
    counts = Counter(plain.values())
    return {
        name: NameParts(
            tuple((plain[name] if counts[plain[name]] == 1 else name).split(".")), one.shape
        )
        for name, one in infos.items()
    }


def doubtful_pairs(
    found: Mapping[str, str],
    base: Mapping[str, TensorInfo],
    tuned: Mapping[str, TensorInfo],
    values: Likenesses,
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
        if judged is not None and judged[0] < FAR:
            more = [values.of([pair]) for pair in values.sample(pairs, _SAMPLES)]
            if all(one is None or one[0] < FAR for one in more):
                doubtful |= dict(pairs)
    return doubtful


def _stratum(name: str) -> tuple[str, ...]:
    """Return the parts of a name's module, the same for every number in it."""
    return tuple("#" if part.isdecimal() else part for part in name.split(".")[:-1])


_Key = tuple[str, str]

_Pairs = list[tuple[str, str]]


class RenamingSearch:
    """Finds the renamings that match what equal names have left."""

    def __init__(
        self, base: Mapping[str, NameParts], tuned: Mapping[str, NameParts], values: Likenesses
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
        if ours is None or rival is None or (ours[0] < FAR and rival[0] < FAR):
            return None
        if abs(ours[1] - rival[1]) <= SAME * max(ours[1], rival[1]):
            return None
        return rival[1] < ours[1]

    def _acceptable(self, key: _Key, pairs: _Pairs) -> bool:
        if self._known(key, pairs) and not self._doubted(pairs):
            return True
        near = self.values.of(self.values.sample(pairs, _SAMPLES))
        return near is not None and near[0] >= NEAR

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

    def _renamed(self, name: NameParts, by_prefix: Mapping[str, list[str]]) -> Iterator[str]:
        for end, numbers, tail in name.splits():
            for literal in (False, True):
                for tuned in by_prefix.get(name.prefix(end, literal=literal), ()):
                    parts = iter(numbers)
                    filled = [next(parts, "#") if p == "#" else p for p in tuned.split(".")]
                    yield ".".join(filled) + tail


def _votes(
    base: Mapping[str, NameParts],
    tuned: Mapping[str, NameParts],
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


def _unnumbered(names: Mapping[str, NameParts], chosen: Iterable[str]) -> set[_Tail]:
    """Return the tails before which a name has no number."""
    found: set[_Tail] = set()
    for name in chosen:
        one = names[name]
        found.update((tail, one.shape) for _, numbers, tail in one.splits() if not numbers)
    return found


class _Tails:
    """The tensors of the fine-tune by the ends of their names."""

    def __init__(
        self, names: Mapping[str, NameParts], chosen: Iterable[str], wanted: set[_Tail]
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
