"""How alike tensors of two checkpoints are, read from few and small ones."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from svftool.checkpoints import TensorInfo

Likeness = Callable[[str, str], tuple[float, float] | None]
"""Of a tensor of the base and one of the fine-tune: their cosine, and the norm of the difference
over that of the base's. None where values cannot tell."""

FAR = 0.2
"""Absolute cosine below which values have nothing in common."""

NEAR = 0.5
"""And from which they are those of one tensor."""

SAME = 0.05
"""Difference of cosines that tells nothing."""

_READS = 1024


@dataclass
class Likenesses:
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
