"""Which tensor of a fine-tune is which of its base, across the prefixes that wrappers add."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from svftool.checkpoints import TensorInfo

PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "body.", "encoder.", "base_model.")
"""What wrappers and detectors put before the names of a backbone."""


@dataclass(frozen=True)
class Pair:
    """One tensor on both sides: its name in the base and in the fine-tune."""

    base: str
    tuned: str


@dataclass(frozen=True)
class Matching:
    """How the tensors of two checkpoints correspond.

    Attributes
    ----------
    pairs : tuple of Pair
        Same name up to prefixes, same shape; in the base's order.
    misshapen : tuple of Pair
        Same name, another shape.
    base_only, tuned_only : tuple of str
        Names without a counterpart.
    base_prefix, tuned_prefix : str
        What was dropped from the names of each side.
    """

    pairs: tuple[Pair, ...]
    misshapen: tuple[Pair, ...]
    base_only: tuple[str, ...]
    tuned_only: tuple[str, ...]
    base_prefix: str = ""
    tuned_prefix: str = ""

    @property
    def notes(self) -> tuple[str, ...]:
        """What was dropped, as sentences."""
        sides = (("base", self.base_prefix), ("tuned", self.tuned_prefix))
        return tuple(
            f"matched without the prefix {prefix!r} of the {side} names"
            for side, prefix in sides
            if prefix
        )


def match_names(base: Mapping[str, TensorInfo], tuned: Mapping[str, TensorInfo]) -> Matching:
    """Match the tensors of two checkpoints by name.

    Of the known prefixes, alone or in pairs, those are dropped that let the most names agree in
    name and shape; none where that is as good.

    Parameters
    ----------
    base, tuned : mapping of str to TensorInfo
        Tensors of both sides.
    """
    choices = product(_prefixes(base), _prefixes(tuned))
    best = max(choices, key=lambda choice: (_agreeing(base, tuned, *choice), -len("".join(choice))))
    left, right = _without(base, best[0]), _without(tuned, best[1])
    both = [name for name in left if name in right]
    pairs = [Pair(left[name], right[name]) for name in both]
    fits = [base[pair.base].shape == tuned[pair.tuned].shape for pair in pairs]
    matched_base, matched_tuned = {pair.base for pair in pairs}, {pair.tuned for pair in pairs}
    return Matching(
        pairs=tuple(pair for pair, fit in zip(pairs, fits, strict=True) if fit),
        misshapen=tuple(pair for pair, fit in zip(pairs, fits, strict=True) if not fit),
        base_only=tuple(name for name in base if name not in matched_base),
        tuned_only=tuple(name for name in tuned if name not in matched_tuned),
        base_prefix=best[0],
        tuned_prefix=best[1],
    )


def _prefixes(names: Mapping[str, TensorInfo]) -> list[str]:
    joined = ["", *PREFIXES, *("".join(pair) for pair in product(PREFIXES, repeat=2))]
    return [prefix for prefix in joined if any(name.startswith(prefix) for name in names)]


def _without(names: Mapping[str, TensorInfo], prefix: str) -> dict[str, str]:
    """Map names without the prefix to names; one that is there with and without keeps its own."""
    short = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
    return {name: name for name in names if not prefix or not name.startswith(prefix)} | short


def _agreeing(
    base: Mapping[str, TensorInfo],
    tuned: Mapping[str, TensorInfo],
    base_prefix: str,
    tuned_prefix: str,
) -> int:
    left, right = _without(base, base_prefix), _without(tuned, tuned_prefix)
    return sum(
        base[left[name]].shape == tuned[right[name]].shape for name in left.keys() & right.keys()
    )


def shared_fraction(matching: Matching, names: Sequence[str]) -> float:
    """Share of `names` that found a counterpart of the same shape."""
    return len(matching.pairs) / max(1, len(names))
