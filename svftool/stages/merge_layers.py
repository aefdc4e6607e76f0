"""The tensors of a merge of many, one at a time, by one or many processes; finished ones are kept.

Matrices are what takes time: each is merged once, looked at for interference, rounded, and renamed
into place, so that a run that was killed goes on where it was. All other tensors are merged when
they are written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from svftool.checkpoints import (
    Selection,
    TensorInfo,
    View,
    is_code,
    matrix_shape,
    select,
    tensor_digest,
)
from svftool.choices.merging import MergeSpec
from svftool.engine import Job, budget, run_layers, share
from svftool.errors import CheckpointError, counted
from svftool.factors.delta import norm
from svftool.factors.mixture import LayerChange
from svftool.factors.overflow import Rounding
from svftool.factors.spool import Spool
from svftool.merging import (
    Clash,
    Combined,
    Inputs,
    PairClash,
    clash_of,
    combine_deltas,
    mean_clash,
    mean_pairs,
)
from svftool.merging.spectral import svc
from svftool.numerics import ThreadPool
from svftool.numerics.rounding import FLOATS, round_once
from svftool.numerics.tall import cuts
from svftool.numerics.threads import one_thread
from svftool.processes import Processes
from svftool.progress import Progress
from svftool.stages.merge_inputs import MergeBase, MergeInput

Way = Literal["matrix", "entries", "average", "row", "keep"]
"""How a tensor is merged: as matrices by the method; entry by entry by the method; by the mean; as
a matrix of one row; or not at all."""

_PART = 1 << 16

_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class TensorPlan:
    """How one tensor of the base is merged.

    Attributes
    ----------
    info : TensorInfo
        As in the base.
    way : str
    why : str
        Why it is not merged as a matrix; empty where it is.
    inputs : tuple of int
        The inputs that take part: those that change it.
    asked : int
        How many inputs say what it is, changed or not.
    view : {"matrix", "batch"}
        How it is seen as matrices.
    """

    info: TensorInfo
    way: Way
    why: str = ""
    inputs: tuple[int, ...] = ()
    asked: int = 0
    view: View = "matrix"

    @property
    def job(self) -> Job:
        """The stack of its changes as the engine takes it."""
        return Job(self.info.name, (len(self.inputs), *matrix_shape(self.info.shape, self.view)))


def plan_tensors(
    base: MergeBase, inputs: Sequence[MergeInput], spec: MergeSpec, without: set[str]
) -> dict[str, TensorPlan]:
    """Decide for every tensor that an input changes how it is merged.

    Parameters
    ----------
    base : MergeBase
    inputs : sequence of MergeInput
    spec : MergeSpec
    without : set of str
        Tensors that are not merged as changes.
    """
    chosen, left = select(base.source.infos, Selection(), config=base.source.config)
    views = {choice.name: choice.view for choice in chosen}
    reasons = {one.name: one.reason for one in left}
    # What has no weight is not there: it is no part of a mean either. An arc keeps its two ends.
    arc = spec.method.most is not None
    present = [number for number, one in enumerate(inputs) if arc or one.weight != 0.0]
    plans = {}
    for name, info in base.source.infos.items():
        changed = tuple(number for number in present if inputs[number].changes(name))
        if not changed or name in without:
            continue
        asked = tuple(number for number in present if inputs[number].answers(name))
        plans[name] = TensorPlan(
            info,
            _way(info, spec, matrix=name in views),
            reasons.get(name, ""),
            asked if arc else changed,
            len(asked),
            views.get(name, "matrix"),
        )
    return plans


def _way(info: TensorInfo, spec: MergeSpec, *, matrix: bool) -> Way:
    if info.layout != "dense" or info.dtype not in FLOATS or is_code(info):
        return "keep"
    if info.name.rpartition(".")[2] in _STATISTICS:
        return "average"
    if matrix:
        return "matrix"
    if not spec.method.matrices:
        return "entries"
    return "row" if spec.name == "svc" else "average"


@dataclass(frozen=True)
class MergedLayer:
    """What is known of a merged matrix.

    Attributes
    ----------
    name : str
    relative_change, rounding_loss : float
        See `LayerChange`.
    before, after : Clash or None
        None where fewer than two inputs change it.
    pairs : tuple of PairClash
        Of the inputs, before.
    clipped : int
        Values that overflowed.
    digest : str
        SHA-256 of the merged tensor.
    """

    name: str
    relative_change: float
    rounding_loss: float
    before: Clash | None
    after: Clash | None
    pairs: tuple[PairClash, ...] = ()
    clipped: int = 0
    digest: str = ""

    @property
    def change(self) -> LayerChange:
        """What merging did to the layer."""
        changed = self.relative_change > 0.0
        return LayerChange(self.name, changed, self.relative_change, self.rounding_loss)


class MergeSpool(Spool):
    """Merged matrices of an output that is not finished."""

    def add(self, layer: MergedLayer, weight: Tensor) -> None:
        """Store a merged matrix."""
        self.keep(layer.name, {"weight": weight}, asdict(layer))

    def finished(self) -> dict[str, MergedLayer]:
        """List the matrices that are finished, by name."""
        return self.records(_from_plain)

    def intact(self, layer: MergedLayer) -> bool:
        """Whether a finished matrix is here and holds what was written."""
        try:
            return self.has_tensors(layer.name) and tensor_digest(self.read(layer.name)) == (
                layer.digest
            )
        except (CheckpointError, KeyError):
            return False

    def read(self, name: str) -> Tensor:
        """Read a finished matrix."""
        return self.tensors(name)["weight"]


def _from_plain(item: Mapping[str, Any]) -> MergedLayer:
    clashes = {
        key: None if item[key] is None else Clash(**item[key]) for key in ("before", "after")
    }
    pairs = tuple(PairClash(**one) for one in item["pairs"])
    return MergedLayer(**{**item, **clashes, "pairs": pairs})


@dataclass
class LayerMerge:
    """How tensors are merged.

    Attributes
    ----------
    base : MergeBase
    inputs : sequence of MergeInput
    spec : MergeSpec
    plans : mapping of str to TensorPlan
    dtype : torch.dtype or None
        What all numbers are written in; as in the base by default.
    allow_overflow : bool
    clipped : dict of str to int
        Values that overflowed, of tensors that are no matrices.
    """

    base: MergeBase
    inputs: Sequence[MergeInput]
    spec: MergeSpec
    plans: Mapping[str, TensorPlan]
    dtype: torch.dtype | None
    allow_overflow: bool
    clipped: dict[str, int] = field(default_factory=dict)

    @property
    def matrices(self) -> list[str]:
        """Names of the matrices, in the base's order."""
        return [name for name, one in self.plans.items() if one.way == "matrix"]

    def out_dtype(self, info: TensorInfo) -> torch.dtype:
        """Return what a tensor is written in."""
        number = info.layout == "dense" and info.dtype in FLOATS and not is_code(info)
        return self.dtype if self.dtype is not None and number else info.dtype

    def run(self, spool: MergeSpool, *, processes: Processes, progress: Progress) -> None:
        """Merge the matrices that are not finished; each process does its share."""
        done = {name for name, one in spool.finished().items() if spool.intact(one)}
        if done:
            progress.note(
                f"resuming: {counted(len(done), 'layers', 'are', of=len(self.matrices))} finished"
            )
        jobs = [self.plans[name].job for name in self.matrices if name not in done]
        mine = share(jobs, processes.count)[processes.rank]
        # Everyone has looked at what is finished before anyone adds to it.
        processes.meet()
        processes.together(lambda: self._keep(mine, spool, progress))

    def _keep(self, jobs: list[Job], spool: MergeSpool, progress: Progress) -> None:
        for layer, weight in self._merged(jobs, progress):
            spool.add(layer, weight)
            del weight

    def _merged(self, jobs: list[Job], progress: Progress) -> Iterator[tuple[MergedLayer, Tensor]]:
        found = run_layers(
            jobs,
            self._stack,
            lambda job, stack, pool: self._merge(job.name, stack, pool),
            size=layer_bytes,
            title="merging",
            memory=budget([Job(job.name, job.matrix[-2:]) for job in jobs])
            + max(map(layer_bytes, jobs), default=0),
            progress=progress,
        )
        for _, (layer, weight) in found:
            yield layer, weight
            del weight

    def _stack(self, name: str) -> Tensor:
        plan = self.plans[name]
        weight = self.base.source.read(name)
        stack = torch.empty(len(plan.inputs), *weight.shape)
        with one_thread():
            for index, number in enumerate(plan.inputs):
                stack[index] = self.inputs[number].delta(name, weight)
        return stack

    def _merge(self, name: str, stack: Tensor, pool: ThreadPool) -> tuple[MergedLayer, Tensor]:
        plan = self.plans[name]
        looks = []
        if plan.view == "batch":
            sides = stack.shape[-2:]
            stack = stack.reshape(len(plan.inputs), -1, *sides)
            change = torch.empty(stack.shape[1:], dtype=torch.float64)
            for expert in range(len(change)):
                look = self._matrix(plan, stack[:, expert], pool)
                change[expert] = look.delta
                looks.append(look)
        else:
            looks.append(self._matrix(plan, stack, pool))
            change = looks[0].delta.double()
        del stack
        weight = self.base.source.read(name)
        merged, relative, lost, clipped = self._rounded(plan.info, weight, change)
        layer = MergedLayer(
            name,
            relative,
            lost,
            before=_mean([one.before for one in looks]),
            after=_mean([one.after for one in looks]),
            pairs=mean_pairs(pair for one in looks for pair in one.pairs),
            clipped=clipped,
            digest=tensor_digest(merged),
        )
        return layer, merged

    def _there(self, stack: Tensor) -> tuple[Tensor, list[int]]:
        """Leave out changes that are zero; return the others, and which they are."""
        there = [i for i in range(len(stack)) if bool(stack[i].any())]
        if self.spec.method.most is None and len(there) < len(stack):
            stack = stack[there]
        return stack, there

    def _matrix(self, plan: TensorPlan, stack: Tensor, pool: ThreadPool) -> _Look:
        """Merge one matrix and look at how its changes clash."""
        stack, there = self._there(stack)
        if not len(stack):
            return _Look(torch.zeros(stack.shape[1:], dtype=torch.float64))
        numbers = [plan.inputs[i] for i in there]
        if len(there) < 2:
            return _Look(combine_deltas(stack, self.spec, pool).delta)
        found = combine_deltas(stack, self.spec, pool)
        known = None if found.known is None else found.known.inputs
        inputs = Inputs.of(stack, pool, known)
        before = clash_of(inputs, stack.sum(dim=0), pool, inputs.largest)
        after = (
            _after(found, len(stack), inputs.largest, pool)
            if found.share is None
            else before.times(found.share)
        )
        return _Look(found.delta, before, after, tuple(inputs.pairs(numbers)))

    def _rounded(
        self, info: TensorInfo, weight: Tensor, change: Tensor
    ) -> tuple[Tensor, float, float, int]:
        """Add a change, round once; return the result, two measures, and the values clipped."""
        sums = _Sums()
        merged = _quickly(weight, change, self.out_dtype(info), sums)
        clipped = 0
        if merged is None:
            sums, rounding = _Sums(), Rounding(allow_overflow=self.allow_overflow)
            start, change = weight.double(), change.reshape(weight.shape).double()
            total = start + change
            merged = rounding.round(info, total, self.out_dtype(info), start)
            sums.add(start, change, torch.nan_to_num(merged.double() - total))
            clipped = rounding.clipped.get(info.name, 0)
        return merged, sums.relative, sums.lost, clipped

    def tensor(self, name: str) -> Tensor:
        """Merge any tensor, without a look at how its changes clash."""
        plan = self.plans.get(name)
        if plan is None or plan.way != "matrix":
            return self.other(name)
        stack = self._stack(name)
        matrices = stack.reshape(len(stack), -1, *plan.job.matrix[-2:])
        with ThreadPool() as pool:
            parts = [self._unseen(matrices[:, one], pool) for one in range(matrices.shape[1])]
        weight = self.base.source.read(name)
        return self._counted(plan.info, weight, torch.stack(parts))

    def _unseen(self, stack: Tensor, pool: ThreadPool) -> Tensor:
        stack, _ = self._there(stack)
        if not len(stack):
            return torch.zeros(stack.shape[1:], dtype=torch.float64)
        return combine_deltas(stack, self.spec, pool).delta.double()

    def other(self, name: str) -> Tensor:
        """Merge a tensor that is no matrix, or round one that nobody changes."""
        info = self.base.source.infos[name]
        weight = self.base.source.read(name)
        plan = self.plans.get(name)
        if plan is None or plan.way == "keep":
            if self.out_dtype(info) == weight.dtype:
                return weight
            return self._counted(info, weight, torch.zeros(weight.shape, dtype=torch.float64))
        return self._counted(info, weight, self._change(plan, weight))

    def _counted(self, info: TensorInfo, weight: Tensor, change: Tensor) -> Tensor:
        merged, _, _, clipped = self._rounded(info, weight, change)
        if clipped:
            self.clipped[info.name] = clipped
        return merged

    def _change(self, plan: TensorPlan, weight: Tensor) -> Tensor:
        name = plan.info.name
        if plan.way == "average" or self.spec.name == "linear":
            # One at a time: a vocabulary is the largest tensor there is.
            total = torch.zeros(weight.shape, dtype=torch.float64)
            for number in plan.inputs:
                total += self.inputs[number].delta(name, weight)
            scale = 1.0 if name.rpartition(".")[2] in _STATISTICS else self.spec.scale
            return total * (scale / plan.asked if plan.way == "average" else scale)
        stack = self._stack(name)
        with ThreadPool() as pool:
            if plan.way == "row":
                alpha = self.spec.values.get("alpha")
                rows = stack.reshape(len(stack), 1, -1)
                return svc(rows, alpha=alpha, pool=pool).delta * self.spec.scale
            return combine_deltas(stack, self.spec, pool).delta


@dataclass
class _Sums:
    """Norms of a weight, its change, and what rounding does, over parts."""

    weight: float = 0.0
    change: float = 0.0
    error: float = 0.0

    def add(self, weight: Tensor, change: Tensor, error: Tensor) -> None:
        self.weight = math.hypot(self.weight, norm(weight))
        self.change = math.hypot(self.change, norm(change))
        self.error = math.hypot(self.error, norm(error))

    @property
    def relative(self) -> float:
        return self.change / self.weight if self.weight > 0.0 else float(self.change > 0.0)

    @property
    def lost(self) -> float:
        return self.error / self.change if self.change > 0.0 else 0.0


def _quickly(weight: Tensor, change: Tensor, dtype: torch.dtype, sums: _Sums) -> Tensor | None:
    """Add and round part by part, in a core's cache; None where not all sums fit the dtype."""
    merged = torch.empty(weight.shape, dtype=dtype)
    flat, start, by = merged.view(-1), weight.reshape(-1), change.reshape(-1)
    for part in cuts(len(flat), _PART):
        W, D = start[part].double(), by[part].double()
        total = W + D
        if not float(total.abs().max()) <= torch.finfo(dtype).max:
            return None
        flat[part] = round_once(total, dtype)
        sums.add(W, D, total.sub_(flat[part]))
    return merged


@dataclass(frozen=True)
class _Look:
    """One merged matrix, and how its changes clash."""

    delta: Tensor
    before: Clash | None = None
    after: Clash | None = None
    pairs: tuple[PairClash, ...] = ()


def _after(found: Combined, count: int, largest: Tensor, pool: ThreadPool) -> Clash:
    parts = torch.empty(count, *found.delta.shape)
    for index in range(count):
        parts[index] = found.part(index)
    if (known := found.known) is None:
        return clash_of(Inputs.of(parts, pool), found.delta, pool, largest)
    return clash_of(Inputs.of(parts, pool, known.parts), found.delta, pool, largest, known.whole)


def _mean(clashes: Iterable[Clash | None]) -> Clash | None:
    there = [(one, 1.0) for one in clashes if one is not None]
    return mean_clash(there) if there else None


def layer_bytes(job: Job) -> int:
    """Bound what one layer takes: its changes, what they become, and their vectors in float64."""
    *_, m, n = job.matrix
    stack = 4 * job.count * m * n
    short, long = min(m, n), max(m, n)
    vectors = 8 * short * 3 * (long + short)
    return 3 * stack + vectors + 8 * 4 * m * n
