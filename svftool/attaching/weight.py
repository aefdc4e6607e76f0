"""One parameter of the live model whose value follows trainable singular values.

It is made of one decomposed tensor of the file or, where a library packs weights, of several.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from svftool.attaching import functions
from svftool.attaching.keeping import KeepsDtype
from svftool.attaching.layer import AttachedLayer, Region, belongs, unit_roundoff
from svftool.attaching.spectral_step import count_change
from svftool.errors import ModelError
from svftool.factors import SpectralChange, add_change

_KEPT_BYTES = 1 << 20
"""What a weight may keep of itself, at least: see `AttachedWeight.lend`."""

Mode = Literal["auto", "factored", "composed", "residual"]


class AttachedWeight(KeepsDtype):
    """One parameter of the live model whose value follows trainable singular values.

    Attributes
    ----------
    parts : ModuleList of AttachedLayer
        The file's tensors that lie in the parameter.
    regions : tuple of Region
        Where each of them lies.
    mode : {"auto", "factored", "composed", "residual"}
        The way that was asked for.
    """

    def __init__(
        self, parts: Sequence[AttachedLayer], regions: Sequence[Region], mode: Mode
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.regions = tuple(regions)
        self.mode: Mode = mode
        self._dense: tuple[Present, Tensor] | None = None
        self._merged: tuple[Present, weakref.ref[Tensor]] | None = None
        self._lent: Lent | None = None
        self._given: dict[bytes, tuple[Tensor, ...]] = {}
        self._base: object = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_dense": None, "_merged": None, "_lent": None, "_base": None}

    def layers(self) -> list[tuple[AttachedLayer, Region]]:
        """Return each part with the region it lies in."""
        return [(cast(AttachedLayer, p), r) for p, r in zip(self.parts, self.regions, strict=True)]

    def copy_of(self, base: Tensor) -> Tensor:
        """Copy the base's weight into a layout in which every region is a view."""
        whole = all(region.whole for region in self.regions)
        layout = torch.preserve_format if whole else torch.contiguous_format
        return base.detach().clone(memory_format=layout)

    @property
    def single(self) -> AttachedLayer | None:
        """The one layer that is the whole parameter, where there is one."""
        layer, region = self.layers()[0]
        alone = len(self.parts) == 1 and region.whole and layer.view == "matrix"
        return layer if alone else None

    @property
    def trains(self) -> bool:
        """Whether any singular value of the parameter requires a gradient."""
        return any(
            one.requires_grad for layer, _ in self.layers() for one in layer.trainable().values()
        )

    def compose(self, base: Tensor) -> Tensor:
        """Return the weight of the present singular values, differentiable in them."""
        apart = torch.is_grad_enabled() and functions.region() is not None
        with functions.kept_apart() if apart else nullcontext():
            changes = [layer.present() for layer, _ in self.layers()]
            tensors = [one for change in changes for one in change.tensors()]
            composed: Tensor = ComposeWeight.apply(self, base.detach(), changes, *tensors)
        return composed

    def _constant(self, base: Tensor) -> Tensor:
        return self._add(base.detach(), [layer.present() for layer, _ in self.layers()])

    @torch.no_grad()
    def _add(self, base: Tensor, changes: Sequence[SpectralChange]) -> Tensor:
        """Add each part's change to its region of the base's weight."""
        composed = self.copy_of(base)
        for (layer, region), change in zip(self.layers(), changes, strict=True):
            region.of(composed).add_(layer.change(change))
        return composed

    @torch.no_grad()
    def dense(self, base: Tensor, *, current: bool = False) -> Tensor:
        """Return the weight of the present singular values, a constant kept until they change.

        With `current` the caller has seen that they did not, see `unchanged`.
        """
        kept = self._dense
        if kept is None or kept[0].base != _place(base) or not (current or self._same(kept[0])):
            # An inference tensor would be of no use to a later pass that records gradients.
            with torch.inference_mode(False):
                weight = self._constant(base) if self._touched() else base.detach()
                kept = self._dense = (self._present(base), weight)
        return kept[1]

    def forget(self) -> None:
        """Drop what `dense` keeps."""
        self._dense = None

    @torch.no_grad()
    def merged(self, base: Tensor) -> Tensor:
        """Return the weight as merging writes it: the delta added in float64, rounded once.

        The same tensor is returned as long as the caller keeps the last one, so that tied
        parameters stay one tensor in a state dictionary.
        """
        if not self._touched():
            return base.detach()
        before = self._merged
        kept = None if before is None else before[1]()
        if before is not None and kept is not None:
            known = before[0]
            if known.base == _place(base) and self._same(known):
                return kept
        merged = self.copy_of(base)
        for layer, region in self.layers():
            view = region.of(merged)
            terms = [(1.0, layer.merging_change())]
            view.copy_(add_change(view, layer.factors(), terms, view=layer.view).weight)
        self._merged = (self._present(base), weakref.ref(merged))
        return merged

    def lend(self, base: Tensor) -> Tensor:
        """Return the merged weight for a state dictionary, whose tensors others may write to.

        What they wrote is found when the weight is used next, see `take_back`. A weight that was
        not trained is a copy too, so that nobody writes to the base.
        """
        self.take_back(base)
        kept = None if self._lent is None else self._lent.ref()
        if self._lent is not None and kept is not None and self._same(self._lent.present):
            return kept
        merged = self.merged(base)
        own = self.copy_of(base) if merged.data_ptr() == base.data_ptr() else merged
        present = self._present(base)
        self._remember(own, present.values)
        self._lent = Lent.of(own, present)
        return own

    def _remember(self, weight: Tensor, values: Sequence[Tensor]) -> None:
        """Keep what a weight that is given out was made of, where the weight does not tell.

        A trainer writes weights to disk and reads the best of them later. The numbers of all of
        them together take no more memory than the weight itself, the oldest go first.
        """
        if all(layer.tells for layer, _ in self.layers()):
            return
        key = _few(weight)
        self._given.pop(key, None)
        self._given[key] = tuple(value.to("cpu", copy=True) for value in values)
        most = max(_KEPT_BYTES, weight.nbytes) // max(1, sum(one.nbytes for one in values))
        while len(self._given) > max(1, most):
            del self._given[next(iter(self._given))]

    def _recall(self, base: Tensor, weight: Tensor) -> bool:
        """Set what a weight was made of that was given out before; False where it was not."""
        known, mine = self._given.get(_few(weight)), self._moving()
        if known is None or [one.shape for one in known] != [one.shape for one in mine]:
            return False
        before = [one.clone() for one in mine]
        self._set(known)
        if torch.equal(self.merged(base), weight.to(base)):
            return True
        self._set(before)
        return False

    def _set(self, values: Sequence[Tensor]) -> None:
        for mine, value in zip(self._moving(), values, strict=True):
            mine.copy_(value)

    def take_back(self, base: Tensor) -> None:
        """Take over what was written to a lent weight; averages of weights work so.

        Raises
        ------
        ModelError
            If it is no weight of other singular values.
        """
        lent, self._lent = self._lent, None
        if lent is None:
            return
        weight = lent.ref()
        if weight is None:
            return
        if not lent.written(weight):
            # Others may hold it still, but it is no longer held for them.
            self._lent = Lent(lent.ref, lent.version, lent.sample, lent.present)
            return
        share = self.absorb(base, weight)
        if share > 1.0:
            raise ModelError(
                f"{self.layers()[0][0].name}: what was written to the tensor of the state "
                "dictionary differs from the base by more than singular values, expected an "
                "average of weights of this model. Call svftool.detach before changing weights."
            )

    def check(self, base: Tensor) -> None:
        """Refuse a weight in the model that is no longer the one attached to.

        Raises
        ------
        ModelError
            If its values are others.
        """
        here = _place(base)
        if here == self._base:
            return
        for layer, part in self.layers():
            if not belongs(part.of(base), layer.factors(), unit_roundoff(base.dtype)):
                raise ModelError(
                    f"{layer.name}: the weight in the model is not the one that was attached to, "
                    "expected the base's. Call svftool.detach before changing or replacing weights "
                    "(also those that torch.func.functional_call is given)."
                )
        self._base = here

    def accept(self, base: Tensor) -> None:
        """Take the weight in the model for the base's, as one that was checked."""
        self._base = _place(base)

    def freeze(self, base: Tensor) -> bool:
        """Freeze the base and the singular vectors; return whether anything was free."""
        frozen = (base, *(one for layer, _ in self.layers() for one in layer.frozen()))
        free = [one for one in frozen if one.requires_grad and one.is_leaf]
        for one in free:
            one.requires_grad_(False)
        return bool(free)

    @torch.no_grad()
    def absorb(self, base: Tensor, weight: Tensor) -> float:
        """Set what is trained to what a merged `weight` has, if it is one.

        Singular values and entries of M are found by projection. A layer that has scales or a
        remainder takes back no other weights than those that it gave out before.

        Returns
        -------
        float
            What they do not explain of the difference from `base`, relative to what rounding
            explains. Above 1 the weight is no merge of these factors; nothing is set.
        """
        if self._recall(base, weight):
            return 0.0
        change = (weight.to(base.device, torch.float64) - base.detach().double()).contiguous()
        rounding = torch.finfo(base.dtype).eps * float(base.detach().double().norm())
        allowed = 4 * rounding + 1e-3 * float(change.norm())
        found = []
        for layer, region in self.layers():
            part = region.of(change)
            found.append(layer.explain(part))
            part.sub_(layer.change(found[-1]))
        share = float(change.norm()) / allowed if allowed > 0.0 else 0.0
        if share <= 1.0:
            for (layer, _), one in zip(self.layers(), found, strict=True):
                layer.set_change(one)
        return share

    def _touched(self) -> bool:
        return any(layer.present().moves() for layer, _ in self.layers())

    def _present(self, base: Tensor) -> Present:
        return Present(_place(base), tuple(value.clone() for value in self._moving()))

    def _moving(self) -> list[Tensor]:
        return [value for layer, _ in self.layers() for value in layer.moving()]

    def _same(self, known: Present) -> bool:
        return _equal(self._moving(), known.values)

    @staticmethod
    def unchanged(weights: Sequence[AttachedWeight]) -> bool:
        """Whether the singular values of all are those that `dense` was computed for.

        Their values are compared, in one go: versions of tensors miss what was written to ``.data``
        and what fused optimisers write.
        """
        now: list[Tensor] = []
        known: list[Tensor] = []
        for weight in weights:
            if weight._dense is None:
                return False
            now += weight._moving()
            known += weight._dense[0].values
        return _equal(now, known)


@dataclass(frozen=True)
class Present:
    """What a kept weight was computed from: where the base lies, and the numbers that train."""

    base: object
    values: tuple[Tensor, ...]


@dataclass(frozen=True)
class Lent:
    """A weight that was given out in a state dictionary, as it was then.

    Held until the model runs next, because some write to it and let go of it at once.
    """

    ref: weakref.ref[Tensor]
    version: int
    sample: Tensor
    present: Present
    held: Tensor | None = None

    @staticmethod
    def of(weight: Tensor, present: Present) -> Lent:
        """Remember a weight that is given out."""
        return Lent(weakref.ref(weight), weight._version, _sample(weight), present, weight)

    def written(self, weight: Tensor) -> bool:
        """Whether somebody wrote to it since."""
        return weight._version != self.version or not torch.equal(_sample(weight), self.sample)


def _sample(weight: Tensor) -> Tensor:
    """Return some numbers of a dense weight, as bytes."""
    count = min(weight.numel(), 64)
    step = max(1, weight.numel() // max(1, count))
    return weight.as_strided((count,), (step,), weight.storage_offset()).clone().view(torch.uint8)


def _few(weight: Tensor) -> bytes:
    """Return some numbers of a weight, whatever its layout, to know it again by."""
    flat = weight.detach().reshape(-1)
    few = flat[:: max(1, len(flat) // 64)].cpu().contiguous()
    return few.view(torch.uint8).numpy().tobytes()


def _place(base: Tensor) -> object:
    return base.data_ptr(), base._version, base.dtype, base.device


def _equal(now: Sequence[Tensor], known: Sequence[Tensor]) -> bool:
    kinds = [(x.shape, x.dtype, x.device) for x in now]
    if kinds != [(x.shape, x.dtype, x.device) for x in known]:
        return False
    if not kinds:
        return True
    if len({(dtype, device) for _, dtype, device in kinds}) > 1:
        return all(torch.equal(a, b) for a, b in zip(now, known, strict=True))
    return torch.equal(*(torch.cat([x.reshape(-1) for x in side]) for side in (now, known)))


class ComposeWeight(torch.autograd.Function):
    """The base's weight and the changes of its parts, formed and taken apart without a graph."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: AttachedWeight,
        base: Tensor,
        changes: Sequence[SpectralChange],
        *tensors: Tensor,
    ) -> Tensor:
        """Add each part's change to its region of the base's weight."""
        ctx.weight = weight
        given = iter(tensors)
        ctx.changes = [
            change.with_tensors([next(given).detach().clone() for _ in change.tensors()])
            for change in changes
        ]
        return weight._add(base, ctx.changes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Take the weight's gradient to each number that was trained."""
        weight: AttachedWeight = ctx.weight
        wanted = iter(ctx.needs_input_grad[3:])
        grads: list[Tensor | None] = []
        for (layer, region), change in zip(weight.layers(), ctx.changes, strict=True):
            asked = [next(wanted) for _ in change.tensors()]
            if any(asked):
                grads += layer.pull_back(change, region.of(gradient), asked)
            else:
                grads += [None] * len(asked)
        return None, None, None, *grads


# Which of the three ways a layer runs: factored, composed or residual.


Way = Literal["factored", "composed", "residual"]


def choose_way(weight: AttachedWeight, positions: int) -> Way:
    """Choose how to run a layer whose map can be split at its singular values.

    Operations of one training step, counted in multiply-adds for N positions of an m x n weight of
    rank k: factored ``2 N k (m + n)``; residual that and ``2 N m n``; composed ``3 N m n`` for the
    layer and its weight gradient and ``2 m n k`` for the weight and its projection. `count_change`
    counts what is trained beside singular values.

    Parameters
    ----------
    weight : AttachedWeight
        A weight that is one tensor of the file.
    positions : int
        Positions of the activations: batch times pixels or tokens.
    """
    layer = weight.single
    if layer is None or weight.mode == "composed":
        return "composed"
    if weight.mode == "residual":
        return "residual"
    if weight.mode == "factored":
        return "factored" if replaces_weight(layer) else "residual"
    exact = replaces_weight(layer)
    costs = count_operations(layer, positions)
    split: Way = "factored" if exact else "residual"
    return "composed" if costs["composed"] < costs[split] else split


def count_operations(layer: AttachedLayer, positions: int) -> dict[Way, int]:
    """Return the multiply-adds of one training step for each way to run a layer."""
    m, k = layer.U.shape
    n = layer.Vh.numel() // k
    values = 2 * positions * k * (m + n)
    factored, residual, composed = count_change(layer, positions)
    return {
        "factored": values + factored,
        "residual": values + 2 * positions * m * n + residual,
        "composed": 3 * positions * m * n + 2 * m * n * k + composed,
    }


def runs_without_base(weight: AttachedWeight) -> bool:
    """Whether training passes use the factors alone, never the base's weight."""
    layer = weight.single
    factored = weight.mode in ("auto", "factored")
    return factored and layer is not None and replaces_weight(layer)


def replaces_weight(layer: AttachedLayer) -> bool:
    """Whether the factors stand for the weight: full rank, and in single precision or better."""
    return layer.exact and layer.U.dtype.itemsize >= 4
