"""Which tensor of a fine-tune is which of its base, across the prefixes that wrappers add."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from svftool.checkpoints import TensorInfo

PREFIXES = (
    "module.", "_orig_mod.", "model.", "backbone.", "body.", "encoder.", "base_model.",
    "base_model.model.", "transformer.", "state_dict.", "net.", "network.", "student.",
)  # fmt: skip
"""What wrappers and detectors put before the names of a backbone: one tensor is enough to take
them for a prefix. Any other needs `ENOUGH` tensors that agree."""

ENOUGH = 3


@dataclass(frozen=True)
class NamePair:
    """One tensor on both sides: its name in the base and in the fine-tune."""

    base: str
    tuned: str


@dataclass(frozen=True)
class Renaming:
    """A prefix on either side that stands for one on the other, and how many tensors it matched."""

    base: str
    tuned: str
    count: int

    def __str__(self) -> str:
        return (
            f"{self.count} tensors matched by taking {self.base or 'nothing'!r} off the base's "
            f"names and {self.tuned or 'nothing'!r} off the fine-tune's"
        )


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
    """

    pairs: tuple[NamePair, ...]
    misshapen: tuple[NamePair, ...]
    base_only: tuple[str, ...]
    tuned_only: tuple[str, ...]
    renamings: tuple[Renaming, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What was dropped, as sentences."""
        return tuple(map(str, self.renamings))


def match_names(base: Mapping[str, TensorInfo], tuned: Mapping[str, TensorInfo]) -> Matching:
    """Match the tensors of two checkpoints by name.

    Equal names match first. Then, one after another, the pair of prefixes is dropped that lets the
    most of what is left agree in name and shape. Prefixes end at a dot.

    Parameters
    ----------
    base, tuned : mapping of str to TensorInfo
        Tensors of both sides.
    """
    found = {name: name for name in base if name in tuned}
    renamings: list[Renaming] = []
    while True:
        taken = set(found.values())
        left = {name: info for name, info in base.items() if name not in found}
        right = {name: info for name, info in tuned.items() if name not in taken}
        best = _best_renaming(left, right)
        if best is None:
            break
        renamings.append(best)
        for name in left:
            other = _renamed(name, best)
            if other in right:
                found[name] = other
    return _gathered(base, tuned, found, renamings)


def say_shapes(before: tuple[int, ...], after: tuple[int, ...]) -> str:
    """Say that a tensor has another shape in the fine-tune than in the base."""
    hint = ", stored transposed" if len(before) == 2 and before == after[::-1] else ""
    return f"shape {before} in the base, {after} in the fine-tune{hint}"


def _renamed(name: str, renaming: Renaming) -> str:
    """Return the name in the fine-tune, or one that it cannot have."""
    if not name.startswith(renaming.base):
        return ""
    return renaming.tuned + name[len(renaming.base) :]


def _best_renaming(
    left: Mapping[str, TensorInfo], right: Mapping[str, TensorInfo]
) -> Renaming | None:
    by_tail: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, info in right.items():
        for prefix, tail in _splits(name):
            by_tail.setdefault((tail, info.shape), []).append(prefix)
    votes: Counter[tuple[str, str]] = Counter()
    for name, info in left.items():
        for prefix, tail in _splits(name):
            votes.update((prefix, other) for other in by_tail.get((tail, info.shape), ()))
    if not votes:
        return None
    # Of prefixes that match as many tensors, the shortest: the longer ones repeat what is equal.
    (base, tuned), count = max(
        votes.items(), key=lambda item: (item[1], -len(item[0][0]) - len(item[0][1]))
    )
    known = all(not prefix or prefix in PREFIXES for prefix in (base, tuned))
    return Renaming(base, tuned, count) if known or count >= ENOUGH else None


def _splits(name: str) -> Iterable[tuple[str, str]]:
    """Yield every prefix of a name that ends at a dot, with the rest; the empty one first."""
    yield "", name
    for index, letter in enumerate(name):
        if letter == "." and index + 1 < len(name):
            yield name[: index + 1], name[index + 1 :]


def _gathered(
    base: Mapping[str, TensorInfo],
    tuned: Mapping[str, TensorInfo],
    found: Mapping[str, str],
    renamings: list[Renaming],
) -> Matching:
    both = [NamePair(name, found[name]) for name in base if name in found]
    fits = [base[pair.base].shape == tuned[pair.tuned].shape for pair in both]
    taken = set(found.values())
    return Matching(
        pairs=tuple(pair for pair, fit in zip(both, fits, strict=True) if fit),
        misshapen=tuple(pair for pair, fit in zip(both, fits, strict=True) if not fit),
        base_only=tuple(name for name in base if name not in found),
        tuned_only=tuple(name for name in tuned if name not in taken),
        renamings=tuple(renamings),
    )
