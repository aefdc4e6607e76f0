"""Output heads in a merge of many: rows that stand for different classes are never summed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from svftool.checkpoints import TensorInfo, is_vocabulary, output_heads
from svftool.choices.merging import Heads
from svftool.errors import FactorsError, shortlist
from svftool.factors.config_shapes import is_output_head
from svftool.stages.merge_inputs import MergeBase, MergeInput, named_classes

_ALIKE = 0.1
"""Cosine of two heads below which their rows have nothing to do with each other."""


@dataclass(frozen=True)
class HeadPart:
    """What one input holds of a tensor of a head: its number, and the name there."""

    number: int
    name: str


@dataclass(frozen=True)
class HeadTensor:
    """A tensor of a head that is not merged as a change.

    Attributes
    ----------
    info : TensorInfo
        Of the result.
    parts : tuple of HeadPart
    how : {"concat", "first", "mean"}
    """

    info: TensorInfo
    parts: tuple[HeadPart, ...]
    how: str

    def read(self, inputs: Sequence[MergeInput]) -> Tensor:
        """Return its values, float64 where they are a mean."""
        values = [inputs[one.number].source.read(one.name) for one in self.parts]
        if self.how == "concat":
            return torch.cat([value.double() for value in values])
        if self.how == "first" or len(values) == 1:
            return values[0]
        weights = [inputs[one.number].weight for one in self.parts]
        total = sum(weights)
        if not total > 0.0:
            raise FactorsError(
                f"tensor {self.info.name!r}: its weights sum to {total:g}, expected more than 0: "
                "the mean of the heads is taken. Give other weights."
            )
        mean = torch.zeros(values[0].shape, dtype=torch.float64)
        for value, weight in zip(values, weights, strict=True):
            mean += (weight / total) * value.double()
        return mean


@dataclass
class HeadPlan:
    """What becomes of heads.

    Attributes
    ----------
    tensors : dict of str to HeadTensor
        By name in the result.
    kept : list of str
        Tensors of the base's head that stay as they are, whatever the inputs hold.
    left : list of str
        Tensors that the base does not have and the result does not get.
    classes : tuple of str or None
        Names of the rows of the result's head, where they are known.
    placed : set of (int, str)
        What of which input was looked at, by its name there.
    """

    tensors: dict[str, HeadTensor] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    classes: tuple[str, ...] | None = None
    placed: set[tuple[int, str]] = field(default_factory=set)

    def placed_of(self, number: int) -> set[str]:
        """Return the names in one input that were looked at."""
        return {name for index, name in self.placed if index == number}

    @property
    def names(self) -> set[str]:
        """Tensors that are not merged as changes."""
        return {*self.tensors, *self.kept}


def plan_heads(base: MergeBase, inputs: Sequence[MergeInput], heads: Heads | None) -> HeadPlan:
    """Find heads that cannot be merged as changes of the base's, and say what becomes of them.

    A head is merged as a change where the base has it in this shape and its rows are those of the
    inputs. Else the mean is taken where all inputs that have one agree on its classes. The heads of
    a language model, whose rows are its vocabulary, are no heads here.

    Parameters
    ----------
    base : MergeBase
    inputs : sequence of MergeInput
    heads : {"concat", "first", "drop"} or None
        What becomes of heads that do not agree; they are refused by default.

    Raises
    ------
    FactorsError
        If heads do not agree and `heads` is None, or cannot be put one below the other.
    """
    named = [_named(base, one) for one in inputs]
    known: dict[str, TensorInfo] = {}
    for mapping, one in zip(named, inputs, strict=True):
        infos = one.source.infos
        known |= {name: replace(infos[mine], name=name) for name, mine in mapping.items()}
    known |= base.source.infos
    plan = HeadPlan()
    vocabularies = {info.shape[0] for info in known.values() if is_vocabulary(info)}
    for weight in sorted(output_heads(known.values())):
        if is_output_head(weight) or known[weight].shape[0] in vocabularies:
            continue
        module = weight.rpartition(".")[0]
        _plan_one(_Head(base, inputs, named, module, weight), heads, plan)
    return plan


def _named(base: MergeBase, one: MergeInput) -> dict[str, str]:
    """Return names in an input by what the base calls them, or would call them."""
    side = one.pair.side
    ours = {mine: name for name, mine in {**side.others, **side.misshapen}.items()}
    prefix, taken = _prefix(base, ours), {*ours.values()}
    return {
        ours.get(mine) or mine.removeprefix(prefix): mine
        for mine in one.source.infos
        if mine in ours or mine.removeprefix(prefix) not in taken
    }


def _prefix(base: MergeBase, ours: Mapping[str, str]) -> str:
    """Return what the input puts before the base's names."""
    for mine, name in ours.items():
        return mine.removesuffix(name) if mine.endswith(name) else ""
    return ""


@dataclass(frozen=True)
class _Head:
    """One head: a module of the base or of inputs."""

    base: MergeBase
    inputs: Sequence[MergeInput]
    named: Sequence[Mapping[str, str]]
    module: str
    weight: str

    def own(self, number: int) -> dict[str, str]:
        """Return the tensors of the head that an input holds: its name by the base's."""
        return {
            name: mine
            for name, mine in self.named[number].items()
            if name.rpartition(".")[0] == self.module
        }

    def holders(self) -> list[int]:
        """List the inputs that hold a head other than the base's."""
        return [
            number
            for number in range(len(self.inputs))
            if self.weight in (own := self.own(number)) and self._differs(number, own)
        ]

    def _differs(self, number: int, own: Mapping[str, str]) -> bool:
        one, infos = self.inputs[number], self.base.source.infos
        return any(
            name not in infos
            or infos[name].shape != one.source.infos[mine].shape
            or one.changes(name)
            for name, mine in own.items()
        )

    def shape(self, number: int) -> tuple[int, ...]:
        """Return the shape of the weight in an input."""
        return self.inputs[number].source.infos[self.own(number)[self.weight]].shape

    def values(self, number: int) -> Tensor:
        """Read the weight of an input."""
        return self.inputs[number].source.read(self.own(number)[self.weight])

    def classes(self, number: int) -> tuple[str, ...] | None:
        """Return the names of the rows in an input, where there are as many."""
        found = self.inputs[number].classes
        return found if found is not None and len(found) == self.shape(number)[0] else None

    @property
    def base_shape(self) -> tuple[int, ...] | None:
        """Shape of the weight in the base."""
        info = self.base.source.infos.get(self.weight)
        return None if info is None else info.shape

    def agree(self, holders: Sequence[int]) -> bool:
        """Whether the rows of all holders stand for the same."""
        if len({self.shape(number) for number in holders}) > 1:
            return False
        known = {self.classes(number) for number in holders}
        if None not in known:
            return len(known) == 1
        if len(known) > 2:
            return False
        first = self.values(holders[0])
        return all(_cosine(first, self.values(number)) >= _ALIKE for number in holders[1:])

    def fits_base(self, holders: Sequence[int]) -> bool:
        """Whether the heads are changes of the base's: as many rows, which stand for the same."""
        if self.base_shape is None or any(self.shape(n) != self.base_shape for n in holders):
            return False
        classes = named_classes(self.base.source)
        known = {one for number in holders if (one := self.classes(number)) is not None}
        if classes is not None and len(classes) == self.base_shape[0] and known:
            return known == {classes}
        weight = self.base.source.read(self.weight)
        return all(_cosine(weight, self.values(number)) >= _ALIKE for number in holders)


def _cosine(one: Tensor, two: Tensor) -> float:
    a, b = one.double().flatten(), two.double().flatten()
    norms = float(a.norm()) * float(b.norm())
    # A head of zeros is one that was not trained: it contradicts nobody.
    return float(a @ b) / norms if norms > 0.0 and math.isfinite(norms) else 1.0


def _plan_one(head: _Head, heads: Heads | None, plan: HeadPlan) -> None:
    holders = head.holders()
    if not holders or (head.fits_base(holders) and head.agree(holders)):
        return
    if head.agree(holders):
        _place(head, holders, "mean", plan)
    elif heads is None:
        raise FactorsError(_refusal(head, holders))
    elif heads == "drop":
        _drop(head, holders, plan)
    else:
        _place(head, holders[:1] if heads == "first" else holders, heads, plan)


def _refusal(head: _Head, holders: Sequence[int]) -> str:
    parts = []
    for number in holders:
        classes = head.classes(number)
        what = f"{head.shape(number)[0]} unnamed" if classes is None else shortlist(classes, 3)
        parts.append(f"{head.inputs[number].path.name} ({what})")
    return (
        f"tensor {head.weight!r}: heads of different classes in {shortlist(parts, 4)}, expected "
        "the same classes in the same order to be summed. Say --heads concat, first or drop."
    )


def _drop(head: _Head, holders: Sequence[int], plan: HeadPlan) -> None:
    names = dict.fromkeys(name for number in holders for name in head.own(number))
    for name in names:
        known = name in head.base.source.infos
        (plan.kept if known else plan.left).append(name)
    plan.placed |= {(number, mine) for number in holders for mine in head.own(number).values()}


def _place(head: _Head, holders: Sequence[int], how: str, plan: HeadPlan) -> None:
    """Take the head from these inputs."""
    kinds = {frozenset(head.own(number)) for number in holders}
    if len(kinds) > 1:
        found = " and ".join(
            f"({shortlist(sorted(kind), 3)})" for kind in sorted(kinds, key=sorted)
        )
        raise FactorsError(
            f"tensor {head.weight!r}: heads of different kinds {found}, expected the same tensors "
            "in every input. Say --heads first or drop."
        )
    for name in head.own(holders[0]):
        plan.tensors[name] = _tensor(head, holders, how, name)
    everyone = [number for number in range(len(head.inputs)) if head.own(number)]
    plan.placed |= {(number, mine) for number in everyone for mine in head.own(number).values()}
    named = [head.classes(number) for number in holders]
    if how == "concat":
        known = [one for one in named if one is not None]
        plan.classes = tuple(c for one in known for c in one) if len(known) == len(named) else None
    else:
        plan.classes = next((one for one in named if one is not None), None)


def _tensor(head: _Head, holders: Sequence[int], how: str, name: str) -> HeadTensor:
    parts = tuple(HeadPart(number, head.own(number)[name]) for number in holders)
    infos = [head.inputs[one.number].source.infos[one.name] for one in parts]
    known = head.base.source.infos.get(name)
    dtype = infos[0].dtype if known is None else known.dtype
    shape = infos[0].shape
    if how == "concat":
        if not shape or any(one.shape[1:] != shape[1:] for one in infos):
            raise FactorsError(
                f"tensor {name!r}: shapes {' and '.join(str(one.shape) for one in infos)}, "
                "expected heads that can be put one below the other. Say --heads first or drop."
            )
        shape = (sum(one.shape[0] for one in infos), *shape[1:])
    elif any(one.shape != shape for one in infos):
        raise FactorsError(
            f"tensor {name!r}: shapes {' and '.join(str(one.shape) for one in infos)}, expected "
            "one shape. Say --heads first or drop."
        )
    file = "" if known is None else known.file
    return HeadTensor(TensorInfo(name, dtype, shape, file), parts, how)
