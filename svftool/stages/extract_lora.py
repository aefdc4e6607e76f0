"""A base + its fine-tune -> a low-rank adapter in any layout, with the error of every layer."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svftool.adapters.assembly import write_adapter
from svftool.adapters.parts import BaseModel
from svftool.adapters.writers import Entries, LayoutWriter, layout_writer
from svftool.auditing import AuditSource, counterparts, open_source
from svftool.checkpoints import (
    TensorInfo,
    check_patterns,
    dtype_name,
    matches,
    matrix_shape,
    replace_output,
    to_matrix,
)
from svftool.checkpoints.dtypes import DECOMPOSABLE, dtype_named
from svftool.choices.adapters import AdapterRank, parse_adapter_rank
from svftool.choices.dtypes import DTYPES, check_dtype
from svftool.engine import Job, run_values
from svftool.errors import CheckpointError, UnchangedError, UsageError, counted, shortlist
from svftool.factors import is_tuned
from svftool.files.output import discard_folder, kept_folder
from svftool.machine import pick_device
from svftool.processes import Processes, joined_processes
from svftool.progress import SILENT, Progress
from svftool.stages.adapter_names import names_for
from svftool.stages.changes import BothSides, Survey, drop_tied, refuse_another_base, survey_of
from svftool.stages.truncation import AdapterSpool, Truncation
from svftool.training.workspace import describe_files
from svftool.version import __version__


@dataclass(frozen=True)
class LoraOptions:
    """How a fine-tune is turned into an adapter.

    Attributes
    ----------
    rank : str
        ``64``, ``energy:0.95`` or ``error:0.1``.
    layout : str
        ``peft``, ``kohya``, ``comfy`` or ``diffusers``.
    max_rank : int or None
        No layer gets a higher one.
    uniform_rank : bool
        All layers get the highest rank of any, filled up with zeros.
    dtype : str or None
        ``float32``, ``bfloat16`` or ``float16``; by default that of the fine-tune.
    include, exclude : sequence of str
        Patterns of tensor names of the base.
    device : str
        ``auto``, ``cpu``, ``cuda`` or ``cuda:i``.
    """

    rank: str = "64"
    layout: str = "peft"
    max_rank: int | None = None
    uniform_rank: bool = False
    dtype: str | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    device: str = "auto"


@dataclass(frozen=True)
class AdaptedLayer:
    """One layer of the adapter.

    Attributes
    ----------
    name : str
        Tensor name in the base.
    rank : int
    error : float
        ``||D - BA||_F / ||D||_F`` of the change D, with B and A as they are stored; of a plan, NaN
        where it is not known.
    share : float
        ``||D||_F^2`` over that of the whole change.
    floored : bool
        Whether the rank ends where rounding of the fine-tune begins.
    """

    name: str
    rank: int
    error: float
    share: float
    floored: bool = False


@dataclass(frozen=True)
class LeftOut:
    """A change that the adapter does not hold; its share is None where it cannot be measured."""

    name: str
    reason: str
    bytes: int
    share: float | None = None


@dataclass(frozen=True)
class LoraResult:
    """What `extract_lora` did, or would do.

    Attributes
    ----------
    output : Path
    layout : str
    dtype : str
        Of the two matrices.
    dry_run : bool
    layers : tuple of AdaptedLayer
        In file order.
    error : float
        Of everything that changed together: what is left out counts in full.
    whole : tuple of str
        Tensors that are stored whole.
    missing : tuple of str
        Layers that the fine-tune does not have; they stay as in the base.
    dropped : tuple of LeftOut
    bytes : int
        Of the tensors written.
    """

    output: Path
    layout: str
    dtype: str
    dry_run: bool
    layers: tuple[AdaptedLayer, ...]
    error: float
    whole: tuple[str, ...]
    missing: tuple[str, ...]
    dropped: tuple[LeftOut, ...]
    bytes: int

    @property
    def layer_error(self) -> float:
        """The same error over the layers of low rank alone; NaN where it is not known."""
        share = sum(one.share for one in self.layers)
        lost = sum(one.error**2 * one.share for one in self.layers)
        return math.sqrt(lost / share) if share > 0 else 0.0


def extract_lora(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str],
    options: LoraOptions | None = None,
    dry_run: bool = False,
    resume: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
) -> LoraResult:
    """Turn a fine-tune into a low-rank adapter.

    Parameters
    ----------
    base, tuned : path-like
        Checkpoints in any format; the fine-tune may be a PEFT LoRA folder.
    output : path-like
        A folder for PEFT's layout, a file for the others.
    options : LoraOptions, optional
    dry_run : bool
        Say sizes and the ranks to expect; write nothing.
    resume : bool
        Continue where an interrupted run of the same options on the same checkpoints stopped.
    force : bool
        Replace an existing output.
    progress : Progress

    Returns
    -------
    LoraResult

    Raises
    ------
    CheckpointError
        If the two have nothing in common, one is no fine-tune of the other, or nothing changed
        that the layout can hold.
    NumericalError
        If the fine-tune holds NaN or infinity where the base does not.
    UsageError
        If an option is none, or the output exists.
    """
    options, target = options or LoraOptions(), Path(output)
    rank = parse_adapter_rank(options.rank, options.max_rank)
    kind = layout_writer(options.layout)
    if options.dtype is not None:
        check_dtype(options.dtype)
    if is_tuned(tuned):
        raise UsageError(
            f"{tuned}: a tuned file, expected a dense fine-tune or an adapter. Turn it into an "
            "adapter with svftool convert"
        )
    device = pick_device(options.device)
    with ExitStack() as stack:
        processes = stack.enter_context(joined_processes())
        before = stack.enter_context(open_source(base))
        after = stack.enter_context(open_source(tuned))
        for warning in dict.fromkeys((*before.warnings, *after.warnings)):
            progress.warn(warning)
        pair = BothSides(before, counterparts(before, after, progress))
        wanted = _wanted(before.infos, options)
        survey = survey_of(pair, progress, processes)
        refuse_another_base(before, after, survey)
        drop_tied(pair, survey, progress)
        changed = [name for name in survey.squares if name in wanted]
        if not changed:
            raise UnchangedError(
                f"{after.path}: nothing differs from {before.path}"
                f"{' among the tensors asked for' if wanted < set(before.infos) else ''}, expected "
                "a fine-tune of it. Name another one."
            )
        renamed = names_for(
            options.layout, before.infos, before.config, before.path, changed, progress
        )
        model = BaseModel(before.infos, before.config or {}, str(base), renamed=renamed)
        work = _Work(
            pair,
            survey,
            rank,
            options,
            kind(model, changed),
            _dtype(options, after, changed),
            device,
        )
        work.check_some()
        if dry_run:
            return _plan(work, target, progress)
        return _run(work, target, processes, force=force, resume=resume, progress=progress)


def _wanted(infos: Mapping[str, TensorInfo], options: LoraOptions) -> set[str]:
    check_patterns([*options.include, *options.exclude], infos)
    return {
        name
        for name in infos
        if (not options.include or matches(name, options.include))
        and not matches(name, options.exclude)
    }


def _dtype(options: LoraOptions, after: AuditSource, changed: Sequence[str]) -> torch.dtype:
    """Return the dtype asked for; else that of most of the fine-tune's matrices."""
    if options.dtype is not None:
        return dtype_named(options.dtype)
    sizes: Counter[torch.dtype] = Counter()
    for info in after.infos.values():
        if info.dtype in DECOMPOSABLE and len(info.shape) > 1:
            sizes[info.dtype] += info.numel
    most = max(sizes, key=lambda one: sizes[one], default=torch.float32)
    if dtype_name(most) in DTYPES:
        return most
    return torch.float32 if most == torch.float64 else torch.bfloat16


@dataclass(frozen=True)
class _Work:
    """What is to be done."""

    pair: BothSides
    survey: Survey
    rank: AdapterRank
    options: LoraOptions
    writer: LayoutWriter
    dtype: torch.dtype
    device: torch.device

    @cached_property
    def total(self) -> float:
        """Sum of squares of the whole change; counters and other integers are no part of it."""
        return sum(self.squares(name) for name in self.survey.squares)

    def squares(self, name: str) -> float:
        """Return the sum of squares of one tensor's change; 0 of integers."""
        counts = self.pair.before.infos[name].dtype.is_floating_point
        return self.survey.squares.get(name, 0.0) if counts else 0.0

    def named(self, kind: str) -> list[str]:
        """Return changed tensors of one fate, in the base's order."""
        return [n for n in self.pair.before.infos if self._kind(n) == kind]

    def _kind(self, name: str) -> str | None:
        fate = self.writer.fates.get(name)
        return None if fate is None else fate.kind

    def share(self, name: str) -> float:
        """Return a tensor's part of the whole change."""
        return self.squares(name) / self.total if self.total > 0 else 0.0

    def matrix(self, name: str) -> tuple[int, int]:
        """Return the sides of a layer's matrix."""
        m, n = matrix_shape(self.pair.before.infos[name].shape)
        return m, n

    def jobs(self) -> list[Job]:
        """List the layers to truncate, in the base's order."""
        return [Job(name, self.matrix(name)) for name in self.named("low rank")]

    def truncation(self) -> Truncation:
        """Return how they are truncated."""
        return Truncation(
            rank=self.rank,
            dtype=self.dtype,
            device=self.device,
            change=lambda name: to_matrix(self.pair.change(name)),
            floor=self.pair.floor,
            held=lambda name: self.pair.before.infos[name].nbytes,
        )

    def check_some(self) -> None:
        """Refuse where the layout holds nothing of what changed."""
        if not self.named("low rank") and not self.named("whole"):
            reasons = {fate.reason for fate in self.writer.fates.values()}
            raise CheckpointError(
                f"{self.pair.side.source.path}: nothing that changed can be held by the "
                f"{self.options.layout} layout ({shortlist(sorted(reasons), 2)}). "
                "Choose another --layout."
            )

    def left_out(self) -> list[LeftOut]:
        """Return what the adapter will not hold, before any layer is looked at."""
        infos, side = self.pair.before.infos, self.pair.side
        found = [
            LeftOut(name, fate.reason, infos[name].nbytes, self.share(name))
            for name, fate in self.writer.fates.items()
            if fate.kind == "dropped"
        ]
        found += [
            LeftOut(name, "not among the tensors asked for", infos[name].nbytes, self.share(name))
            for name in self.survey.squares
            if name not in self.writer.fates
        ]
        held, lora = side.source.infos, side.source.lora
        resized = {side.misshapen[name]: name for name in self.resized()}
        for one in side.tuned_only:
            if one.name in resized:
                found += self._added_rows(resized[one.name])
                continue
            size = held[one.name].nbytes if one.name in held else 0
            if one.name not in held and lora is not None:
                size = lora.bytes_of(one.name)
            found.append(LeftOut(one.name, one.reason, size))
        beside = side.source.passed_over.items()
        return found + [LeftOut(name, "not among the tensors", size) for name, size in beside]

    def resized(self) -> list[str]:
        """List the matrices with more or fewer rows whose common ones are expressed."""
        return [name for name in self.survey.squares if self.pair.common_rows(name) is not None]

    def _added_rows(self, name: str) -> list[LeftOut]:
        """Name the rows that only the fine-tune has."""
        rows = self.pair.common_rows(name) or 0
        theirs = self.pair.side.source.infos[self.pair.side.misshapen[name]]
        more = theirs.shape[0] - rows
        if not more:
            return []
        size = more * theirs.nbytes // theirs.shape[0]
        return [LeftOut(name, f"{more} rows that the base does not have", size)]

    def missing(self) -> tuple[str, ...]:
        """Return matrices that the fine-tune does not have."""
        if self.pair.side.source.lora is not None:
            return ()
        held = {*self.pair.side.names, *self.pair.side.misshapen}
        infos = self.pair.before.infos
        return tuple(name for name in infos if name not in held and len(infos[name].shape) > 1)

    def entries_of_whole(self) -> Iterator[Entries]:
        """Yield the entries of everything that is stored whole, one tensor at a time."""
        for name in (*self.named("whole"), *self.writer.companions):
            base, tuned = self.pair.before.read(name), self.pair.tuned(name)
            yield self.writer.whole(name, base, tuned, self.dtype)


def _plan(work: _Work, target: Path, progress: Progress) -> LoraResult:
    """Say ranks and sizes; where the spectrum decides, it is taken, without singular vectors."""
    expected = {} if work.rank.kind == "count" else _expected(work, progress)
    layers = [
        expected.get(name)
        or AdaptedLayer(name, work.rank.limit(*work.matrix(name)), math.nan, work.share(name))
        for name in work.named("low rank")
    ]
    most = max((one.rank for one in layers), default=0)
    if work.options.uniform_rank:
        layers = [replace(one, rank=most) for one in layers]
    size = sum(sum(work.matrix(one.name)) * one.rank for one in layers) * work.dtype.itemsize
    size += sum(work.pair.before.infos[name].nbytes for name in work.named("whole"))
    return LoraResult(
        output=target,
        layout=work.options.layout,
        dtype=dtype_name(work.dtype),
        dry_run=True,
        layers=tuple(layers),
        error=math.nan,
        whole=tuple(work.named("whole")),
        missing=work.missing(),
        dropped=tuple(work.left_out()),
        bytes=size,
    )


def _expected(work: _Work, progress: Progress) -> dict[str, AdaptedLayer]:
    """Return what the spectra of the changes ask for; rounding of the two matrices is left out."""
    floors: dict[str, float] = {}
    found = {}

    def read(name: str) -> Tensor:
        floors[name] = work.pair.floor(name)
        return to_matrix(work.pair.change(name))

    for name, S in run_values(work.jobs(), read, device=work.device, progress=progress):
        above = int((floors[name] < S).sum())
        rank = max(1, min(work.rank.of_spectrum(S), above))
        error = float(S[rank:].norm() / S.norm()) if float(S[0]) > 0 else 0.0
        found[name] = AdaptedLayer(name, rank, error, work.share(name), rank == above < len(S))
    return found


def _run(
    work: _Work,
    target: Path,
    processes: Processes,
    *,
    force: bool,
    resume: bool,
    progress: Progress,
) -> LoraResult:
    """Truncate what is not finished and write the adapter; the processes share the layers."""
    inputs = [work.pair.before.path, work.pair.side.source.path]
    with ExitStack() as stack:

        def claim() -> tuple[Path, Path]:
            partial = stack.enter_context(replace_output(target, force=force, inputs=inputs))
            return partial, kept_folder(partial, resume=resume)

        partial, folder = processes.once(claim)
        spool = AdapterSpool(folder, work.named("low rank"), target)
        try:
            processes.once(lambda: spool.begin(_facts(work), resume=resume))
            work.truncation().run(work.jobs(), spool, processes=processes, progress=progress)
            result = processes.once(lambda: _write(work, spool, partial, target, progress))
        except BaseException:
            if processes.first and not spool.holds_layers:
                discard_folder(folder)
            raise
    # Only now: until the output is in its place, what it is made of is kept.
    if processes.first:
        discard_folder(folder)
    return result


def _facts(work: _Work) -> dict[str, Any]:
    """Everything that decides the layers: an interrupted run must agree to be resumed."""
    return {
        "base": describe_files(work.pair.before.path),
        "fine-tune": describe_files(work.pair.side.source.path),
        "layers": [[job.name, *job.matrix] for job in work.jobs()],
        "layout": work.options.layout,
        "rank": str(work.rank),
        "max_rank": work.rank.most,
        "dtype": dtype_name(work.dtype),
    }


def _write(
    work: _Work, spool: AdapterSpool, partial: Path, target: Path, progress: Progress
) -> LoraResult:
    found = spool.finished()
    rows, rest, dropped = [], 0.0, work.left_out()
    ranks: dict[str, int] = {}
    for name in work.named("low rank"):
        one = found[name]
        if not one.rank:
            nbytes = work.pair.before.infos[name].nbytes
            dropped.append(LeftOut(name, "no more than rounding", nbytes, work.share(name)))
            continue
        ranks[name] = one.rank
        rest += one.rest**2
        rows.append(AdaptedLayer(name, one.rank, one.error, work.share(name), one.floored))
    whole = tuple(work.named("whole"))
    if not ranks and not whole:
        raise CheckpointError(
            f"{work.pair.side.source.path}: its difference from {work.pair.before.path} is no more "
            "than the rounding of its dtype, expected a change. Name a fine-tune of this base."
        )
    rest += sum(work.squares(one.name) for one in dropped if one.share is not None)
    if work.options.uniform_rank and ranks:
        most = max(ranks.values())
        filled = sum(rank < most for rank in ranks.values())
        if filled:
            progress.note(
                f"{counted(filled, 'layers', 'are', of=len(ranks))} filled up to rank {most} with "
                "zeros"
            )
        ranks = dict.fromkeys(ranks, most)
    size = _assemble(work, ranks, partial, spool)
    _say(work, rows, dropped, progress)
    return LoraResult(
        output=target,
        layout=work.options.layout,
        dtype=dtype_name(work.dtype),
        dry_run=False,
        layers=tuple(AdaptedLayer(**{**vars(r), "rank": ranks[r.name]}) for r in rows),
        error=math.sqrt(rest / work.total) if work.total > 0 else 0.0,
        whole=whole,
        missing=work.missing(),
        dropped=tuple(dropped),
        bytes=size,
    )


def _assemble(work: _Work, ranks: Mapping[str, int], partial: Path, spool: AdapterSpool) -> int:
    """Write the adapter from what lies on the disk; return the bytes of its tensors."""
    writer = work.writer

    def thin() -> Iterator[Entries]:
        for name in ranks:
            yield writer.entries(spool.read(name).padded(ranks[name]))

    return write_adapter(
        partial,
        (thin, work.entries_of_whole),
        metadata=writer.metadata(ranks, _about(work)),
        weights_file=writer.weights_file if writer.is_folder else None,
        config=writer.config(ranks),
    )


def _about(work: _Work) -> str:
    options = work.options
    return (
        f"svftool {__version__}: extract --as lora --rank {work.rank} --layout {options.layout} "
        f"from {work.pair.side.source.path.name} over {work.pair.before.path.name}"
    )


def _say(
    work: _Work, rows: Sequence[AdaptedLayer], dropped: Sequence[LeftOut], progress: Progress
) -> None:
    for name in work.resized():
        rows_there = work.pair.common_rows(name)
        progress.note(f"{name}: its first {rows_there} rows, which both have, are expressed")
    floored = [row.name for row in rows if row.floored]
    if floored:
        progress.note(
            f"{counted(len(floored), 'layers', of=len(rows))}: the rank ends where rounding of the "
            f"fine-tune begins ({shortlist(floored, 2)})"
        )
    if dropped:
        listed = shortlist((f"{one.name} ({_reason(one)})" for one in dropped), 4)
        progress.warn(f"{work.pair.side.source.path.name}: left out: {listed}")


def _reason(one: LeftOut) -> str:
    return one.reason if one.share is None else f"{one.reason}, {one.share:.2%} of the change"
