"""A base + many fine-tunes -> one checkpoint, by any method, with the interference shown."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from svftool.checkpoints import PICKLE_SUFFIXES, WEIGHT_SUFFIXES, parse_size, replace_output
from svftool.checkpoints.dtypes import dtype_named
from svftool.choices.dtypes import check_dtype
from svftool.choices.merging import (
    MergeSpec,
    check_weighing,
    check_weight,
    parse_method,
    parse_weighted,
)
from svftool.errors import UsageError, no_such
from svftool.factors.dense import verify_dense, write_dense
from svftool.factors.mixture import LayerChange
from svftool.files.given import check_data
from svftool.files.names import check_dense_name
from svftool.files.output import discard_folder, kept_folder
from svftool.machine import pick_device
from svftool.merging import Clash, mean_clash, mean_pairs
from svftool.processes import Processes, joined_processes
from svftool.progress import SILENT, Progress
from svftool.stages.combine_options import CombineOptions
from svftool.stages.combine_result import CombinedInput, CombineResult, Interference, WeightChoice
from svftool.stages.merge_checkpoint import MergedCheckpoint, MergeWork
from svftool.stages.merge_heads import plan_heads
from svftool.stages.merge_inputs import (
    Absent,
    MergeInput,
    absent_from,
    open_merge_base,
    open_merge_inputs,
)
from svftool.stages.merge_layers import LayerMerge, MergeSpool, plan_tensors
from svftool.stages.merge_trials import check_examples
from svftool.stages.merge_weights import choose_weights, has_trials
from svftool.tasks.options import TASKS

_HEADS = ("concat", "first", "drop")


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
        spec = _suited(spec, opened, progress)
        heads = plan_heads(found, opened, options.heads)
        merge = LayerMerge(
            found,
            opened,
            spec,
            plan_tensors(found, opened, spec, heads.names),
            None if options.dtype is None else dtype_named(options.dtype),
            options.allow_overflow,
        )
        work = MergeWork(merge, heads, options, Path(base), target)
        if options.weights is not None:
            how = options.weights
            processes.once(lambda: check_examples(work, how, progress))
        return _run(work, processes, force=force, resume=resume, progress=progress)


def _suited(spec: MergeSpec, inputs: Sequence[MergeInput], progress: Progress) -> MergeSpec:
    """Return what is meant by ``auto``, and say it."""
    changes = [one.path.name for one in inputs if not one.dense]
    found = spec.suited(dense=not changes)
    if found is not spec:
        why = f"{changes[0]} holds changes" if changes else "every input holds weights"
        progress.note(f"--method {spec}: {found}, as {why}")
    return found


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
    if options.weights is not None:
        how = options.weights
        check_weighing(how.task, how.trials, TASKS)
        check_data(Path(how.data), how.task)
        pick_device(how.device)
    if options.max_shard_size is not None:
        parse_size(options.max_shard_size)
        if target.suffix in WEIGHT_SUFFIXES:
            raise UsageError(
                f"--max-shard-size: {target} is one file, which has no shards, expected a folder. "
                f"Write to {target.with_suffix('')}, or leave the option out."
            )


def _run(
    work: MergeWork, processes: Processes, *, force: bool, resume: bool, progress: Progress
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
            work = _weighed(work, folder, processes, resume=resume, progress=progress)
            spool = MergeSpool(folder, work.merge.matrices, work.target)
            processes.once(lambda: spool.begin(work.facts(), resume=resume))
            work.merge.run(spool, processes=processes, progress=progress)
            result = processes.once(lambda: _write(work, spool, partial, progress))
        except BaseException:
            if processes.first and not (spool.holds_layers or has_trials(folder)):
                discard_folder(folder)
            raise
    # Only now: until the output is in its place, what it is made of is kept.
    if processes.first:
        discard_folder(folder)
    return result


def _weighed(
    work: MergeWork, folder: Path, processes: Processes, *, resume: bool, progress: Progress
) -> MergeWork:
    """Let data choose the weights, where it is asked for; the first process looks."""
    how = work.options.weights
    if how is None:
        return work

    def chosen() -> WeightChoice:
        return choose_weights(work, how, folder, resume=resume, progress=progress)

    choice = processes.once(chosen)
    return work.weighted(choice.chosen.weights, choice)


def _write(work: MergeWork, spool: MergeSpool, partial: Path, progress: Progress) -> CombineResult:
    base = work.merge.base.checkpoint
    for warning in base.warnings:
        progress.warn(warning)
    missing = [
        absent_from(one, work.heads.placed_of(number), progress)
        for number, one in enumerate(work.merge.inputs)
    ]
    merged = MergedCheckpoint(work, spool)
    size = work.options.max_shard_size
    layers, left = write_dense(
        merged,
        partial,
        target=work.target,
        max_bytes=None if size is None else parse_size(size),
        progress=progress,
        stated=work.stated,
    )
    if work.options.verify:
        verify_dense(merged, partial, work.target, progress)
    dropped = dict(base.passed_over)
    if work.target.suffix in PICKLE_SUFFIXES and len(base.files) == 1:
        dropped = {}
    return _result(work, spool, merged, layers, missing, {**dropped, **left})


def _result(
    work: MergeWork,
    spool: MergeSpool,
    merged: MergedCheckpoint,
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
        weights=work.choice,
    )


def _ways(work: MergeWork) -> dict[str, dict[str, int]]:
    """Count what is no matrix, by what was done to it and why."""
    found: dict[str, dict[str, int]] = {}
    said = {"entries": "entry by entry", "average": "averaged", "row": "as one row"}
    for plan in work.merge.plans.values():
        if plan.way != "matrix":
            reasons = found.setdefault(said.get(plan.way, "as in the base"), {})
            reasons[plan.why] = reasons.get(plan.why, 0) + 1
    return found


def _interference(work: MergeWork, spool: MergeSpool) -> Interference:
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
