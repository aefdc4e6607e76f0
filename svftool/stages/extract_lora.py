"""A base + its fine-tune -> a low-rank adapter in any layout, with the error of every layer."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from svftool.adapters.assembly import Spool, write_adapter
from svftool.adapters.low_rank import (
    AdapterRank,
    Truncated,
    parse_adapter_rank,
    truncate,
)
from svftool.adapters.parts import BaseModel
from svftool.adapters.writers import Entries, LayoutWriter, layout_writer
from svftool.auditing import AuditSource, Counterparts, counterparts, open_source
from svftool.auditing.evidence import EDGE_MARGIN
from svftool.checkpoints import (
    TensorInfo,
    check_patterns,
    dtype_name,
    matches,
    matrix_shape,
    replace_output,
    to_matrix,
)
from svftool.checkpoints.dtypes import DECOMPOSABLE
from svftool.engine import Job, job_bytes, run_layers
from svftool.errors import CheckpointError, NumericalError, UsageError, shortlist
from svftool.factors import is_tuned
from svftool.files.output import scratch_folder
from svftool.numerics import ThreadPool
from svftool.numerics.rounding import coarser, precision_of, rounding_noise
from svftool.progress import SILENT, Progress
from svftool.version import __version__

_PART = 1 << 22
_STRANGER = 0.1
"""Cosine of two checkpoints below which one is no fine-tune of the other."""
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


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
    """

    rank: str = "64"
    layout: str = "peft"
    max_rank: int | None = None
    uniform_rank: bool = False
    dtype: str | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()


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


def extract_lora(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str],
    options: LoraOptions | None = None,
    dry_run: bool = False,
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
    if options.dtype is not None and options.dtype not in _DTYPES:
        raise UsageError(f"dtype {options.dtype!r}, expected one of {shortlist(_DTYPES)}")
    if is_tuned(tuned):
        raise UsageError(
            f"{tuned}: a tuned file, expected a dense fine-tune or an adapter. Turn it into an "
            "adapter with svftool convert"
        )
    with ExitStack() as stack:
        before = stack.enter_context(open_source(base))
        after = stack.enter_context(open_source(tuned))
        for warning in dict.fromkeys((*before.warnings, *after.warnings)):
            progress.warn(warning)
        pair = _Pair(before, counterparts(before, after, progress))
        wanted = _wanted(before.infos, options)
        survey = _survey(pair, progress)
        _refuse_another_base(before, after, survey)
        changed = [name for name in survey.squares if name in wanted]
        if not changed:
            raise CheckpointError(
                f"{after.path}: nothing differs from {before.path}"
                f"{' among the tensors asked for' if wanted < set(before.infos) else ''}, expected "
                "a fine-tune of it. Name another one."
            )
        model = BaseModel(before.infos, before.config or {}, str(base))
        work = _Work(
            pair, survey, rank, options, kind(model, changed), _dtype(options, after, changed)
        )
        work.check_some()
        if dry_run:
            return _plan(work, target)
        inputs = [Path(base), Path(tuned)]
        partial = stack.enter_context(replace_output(target, force=force, inputs=inputs))
        folder = stack.enter_context(scratch_folder(partial))
        return _write(work, partial, folder, target, progress)


@dataclass(frozen=True)
class _Pair:
    """A base and its fine-tune."""

    before: AuditSource
    side: Counterparts

    def change(self, name: str) -> Tensor:
        """Return ``W' - W``, in float64 where an adapter forms it, else in float32."""
        weight = self.before.read(name)
        found = self.side.read(name, weight)
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
        found = self.side.read(name, weight)
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
        found = self.side.read(name, weight)
        if found is None or found.weight is None:
            return 0.0
        dtype = precision_of(found.weight)
        if self.before.infos[name].dtype.is_floating_point:
            dtype = coarser(dtype, found.weight.dtype)
        return EDGE_MARGIN * rounding_noise(to_matrix(found.weight), dtype).edge


@dataclass
class _Survey:
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


def _survey(pair: _Pair, progress: Progress) -> _Survey:
    found, bad = _Survey(), []
    names = [name for name in pair.side.names if pair.side.holds(name)]
    with progress.task("comparing", len(names), unit="tensors") as task:
        for name in names:
            squares, sums, finite = _compare(pair, name)
            if not finite:
                bad.append(name)
            if squares:
                found.squares[name] = squares
            if len(pair.before.infos[name].shape) > 1:
                found.sums = [one + two for one, two in zip(found.sums, sums, strict=True)]
            task.advance(detail=name)
    if bad:
        raise NumericalError(
            f"{pair.side.source.path}: {shortlist(map(repr, bad), 4)}: NaN or infinity where the "
            "base has none, expected finite values. Name a fine-tune that did not diverge."
        )
    return found


def _compare(pair: _Pair, name: str) -> tuple[float, list[float], bool]:
    """Return the change's sum of squares, the products of both sides, and whether it is sound."""
    weight = pair.before.read(name)
    found = pair.side.read(name, weight)
    assert found is not None
    formed = found.whole_change
    other = formed if formed is not None else found.weight
    assert other is not None
    if other.dtype.is_complex or weight.dtype.is_complex:
        same = torch.equal(other, weight)
        return 0.0 if same else float((other - weight).abs().square().sum()), [0.0] * 3, True
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


def _refuse_another_base(before: AuditSource, after: AuditSource, survey: _Survey) -> None:
    inner, one, two = survey.sums
    if one > 0 and two > 0 and abs(inner) < _STRANGER * math.sqrt(one) * math.sqrt(two):
        raise CheckpointError(
            f"{after.path}: its matrices have a cosine of {inner / math.sqrt(one * two):.2f} with "
            f"those of {before.path}, expected a fine-tune of it. Name the base that it was tuned "
            "from."
        )


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
        return _DTYPES[options.dtype]
    sizes: Counter[torch.dtype] = Counter()
    for info in after.infos.values():
        if info.dtype in DECOMPOSABLE and len(info.shape) > 1:
            sizes[info.dtype] += info.numel
    most = max(sizes, key=lambda one: sizes[one], default=torch.float32)
    if most in _DTYPES.values():
        return most
    return torch.float32 if most == torch.float64 else torch.bfloat16


@dataclass(frozen=True)
class _Work:
    """What is to be done."""

    pair: _Pair
    survey: _Survey
    rank: AdapterRank
    options: LoraOptions
    writer: LayoutWriter
    dtype: torch.dtype

    @property
    def total(self) -> float:
        """Sum of squares of the whole change."""
        return sum(self.survey.squares.values())

    def named(self, kind: str) -> list[str]:
        """Return changed tensors of one fate, in the base's order."""
        return [n for n in self.pair.before.infos if self._kind(n) == kind]

    def _kind(self, name: str) -> str | None:
        fate = self.writer.fates.get(name)
        return None if fate is None else fate.kind

    def share(self, name: str) -> float:
        """Return a tensor's part of the whole change."""
        return self.survey.squares[name] / self.total if self.total > 0 else 0.0

    def matrix(self, name: str) -> tuple[int, int]:
        """Return the sides of a layer's matrix."""
        m, n = matrix_shape(self.pair.before.infos[name].shape)
        return m, n

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
        for one in side.tuned_only:
            size = held[one.name].nbytes if one.name in held else 0
            if one.name not in held and lora is not None:
                size = lora.bytes_of(one.name)
            found.append(LeftOut(one.name, one.reason, size))
        beside = side.source.passed_over.items()
        return found + [LeftOut(name, "not among the tensors", size) for name, size in beside]

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


def _plan(work: _Work, target: Path) -> LoraResult:
    """Say ranks and sizes; of rules that go by the spectrum, the most that they can ask for."""
    layers, size = [], 0
    for name in work.named("low rank"):
        m, n = work.matrix(name)
        rank = work.rank.limit(m, n)
        layers.append(AdaptedLayer(name, rank, math.nan, work.share(name)))
        size += (m + n) * rank * work.dtype.itemsize
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


def _write(
    work: _Work, partial: Path, folder: Path, target: Path, progress: Progress
) -> LoraResult:
    names = work.named("low rank")
    spool = Spool(folder)
    found = _truncated(work, names, spool, progress)
    rows, rest, dropped = [], 0.0, work.left_out()
    ranks: dict[str, int] = {}
    for name in names:
        one = found[name]
        if one.layer is None:
            nbytes = work.pair.before.infos[name].nbytes
            dropped.append(LeftOut(name, "no more than rounding", nbytes, work.share(name)))
            continue
        ranks[name] = one.layer.rank
        rest += one.rest**2
        row = AdaptedLayer(name, one.layer.rank, one.error, work.share(name), one.floored)
        rows.append(row)
    whole = tuple(work.named("whole"))
    if not ranks and not whole:
        raise CheckpointError(
            f"{work.pair.side.source.path}: its difference from {work.pair.before.path} is no more "
            "than the rounding of its dtype, expected a change. Name a fine-tune of this base."
        )
    rest += sum(work.survey.squares.get(one.name, 0.0) for one in dropped)
    if work.options.uniform_rank and ranks:
        most = max(ranks.values())
        ranks = dict.fromkeys(ranks, most)
        rows = [AdaptedLayer(r.name, most, r.error, r.share, r.floored) for r in rows]
    size = _assemble(work, ranks, partial, spool)
    _say(work, rows, dropped, progress)
    return LoraResult(
        output=target,
        layout=work.options.layout,
        dtype=dtype_name(work.dtype),
        dry_run=False,
        layers=tuple(rows),
        error=math.sqrt(rest / work.total) if work.total > 0 else 0.0,
        whole=whole,
        missing=work.missing(),
        dropped=tuple(dropped),
        bytes=size,
    )


def _truncated(
    work: _Work, names: Sequence[str], spool: Spool, progress: Progress
) -> dict[str, Truncated]:
    """Truncate layer by layer; the matrices go to the disk, and their shapes are kept."""
    floors: dict[str, float] = {}

    def read(name: str) -> Tensor:
        floors[name] = work.pair.floor(name)
        return to_matrix(work.pair.change(name))

    def do(job: Job, change: Tensor, pool: ThreadPool) -> Truncated:
        return truncate(
            job.name,
            change,
            work.rank,
            dtype=work.dtype,
            floor=floors[job.name],
            pool=pool,
        )

    def size(job: Job) -> int:
        kept = work.rank.limit(*job.matrix) if work.rank.kind == "count" else None
        # The two weights are there while their difference is formed.
        return job_bytes(job, kept) + 2 * work.pair.before.infos[job.name].nbytes

    jobs = [Job(name, work.matrix(name), torch.float32) for name in names]
    found = {}
    for name, one in run_layers(jobs, read, do, size=size, title="truncating", progress=progress):
        if one.layer is not None:
            one = Truncated(spool.keep(one.layer), one.total, one.rest, one.floored)
        found[name] = one
    return found


def _assemble(work: _Work, ranks: Mapping[str, int], partial: Path, spool: Spool) -> int:
    """Write the adapter from what lies on the disk; return the bytes of its tensors."""
    writer = work.writer

    def thin() -> Iterator[Entries]:
        for name in ranks:
            yield writer.entries(spool.load(name).padded(ranks[name]))

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
    floored = [row.name for row in rows if row.floored]
    if floored:
        progress.note(
            f"{len(floored)} of {len(rows)} layers: the rank ends where rounding of the fine-tune "
            f"begins ({shortlist(floored, 2)})"
        )
    if dropped:
        listed = shortlist((f"{one.name} ({_reason(one)})" for one in dropped), 4)
        progress.warn(f"{work.pair.side.source.path.name}: left out: {listed}")


def _reason(one: LeftOut) -> str:
    return one.reason if one.share is None else f"{one.reason}, {one.share:.2%} of the change"
