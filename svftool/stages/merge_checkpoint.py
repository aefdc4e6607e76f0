"""The checkpoint that a merge of many makes: what is to be done, and each tensor of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svftool.checkpoints import Checkpoint, TensorInfo
from svftool.errors import FactorsError
from svftool.factors import FactorStore
from svftool.factors.mixture import LayerChange
from svftool.factors.overflow import Rounding
from svftool.factors.stated import Stated, stated_by
from svftool.numerics import ThreadPool
from svftool.stages.combine_options import CombineOptions
from svftool.stages.combine_result import WeightChoice
from svftool.stages.merge_heads import HeadPlan, plan_heads
from svftool.stages.merge_layers import LayerMerge, MergeSpool, layer_bytes, plan_tensors
from svftool.training.workspace import describe_files


@dataclass(frozen=True)
class MergeWork:
    """What is to be done.

    Attributes
    ----------
    merge : LayerMerge
        How tensors are merged, of which inputs with which weights.
    heads : HeadPlan
    options : CombineOptions
    given : Path
        The base, or its factors.
    target : Path
        What is written.
    choice : WeightChoice or None
        How the weights were chosen, where data chose them.
    """

    merge: LayerMerge
    heads: HeadPlan
    options: CombineOptions
    given: Path
    target: Path
    choice: WeightChoice | None = None

    def weighted(self, weights: Sequence[float], choice: WeightChoice | None = None) -> MergeWork:
        """Return the same with other weights of the inputs."""
        merge = self.merge
        inputs = [replace(one, weight=w) for one, w in zip(merge.inputs, weights, strict=True)]
        plans = plan_tensors(merge.base, inputs, merge.spec, self.heads.names)
        changed = replace(merge, inputs=inputs, plans=plans, clipped={})
        return replace(self, merge=changed, choice=choice)

    def ordered(self, order: Sequence[int]) -> MergeWork:
        """Return the same with the inputs in another order."""
        merge = self.merge
        inputs = [merge.inputs[number] for number in order]
        heads = plan_heads(merge.base, inputs, self.options.heads)
        plans = plan_tensors(merge.base, inputs, merge.spec, heads.names)
        return replace(self, merge=replace(merge, inputs=inputs, plans=plans), heads=heads)

    @property
    def paths(self) -> list[Path]:
        """What is read."""
        inputs = [one.path for one in self.merge.inputs]
        found = [self.given, self.merge.base.checkpoint.path, *inputs]
        return found if self.options.weights is None else [*found, Path(self.options.weights.data)]

    @property
    def stated(self) -> Stated:
        """What the result says of what it was made of."""
        tuned = [
            (one.source.tuned, one.weight)
            for one in self.merge.inputs
            if one.source.tuned is not None
        ]
        stated = stated_by(tuned) if tuned else Stated()
        parts = [{"file": one.path.name, "weight": one.weight} for one in self.merge.inputs]
        training = {
            **stated.training,
            "merged": {"method": str(self.merge.spec), "inputs": parts},
        }
        if self.choice is not None:
            training["merged"]["weights_from"] = self.choice.recipe
            # Who measures on these examples is told that they were used.
            seen = self.choice.support
            training["support"] = (
                seen if stated.support is None else stated.support | seen
            ).to_plain()
        return replace(stated, classes=self.heads.classes or stated.classes, training=training)

    def facts(self) -> dict[str, Any]:
        """Everything that decides the layers: an interrupted run must agree to be resumed."""
        merge = self.merge
        return {
            "base": describe_files(merge.base.checkpoint.path),
            "inputs": [[describe_files(one.path), one.weight] for one in merge.inputs],
            "method": str(merge.spec),
            "layers": merge.matrices,
            "dtype": self.options.dtype,
            "allow_overflow": self.options.allow_overflow,
        }


class MergedCheckpoint:
    """The merged checkpoint as it is written: a tensor at a time.

    Parameters
    ----------
    work : MergeWork
    spool : MergeSpool or None
        Matrices that are merged already; without it they are merged when they are asked for.
    """

    def __init__(self, work: MergeWork, spool: MergeSpool | None = None) -> None:
        self._work, self._spool = work, spool
        self._layers = {} if spool is None else spool.finished()
        base = work.merge.base.source.infos
        heads = work.heads.tensors
        self.added = tuple(name for name in heads if name not in base)
        self.replaced = tuple(name for name in heads if name in base)
        known = {**base, **{name: one.info for name, one in heads.items()}}
        self.infos: Mapping[str, TensorInfo] = {
            name: replace(info, dtype=work.merge.out_dtype(info)) for name, info in known.items()
        }
        self._clipped = {one.name: one.clipped for one in self._layers.values() if one.clipped}

    untied = False
    """Tensors of the base alone are merged by a method; those who open the inputs warn."""

    @property
    def base(self) -> Checkpoint:
        """What is merged into."""
        return self._work.merge.base.checkpoint

    @property
    def store(self) -> FactorStore:
        """The factors, of which nothing is written."""
        raise FactorsError("no factors, expected a base")

    @property
    def dtype(self) -> torch.dtype | None:
        """What all numbers are written in."""
        return self._work.merge.dtype

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the rows of the head, where they are new."""
        return self._work.heads.classes

    @property
    def reshaped(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """Shapes in the base and in the result, where they differ."""
        base = self._work.merge.base.source.infos
        pairs = {name: (base[name].shape, self.infos[name].shape) for name in self.replaced}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    @property
    def clipped(self) -> dict[str, int]:
        """Values that were clipped, by tensor; of the tensors computed so far."""
        found = {**self._clipped, **self._work.merge.clipped}
        return {name: found[name] for name in self.infos if name in found}

    def bytes_of(self, name: str) -> int:
        """Bound the bytes that `tensor` takes: of a sum, in float64, of the changes of all."""
        info = self.infos[name]
        plan = self._work.merge.plans.get(name)
        if name in self._layers or plan is None:
            return 2 * info.nbytes
        if plan.way == "matrix":
            return layer_bytes(plan.job)
        return (32 + 8 * len(self._work.merge.inputs)) * info.numel

    def tensor(
        self, name: str, pool: ThreadPool | None = None
    ) -> tuple[Tensor, LayerChange | None]:
        """Read or compute one tensor, and what became of it if it is a merged matrix."""
        head = self._work.heads.tensors.get(name)
        if head is not None:
            return self._head(name, head.read(self._work.merge.inputs)), None
        layer = self._layers.get(name)
        if layer is not None and self._spool is not None:
            return self._spool.read(name), layer.change
        return self._work.merge.tensor(name), None

    def _head(self, name: str, value: Tensor) -> Tensor:
        info = self.infos[name]
        if value.dtype == info.dtype:
            return value
        rounding = Rounding(allow_overflow=self._work.merge.allow_overflow)
        rounded = rounding.round(info, value.double(), info.dtype)
        self._clipped.update(rounding.clipped)
        return rounded
