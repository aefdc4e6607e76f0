"""A base + many fine-tunes -> one checkpoint, by any method, with the interference shown."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svftool.checkpoints import (
    PICKLE_SUFFIXES,
    WEIGHT_SUFFIXES,
    Checkpoint,
    TensorInfo,
    parse_size,
    replace_output,
)
from svftool.checkpoints.dtypes import dtype_named
from svftool.choices.dtypes import check_dtype
from svftool.choices.merging import Heads, MergeSpec, check_weight, parse_method, parse_weighted
from svftool.errors import FactorsError, UsageError, no_such
from svftool.factors import FactorStore
from svftool.factors.dense import verify_dense, write_dense
from svftool.factors.mixture import LayerChange
from svftool.factors.overflow import Rounding
from svftool.factors.stated import Stated, stated_by
from svftool.files.folder import check_dense_name
from svftool.files.output import discard_folder, kept_folder
from svftool.merging import Clash, mean_clash, mean_pairs
from svftool.numerics import ThreadPool
from svftool.processes import Processes, joined_processes
from svftool.progress import SILENT, Progress
from svftool.stages.combine_result import CombinedInput, CombineResult, Interference
from svftool.stages.merge_heads import HeadPlan, plan_heads
from svftool.stages.merge_inputs import (
    Absent,
    absent_from,
    open_merge_base,
    open_merge_inputs,
)
from svftool.stages.merge_layers import LayerMerge, MergeSpool, plan_tensors
from svftool.training.workspace import describe_files

_HEADS = ("concat", "first", "drop")


@dataclass(frozen=True, kw_only=True)
class CombineOptions:
    """How many fine-tunes are made one.

    Attributes
    ----------
    method : str
        Such as ``"tsv"`` or ``"ties:density=0.2"``.
    heads : {"concat", "first", "drop"} or None
        What becomes of output heads of different classes: all rows, those of the first input that
        has one, or the base's. They are refused by default.
    other_base : bool
        Whether an input may be all but unrelated to the base.
    base : path-like or None
        Where the base of factors is, if not at its recorded place.
    max_shard_size : str or None
        Reshard, such as ``"5GB"``.
    dtype : str or None
        ``"float32"``, ``"bfloat16"`` or ``"float16"``: what floating numbers are written in.
    allow_overflow : bool
        Clip values that their dtype cannot hold.
    verify : bool
        Read the result again and compare every tensor with what was computed.
    """

    method: str = "linear"
    heads: Heads | None = None
    other_base: bool = False
    base: str | os.PathLike[str] | None = None
    max_shard_size: str | None = None
    dtype: str | None = None
    allow_overflow: bool = False
    verify: bool = False


def combine(
    base: str | os.PathLike[str],
    inputs: Sequence[str | os.PathLike[str] | tuple[str | os.PathLike[str], float]],
    *,
    output: str | os.PathLike[str],
    options: CombineOptions | None = None,
    resume: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
) -> CombineResult:
    """Make one checkpoint of a base and many fine-tunes.

    Every input becomes its change of the base, times its weight; the method makes one change of
    all, layer by layer; it is added to the base and rounded once.

    Parameters
    ----------
    base : path-like
        A checkpoint in any format, or factors where tuned files are among the inputs.
    inputs : sequence
        Dense fine-tunes, adapters and tuned files, each a path, ``"PATH@WEIGHT"`` or a pair of
        both.
    output : path-like
        A checkpoint; its suffix decides between file and folder.
    options : CombineOptions, optional
    resume : bool
        Continue where an interrupted run of the same options on the same files stopped.
    force : bool
        Replace an existing output.
    progress : Progress

    Returns
    -------
    CombineResult

    Raises
    ------
    CheckpointError
        If an input has nothing in common with the base, or has another one.
    FactorsError
        If a tuned file does not belong to the factors, or heads stand for different classes.
    NumericalError
        If an input or a sum is not finite.
    UsageError
        If an option is none, or the output exists.
    """
    options, target = options or CombineOptions(), Path(output)
    spec = parse_method(options.method)
    given = [parse_weighted(one) for one in inputs]
    _check(spec, given, options, target)
    with ExitStack() as stack:
        processes = stack.enter_context(joined_processes())
        found = open_merge_base(stack, base, options.base, progress)
        opened = open_merge_inputs(
            stack,
            found,
            given,
            other_base=options.other_base,
            processes=processes,
            progress=progress,
        )
        heads = plan_heads(found, opened, options.heads)
        merge = LayerMerge(
            found,
            opened,
            spec,
            plan_tensors(found, opened, spec, heads.names),
            None if options.dtype is None else dtype_named(options.dtype),
            options.allow_overflow,
        )
        work = _Work(merge, heads, options, Path(base), target)
        return _run(work, processes, force=force, resume=resume, progress=progress)


def _check(
    spec: MergeSpec, given: Sequence[tuple[Path, float]], options: CombineOptions, target: Path
) -> None:
    spec.check_count(len(given))
    if not given:
        raise UsageError("--method: nothing to merge, expected fine-tunes after the base")
    for path, weight in given:
        check_weight(path, weight)
    check_dense_name(target)
    if options.dtype is not None:
        check_dtype(options.dtype)
    if options.heads is not None and options.heads not in _HEADS:
        raise UsageError(no_such("--heads:", options.heads, _HEADS))
    if options.max_shard_size is not None:
        parse_size(options.max_shard_size)
        if target.suffix in WEIGHT_SUFFIXES:
            raise UsageError(
                f"--max-shard-size: {target} is one file, which has no shards, expected a folder. "
                f"Write to {target.with_suffix('')}, or leave the option out."
            )


@dataclass(frozen=True)
class _Work:
    """What is to be done."""

    merge: LayerMerge
    heads: HeadPlan
    options: CombineOptions
    given: Path
    target: Path

    @property
    def paths(self) -> list[Path]:
        """What is read."""
        inputs = [one.path for one in self.merge.inputs]
        return [self.given, self.merge.base.checkpoint.path, *inputs]

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


def _run(
    work: _Work, processes: Processes, *, force: bool, resume: bool, progress: Progress
) -> CombineResult:
    """Merge what is not finished and write the checkpoint; the processes share the matrices."""
    with ExitStack() as stack:

        def claim() -> tuple[Path, Path]:
            partial = stack.enter_context(
                replace_output(work.target, force=force, inputs=work.paths)
            )
            return partial, kept_folder(partial, resume=resume)

        partial, folder = processes.once(claim)
        spool = MergeSpool(folder, work.merge.matrices, work.target)
        try:
            processes.once(lambda: spool.begin(work.facts(), resume=resume))
            work.merge.run(spool, processes=processes, progress=progress)
            result = processes.once(lambda: _write(work, spool, partial, progress))
        except BaseException:
            if processes.first and not spool.holds_layers:
                discard_folder(folder)
            raise
    # Only now: until the output is in its place, what it is made of is kept.
    if processes.first:
        discard_folder(folder)
    return result


class _Merged:
    """The merged checkpoint as it is written: a tensor at a time."""

    def __init__(self, work: _Work, spool: MergeSpool) -> None:
        self._work, self._spool = work, spool
        self._layers = spool.finished()
        base = work.merge.base.source.infos
        heads = work.heads.tensors
        self.added = tuple(name for name in heads if name not in base)
        self.replaced = tuple(name for name in heads if name in base)
        known = {**base, **{name: one.info for name, one in heads.items()}}
        self.infos: Mapping[str, TensorInfo] = {
            name: replace(info, dtype=work.merge.out_dtype(info)) for name, info in known.items()
        }
        self._clipped = {one.name: one.clipped for one in self._layers.values() if one.clipped}

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
        if name in self._layers or name not in self._work.merge.plans:
            return 2 * info.nbytes
        return (32 + 8 * len(self._work.merge.inputs)) * info.numel

    def tensor(
        self, name: str, pool: ThreadPool | None = None
    ) -> tuple[Tensor, LayerChange | None]:
        """Read or compute one tensor, and what became of it if it is a merged matrix."""
        head = self._work.heads.tensors.get(name)
        if head is not None:
            return self._head(name, head.read(self._work.merge.inputs)), None
        layer = self._layers.get(name)
        if layer is not None:
            return self._spool.read(name), layer.change
        return self._work.merge.other(name), None

    def _head(self, name: str, value: Tensor) -> Tensor:
        info = self.infos[name]
        if value.dtype == info.dtype:
            return value
        rounding = Rounding(allow_overflow=self._work.merge.allow_overflow)
        rounded = rounding.round(info, value.double(), info.dtype)
        self._clipped.update(rounding.clipped)
        return rounded


def _write(work: _Work, spool: MergeSpool, partial: Path, progress: Progress) -> CombineResult:
    base = work.merge.base.checkpoint
    for warning in base.warnings:
        progress.warn(warning)
    missing = [
        absent_from(one, work.heads.placed_of(number), progress)
        for number, one in enumerate(work.merge.inputs)
    ]
    merged = _Merged(work, spool)
    size = work.options.max_shard_size
    layers, left = write_dense(
        merged,
        partial,
        target=work.target,
        max_bytes=None if size is None else parse_size(size),
        progress=progress,
        stated=_stated(work, merged),
    )
    if work.options.verify:
        verify_dense(merged, partial, work.target, progress)
    dropped = dict(base.passed_over)
    if work.target.suffix in PICKLE_SUFFIXES and len(base.files) == 1:
        dropped = {}
    return _result(work, spool, merged, layers, missing, {**dropped, **left})


def _stated(work: _Work, merged: _Merged) -> Stated:
    """Say in the result what it was made of."""
    tuned = [
        (one.source.tuned, one.weight) for one in work.merge.inputs if one.source.tuned is not None
    ]
    stated = stated_by(tuned) if tuned else Stated()
    parts = [{"file": one.path.name, "weight": one.weight} for one in work.merge.inputs]
    recipe = {"method": str(work.merge.spec), "inputs": parts}
    return replace(
        stated,
        classes=merged.classes or stated.classes,
        training={**stated.training, "merged": recipe},
    )


def _result(
    work: _Work,
    spool: MergeSpool,
    merged: _Merged,
    layers: Sequence[LayerChange],
    missing: Sequence[Absent],
    dropped: Mapping[str, int],
) -> CombineResult:
    merge = work.merge
    touched = {name for name, one in merge.plans.items() if one.way != "keep"}
    rounded = {n for n, i in merge.base.source.infos.items() if merged.infos[n].dtype != i.dtype}
    changed = touched | rounded | set(merged.replaced)
    return CombineResult(
        output=work.target,
        method=str(merge.spec),
        inputs=tuple(
            CombinedInput(
                path=one.path,
                weight=one.weight,
                kind=one.source.kind,
                changed=len(one.survey.squares),
                relative_change=one.relative_change,
                cosine=one.cosine,
                missing=absent.missing,
                extra=absent.extra,
            )
            for one, absent in zip(merge.inputs, missing, strict=True)
        ),
        layers=tuple(layers),
        interference=_interference(work, spool),
        ways=_ways(work),
        heads={
            **{name: one.how for name, one in work.heads.tensors.items()},
            **dict.fromkeys(work.heads.kept, "as in the base"),
            **dict.fromkeys(work.heads.left, "left out"),
        },
        unchanged=len(merge.base.source.infos) - len(changed),
        added=merged.added,
        replaced=merged.replaced,
        verified=True if work.options.verify else None,
        clipped=merged.clipped,
        dropped=dropped,
    )


def _ways(work: _Work) -> dict[str, dict[str, int]]:
    """Count what is no matrix, by what was done to it and why."""
    found: dict[str, dict[str, int]] = {}
    said = {"entries": "entry by entry", "average": "averaged", "row": "as one row"}
    for plan in work.merge.plans.values():
        if plan.way != "matrix":
            reasons = found.setdefault(said.get(plan.way, "as in the base"), {})
            reasons[plan.why] = reasons.get(plan.why, 0) + 1
    return found


def _interference(work: _Work, spool: MergeSpool) -> Interference:
    finished = spool.finished()
    layers = tuple(finished[name] for name in work.merge.matrices if finished[name].before)
    sizes = {one.name: float(work.merge.base.source.infos[one.name].numel) for one in layers}
    return Interference(
        before=_overall([(one.before, sizes[one.name]) for one in layers]),
        after=_overall([(one.after, sizes[one.name]) for one in layers]),
        layers=layers,
        pairs=mean_pairs(pair for layer in layers for pair in layer.pairs),
    )


def _overall(clashes: Sequence[tuple[Clash | None, float]]) -> Clash | None:
    there = [(one, size) for one, size in clashes if one is not None]
    return mean_clash(there) if there else None
