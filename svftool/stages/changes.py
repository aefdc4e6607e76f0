"""A base and its fine-tune: the change of each tensor, and one look at all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from svftool.auditing import AuditSource, Counterparts, Tuned
from svftool.auditing.evidence import EDGE_MARGIN
from svftool.checkpoints import table_role, to_matrix
from svftool.errors import CheckpointError, NumericalError, shortlist
from svftool.numerics.products import products
from svftool.numerics.rounding import coarser, precision_of, rounding_noise
from svftool.processes import ALONE, Processes
from svftool.progress import Progress

_PART = 1 << 22
_STRANGER = 0.1
"""Cosine of two checkpoints below which one is no fine-tune of the other."""

_Compared = tuple[float, list[float], bool]


@dataclass(frozen=True)
class BothSides:
    """A base and its fine-tune."""

    before: AuditSource
    side: Counterparts

    @property
    def names(self) -> list[str]:
        """Tensors of the base of which the fine-tune says anything, in the base's order."""
        known = {name for name in self.side.names if self.side.holds(name)}
        return [n for n in self.before.infos if n in known or self.common_rows(n) is not None]

    def common_rows(self, name: str) -> int | None:
        """Return how many rows both have of a matrix that has more or fewer in the fine-tune.

        A vocabulary that was resized is such a one; None of everything else.
        """
        other = self.side.misshapen.get(name)
        if other is None or self.side.source.lora is not None:
            return None
        one, two = self.before.infos[name], self.side.source.infos[other]
        plain = one.dtype.is_floating_point and two.dtype.is_floating_point
        if not plain or len(one.shape) < 2 or one.shape[1:] != two.shape[1:]:
            return None
        return min(one.shape[0], two.shape[0]) or None

    def read(self, name: str, weight: Tensor) -> Tuned | None:
        """Read the counterpart of a tensor; of a resized one, in the base's shape.

        Rows that the fine-tune does not have are those of the base.
        """
        rows = self.common_rows(name)
        if rows is None:
            return self.side.read(name, weight)
        theirs = self.side.source.read(self.side.misshapen[name])
        value = weight.to(torch.promote_types(weight.dtype, theirs.dtype), copy=True)
        value[:rows] = theirs[:rows]
        return Tuned(weight=value)

    def change(self, name: str) -> Tensor:
        """Return ``W' - W``, in float64 where an adapter forms it, else in float32."""
        weight = self.before.read(name)
        found = self.read(name, weight)
        assert found is not None
        formed = found.whole_change
        if formed is not None:
            return formed
        assert found.weight is not None
        # Parts, so that no float64 copy of the whole is made.
        change = torch.empty(weight.shape, dtype=torch.float32)
        flat, one, two = change.view(-1), found.weight.reshape(-1), weight.reshape(-1)
        for at in range(0, flat.numel(), _PART):
            cut = slice(at, at + _PART)
            flat[cut] = one[cut].double() - two[cut].double()
        return change

    def tuned(self, name: str) -> Tensor:
        """Return the tensor after the change."""
        weight = self.before.read(name)
        found = self.read(name, weight)
        if found is None:
            return weight
        if found.weight is not None:
            return found.weight
        change = found.whole_change
        assert change is not None
        return (weight.double() + change).to(weight.dtype)

    def floor(self, name: str) -> float:
        """Bound the singular values that rounding of the fine-tune makes by itself."""
        weight = self.before.read(name)
        found = self.read(name, weight)
        if found is None or found.weight is None:
            return 0.0
        dtype = precision_of(found.weight)
        if self.before.infos[name].dtype.is_floating_point:
            dtype = coarser(dtype, found.weight.dtype)
        return EDGE_MARGIN * rounding_noise(to_matrix(found.weight), dtype).edge


@dataclass
class Survey:
    """One look at every tensor: what changed, and by how much.

    Attributes
    ----------
    squares : dict of str to float
        Sum of squares of the change, of what changed.
    sums : list of float
        ``<W, W'>``, ``||W||^2`` and ``||W'||^2`` over matrices.
    """

    squares: dict[str, float] = field(default_factory=dict)
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])


def survey_of(pair: BothSides, progress: Progress, processes: Processes = ALONE) -> Survey:
    """Look at every tensor once; the processes share them.

    Raises
    ------
    NumericalError
        If the fine-tune holds NaN or infinity where the base does not.
    """
    names = pair.names
    mine = names[processes.rank :: processes.count]
    seen: dict[str, _Compared] = {}
    with progress.task("comparing", len(mine), unit="tensors") as task:
        for name in mine:
            seen[name] = _compare(pair, name)
            task.advance(detail=name)
    for others in processes.gather(seen):
        seen |= others
    bad = [name for name in names if not seen[name][2]]
    if bad:
        raise NumericalError(
            f"{pair.side.source.path}: {shortlist(map(repr, bad), 4)}: NaN or infinity where the "
            "base has none, expected finite values. Name a fine-tune that did not diverge."
        )
    # In the order of the names: what is said does not depend on who looked.
    found = Survey()
    for name in names:
        squares, sums, _ = seen[name]
        if pair.common_rows(name) is not None and _strange(sums):
            continue  # another head, whose rows mean something else
        if squares:
            found.squares[name] = squares
        if len(pair.before.infos[name].shape) > 1:
            found.sums = [one + two for one, two in zip(found.sums, sums, strict=True)]
    return found


def _compare(pair: BothSides, name: str) -> _Compared:
    """Return the change's sum of squares, the products of both sides, and whether it is sound."""
    weight = pair.before.read(name)
    found = pair.read(name, weight)
    assert found is not None
    formed = found.whole_change
    other = formed if formed is not None else found.weight
    assert other is not None
    rows = pair.common_rows(name)
    if rows is not None:
        weight, other = weight[:rows], other[:rows]
    if other.dtype.is_complex or weight.dtype.is_complex:
        same = torch.equal(other, weight)
        return 0.0 if same else float((other - weight).abs().square().sum()), [0.0] * 3, True
    quick = products(weight, other, change=formed is not None)
    if all(map(math.isfinite, (quick.inner, quick.first, quick.second, quick.apart))):
        return quick.apart, [quick.inner, quick.first, quick.second], True
    squares, sums = 0.0, [0.0, 0.0, 0.0]
    one, two = weight.reshape(-1), other.reshape(-1)
    for at in range(0, one.numel(), _PART):
        W, T = one[at : at + _PART].double(), two[at : at + _PART].double()
        T = W + T if formed is not None else T
        sound = T.isfinite() | (T == W) | (T.isnan() & W.isnan())
        if not bool(sound.all()):
            return 1.0, sums, False
        D = torch.where(T.isfinite() & W.isfinite(), T - W, 0.0)
        W, T = W.nan_to_num(0.0, 0.0, 0.0), T.nan_to_num(0.0, 0.0, 0.0)
        squares += float(D.square().sum())
        new = float(W @ T), float(W @ W), float(T @ T)
        sums = [a + b for a, b in zip(sums, new, strict=True)]
    return squares, sums, True


def drop_tied(pair: BothSides, survey: Survey, progress: Progress) -> None:
    """Count a head that is tied to the embedding once: loaders change both through one tensor.

    An adapter that changed both would change the one tensor twice.
    """
    config = pair.before.config or {}
    inner = config.get("text_config")
    stated = [one.get("tie_word_embeddings") for one in (config, inner or {})]
    if not any(one is True for one in stated):
        return
    infos, squares = pair.before.infos, survey.squares
    tables = [n for n in squares if len(infos[n].shape) == 2 and table_role(infos[n]) is not None]
    for table in tables:
        alike = infos[table].shape, squares[table]
        for name in tuple(squares):
            other = infos[name].shape, squares[name]
            if name not in tables and other == alike and _same(pair, table, name):
                del squares[name]
                progress.note(f"{name}: tied to {table}, whose change is its own")


def _same(pair: BothSides, one: str, other: str) -> bool:
    before = torch.equal(pair.before.read(one), pair.before.read(other))
    return before and torch.equal(pair.change(one), pair.change(other))


def _strange(sums: Sequence[float]) -> bool:
    """Whether two sides are about orthogonal, as what has nothing to do with each other is."""
    inner, one, two = sums
    return one > 0 and two > 0 and abs(inner) < _STRANGER * math.sqrt(one) * math.sqrt(two)


def refuse_another_base(before: AuditSource, after: AuditSource, survey: Survey) -> None:
    """Refuse two checkpoints whose names fit and whose values do not.

    Raises
    ------
    CheckpointError
        If the cosine of their matrices is near 0.
    """
    inner, one, two = survey.sums
    if _strange(survey.sums):
        raise CheckpointError(
            f"{after.path}: its matrices have a cosine of {inner / math.sqrt(one * two):.2f} with "
            f"those of {before.path}, expected a fine-tune of it. Name the base that it was tuned "
            "from."
        )
