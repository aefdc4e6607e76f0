"""Base and fine-tunes -> what changed, layer by layer."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from svftool.auditing import (
    AuditResult,
    AuditSource,
    BaseMatrix,
    Comparison,
    Counterparts,
    Curves,
    Found,
    Measured,
    Metric,
    Row,
    ScreenedBase,
    Tuned,
    Unread,
    as_in_base,
    audit_budget,
    audit_bytes,
    choose_metrics,
    compare_spectra,
    compare_tuned,
    compare_vectors,
    compared_seconds,
    counterparts,
    judged,
    judged_codes,
    judged_row,
    open_source,
    screen_budget,
    screen_bytes,
    screened_seconds,
    trajectory_of,
)
from svftool.auditing.across import directions_of
from svftool.auditing.directions import leading_directions
from svftool.auditing.evidence import Quantised
from svftool.auditing.unembedding import Unembedding, unembedding_of
from svftool.auditing.verdicts import STILL, broken_verdict, judge
from svftool.auditing.ways import asked_for, is_number, way_to_change, way_to_compare
from svftool.checkpoints import (
    Selection,
    TensorInfo,
    View,
    dtype_name,
    matrix_shape,
    select,
)
from svftool.checkpoints.dtypes import FLOAT8
from svftool.engine import Job, run_layers, share
from svftool.errors import CheckpointError, FactorsError, UsageError, counted
from svftool.files.vocabulary import read_vocabulary
from svftool.machine import pick_device
from svftool.numerics import ThreadPool
from svftool.processes import joined_processes
from svftool.progress import SILENT, Progress

EVERYTHING = ("*",)
"""Embeddings and heads are looked at too, though `decompose` leaves them whole by default."""


def audit(
    base: str | os.PathLike[str],
    tuned: Sequence[str | os.PathLike[str]] = (),
    *,
    metrics: Sequence[str] | None = None,
    fast: bool = False,
    screen: bool = False,
    directions: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    device: str = "auto",
    progress: Progress = SILENT,
) -> AuditResult:
    """Say what fine-tunes changed.

    Parameters
    ----------
    base : path-like
        A dense checkpoint or a factor checkpoint; a tuned file may stand alone.
    tuned : sequence of path-like
        Dense checkpoints, factor checkpoints, tuned files, PEFT LoRA folders. Several of one base
        give a trajectory, in the order given. Without any, the base's spectra are summarised.
    metrics : sequence of str, optional
        Metrics beside the default ones; ``["all"]`` for every one.
    fast : bool
        Values only: no singular vectors, so no shares and no intruders.
    screen : bool
        Nothing of the base is decomposed: verdicts where they can be proven without, at the speed
        of reading.
    directions : int, optional
        Leading output and input directions of each change to find, and to hold against each other.
    include, exclude : sequence of str
        Globs of the base's tensor names; everything by default.
    device : str
        ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:i"``.
    progress : Progress
        Told how far the work is.

    Returns
    -------
    AuditResult

    Raises
    ------
    CheckpointError, FactorsError
        If an input cannot be read, has nothing in common with the base, or belongs to another one.
    UsageError
        For a metric that does not exist or is not measured, or a glob that matches nothing.
    """
    start = time.perf_counter()
    place, chosen = pick_device(device), choose_metrics(metrics, fast=fast, screen=screen)
    with ExitStack() as stack:
        source = stack.enter_context(open_source(base))
        others = [stack.enter_context(open_source(path)) for path in tuned]
        missed = {warning for one in (source, *others) for warning in one.warnings}
        for note in dict.fromkeys(note for one in (source, *others) for note in one.notes):
            (progress.warn if note in missed else progress.note)(note)
        if source.kind == "lora":
            raise CheckpointError(
                f"{source.path}: an adapter, expected a checkpoint. Name its base first: "
                f"svftool inspect BASE {source.path}"
            )
        _refuse_alone(source, others, screen=screen, directions=directions)
        layers = _layers(source, include, exclude)
        auditor = _Auditor(source, layers, chosen, _Way(fast, screen, directions), place, progress)
        if source.tuned is not None:
            comparisons = tuple(auditor.tuned_pair(one) for one in others or [source])
        else:
            comparisons = auditor.compare(others)
    if screen:
        comparisons = tuple(replace(one, screened=True) for one in comparisons)
    names = tuple(metric.name for metric in chosen)
    return AuditResult(comparisons, names, trajectory_of(comparisons), time.perf_counter() - start)


def _refuse_alone(
    source: AuditSource, others: Sequence[AuditSource], *, screen: bool, directions: int | None
) -> None:
    """Refuse what needs two sides where there is one."""
    if screen and not others and source.tuned is None:
        raise UsageError(
            f"--screen: only {source.path} is given, expected a base and what became of it. "
            "Name a fine-tune, or leave out --screen."
        )
    if directions is not None and (source.tuned is not None or not others):
        held = "a tuned file, which holds" if source.tuned is not None else "a base alone, without"
        what = "singular values alone" if source.tuned is not None else "a change"
        raise UsageError(
            f"--directions: {source.path} is {held} {what}, expected a base checkpoint and what "
            "became of it. Name both, or leave out --directions."
        )


@dataclass(frozen=True)
class _Layers:
    """What is done with each tensor of the base."""

    views: Mapping[str, View]
    left: Mapping[str, str]
    selection: Selection = field(default_factory=Selection)

    def matrix(self, info: TensorInfo) -> tuple[int, ...]:
        return matrix_shape(info.shape, self.views[info.name])


def _layers(base: AuditSource, include: Sequence[str], exclude: Sequence[str]) -> _Layers:
    if base.tuned is not None:
        return _Layers({}, {})
    selection = Selection(include=tuple(include) or EVERYTHING, exclude=tuple(exclude))
    choices, left = select(base.infos, selection, config=base.config)
    reasons = {one.name: one.reason for one in left}
    views = {}
    for one in choices:
        if base.infos[one.name].dtype in FLOAT8:
            reasons[one.name] = "float8 values of a quantised layer"
        else:
            views[one.name] = base.views.get(one.name, one.view)
    return _Layers(views, reasons, selection)


@dataclass(frozen=True)
class _Way:
    """How deep a comparison goes."""

    fast: bool = False
    screen: bool = False
    directions: int | None = None

    @property
    def vectors(self) -> bool:
        return not (self.fast or self.screen)


@dataclass(frozen=True)
class _Auditor:
    """Compares one opened base with all fine-tunes, a layer of all of them at a time."""

    base: AuditSource
    layers: _Layers
    metrics: tuple[Metric, ...]
    way: _Way
    device: torch.device
    progress: Progress

    def compare(self, others: Sequence[AuditSource]) -> tuple[Comparison, ...]:
        """Compare with each fine-tune, or summarise the base where there is none."""
        sides = [counterparts(self.base, other, self.progress) for other in others]
        found = self._matrices(sides)
        if not sides:
            return (self._alone({name: one[0] for name, one in found.items()}),)
        return tuple(
            self._comparison(side, {name: one[index] for name, one in found.items()})
            for index, side in enumerate(sides)
        )

    def tuned_pair(self, other: AuditSource) -> Comparison:
        """Compare two tuned files of one base, or one with the values that it started from."""
        first, second = self.base.tuned, other.tuned
        assert first is not None
        if second is None:
            raise FactorsError(
                f"{other.path}: not a tuned file, expected one to hold against {self.base.path}. "
                "Name the base checkpoint first."
            )
        return compare_tuned(first, second, self.metrics, self._whole_matrix)

    def _whole_matrix(self, base: Tensor, tuned: Tensor) -> Found:
        with ThreadPool(0) as pool:
            return self._base(base, None, pool).against(Tuned(weight=tuned))

    def _base(
        self, weight: Tensor, quantised: Quantised | None, pool: ThreadPool
    ) -> BaseMatrix | ScreenedBase:
        if self.way.screen:
            return ScreenedBase(weight, self.metrics, quantised=quantised)
        vectors = self.way.vectors
        return BaseMatrix(weight, self.metrics, vectors=vectors, pool=pool, quantised=quantised)

    def _matrices(self, sides: Sequence[Counterparts]) -> dict[str, list[Found | None]]:
        """Work on every matrix that any fine-tune says something of, each process its part."""
        infos = [self.base.infos[name] for name in self.layers.views]
        jobs = [
            Job(info.name, self.layers.matrix(info), info.dtype)
            for info in infos
            if not sides or any(self._way(info.name, side) == "matrix" for side in sides)
        ]

        def work(job: Job, weight: Tensor, pool: ThreadPool) -> list[Found | None]:
            if not sides:
                return [self._spectrum(job, weight, pool)]
            base = self._base(weight, self._quantised(job, weight.device), pool)
            return [
                self._held(job, base, weight, side, pool)
                if self._way(job.name, side) == "matrix"
                else None
                for side in sides
            ]

        adapters = any(side.changes for side in sides)
        size: Callable[[Job], int]
        lead = self.way.directions is not None
        if self.way.screen:
            size, memory = partial(screen_bytes, adapters=adapters, lead=lead), screen_budget
        else:
            size, memory = (
                partial(
                    audit_bytes,
                    compared=bool(sides),
                    vectors=self.way.vectors,
                    adapters=adapters,
                    lead=lead,
                ),
                audit_budget,
            )
            if sides and self.way.vectors:
                _say_estimates(jobs, self.progress)
        with joined_processes() as processes:
            mine = share(jobs, processes.count)[processes.rank]
            done = dict(
                run_layers(
                    mine,
                    self.base.read,
                    work,
                    size=size,
                    title="screening" if self.way.screen else "inspecting",
                    device=self.device,
                    memory=memory(jobs, size),
                    progress=self.progress,
                )
            )
            return {name: one for part in processes.gather(done) for name, one in part.items()}

    def _quantised(self, job: Job, device: torch.device) -> Quantised | None:
        found = self.base.quantised(job.name)
        return None if found is None else found.reshaped(job.matrix, device)

    def _spectrum(self, job: Job, weight: Tensor, pool: ThreadPool) -> Found:
        S = None if self.base.spectra is None else self.base.spectra(job.name)
        if S is None:
            return BaseMatrix(weight, self.metrics, vectors=False, pool=pool).alone()
        m, n = job.matrix[-2:]
        known = compare_spectra(S, S, sides=(m, n), metrics=self.metrics)
        curves = None if known.curves is None else Curves(known.curves.base)
        return Found(Measured(base=known.measured.base), None, curves)

    def _way(self, name: str, side: Counterparts) -> str:
        """Return how a tensor is compared, "" where the fine-tune does not speak of it."""
        if not side.holds(name):
            return ""
        info, matrix = self.base.infos[name], name in self.layers.views
        other = side.info(name)
        if other is None or name in side.changes:
            return way_to_change(info, matrix=matrix)
        return way_to_compare(info, other, matrix=matrix)

    def _held(
        self,
        job: Job,
        base: BaseMatrix | ScreenedBase,
        weight: Tensor,
        side: Counterparts,
        pool: ThreadPool,
    ) -> Found | None:
        spectra = side.spectra(job.name)
        if spectra is not None:
            m, n = job.matrix[-2:]
            spectra = (
                base.beside(*spectra)
                if isinstance(base, ScreenedBase)
                else _completed(*spectra, base, min(m, n))
            )
            return compare_spectra(*spectra, sides=(m, n), metrics=self.metrics)
        info = self.base.infos[job.name]
        found = side.read(job.name, weight.reshape(info.shape))
        if found is None:
            return None
        tuned = found.reshaped(job.matrix, weight.device)
        return self._led(base.against(tuned), weight, tuned, pool)

    def _led(self, found: Found, weight: Tensor, tuned: Tuned, pool: ThreadPool) -> Found:
        """Put in the leading directions of a change beyond rounding, where they are asked for."""
        count, known = self.way.directions, found.evidence
        if count is None or known is None or judge(known).name in STILL:
            return found
        return replace(found, leading=leading_directions(weight, tuned, count, known, pool))

    def _alone(self, found: Mapping[str, Found | None]) -> Comparison:
        rows = tuple(self._row(name, None, found[name]) for name in self.layers.views)
        broken = sum(row.verdict is not None for row in rows)
        return Comparison(
            base=self.base.path,
            tuned=None,
            kinds=(self.base.kind,),
            rows=rows,
            left_out=tuple(Unread(name, why) for name, why in self.layers.left.items()),
            verdict=broken_verdict(broken) if broken else None,
            totals=(len(self.base.infos), 0),
            notes=self.base.notes,
        )

    def _comparison(self, side: Counterparts, found: Mapping[str, Found | None]) -> Comparison:
        rows: list[Row] = []
        codes: list[Row] = []
        left_out: list[Unread] = []
        for name in side.names:
            why = asked_for(name, self.layers.selection)
            way = self._way(name, side)
            if why is not None:
                left_out.append(why)
            elif not way:
                rows.append(as_in_base(self._row(name, side, None), self.metrics))
            elif way in ("matrix", "values"):
                one = found.get(name) if way == "matrix" else self._values(name, side)
                rows.append(self._row(name, side, one))
            elif way == "bytes":
                codes.append(self._codes(name, side))
                left_out.append(Unread(name, f"{self.layers.left[name]}; compared by bytes"))
            else:
                left_out.append(Unread(name, way))
        whole = judged(
            Comparison(
                base=self.base.path,
                tuned=side.source.path,
                kinds=(self.base.kind, side.source.kind),
                rows=tuple(rows),
                unmatched_base=self._wanted(side.base_only),
                unmatched_tuned=self._wanted(side.tuned_only),
                left_out=tuple(left_out),
                codes=tuple(codes),
                totals=(len(self.base.infos), side.total),
                notes=(*self.base.notes, *side.source.notes, *side.notes),
            )
        )
        count = self.way.directions
        if count is None:
            return whole
        found_by = directions_of(whole, self.base.infos, count, self._unembedding)
        return replace(whole, directions=found_by)

    def _unembedding(self) -> Unembedding | None:
        """Read what turns directions into tokens, with their texts where these are there."""
        name = unembedding_of(self.base.infos)
        if name is None or not is_number(self.base.infos[name]):
            return None
        try:
            texts = read_vocabulary(self.base.path)
        except CheckpointError as error:
            self.progress.warn(f"tokens have no texts: {error}")
            texts = None
        weight = self.base.read(name)
        fits = texts is not None and len(texts) <= len(weight)
        return Unembedding(weight, texts if fits else None)

    def _wanted(self, items: Sequence[Unread]) -> tuple[Unread, ...]:
        """Mark those that the user's patterns leave out; they stay on the list."""
        left = self.layers.selection
        return tuple(replace(one, wanted=asked_for(one.name, left) is None) for one in items)

    def _codes(self, name: str, side: Counterparts) -> Row:
        tensors = self.base.read(name), side.source.read(side.others[name])
        return judged_codes(self._row(name, side, None), *tensors)

    def _values(self, name: str, side: Counterparts) -> Found | None:
        if not side.holds(name):
            return None
        base = self.base.read(name)
        found = side.read(name, base)
        return None if found is None else compare_vectors(base, found.weight, found.whole_change)

    def _row(self, name: str, side: Counterparts | None, found: Found | None) -> Row:
        info = self.base.infos[name]
        view = self.layers.views.get(name)
        other = None if side is None else side.info(name)
        renamed = None if side is None else side.others.get(name)
        row = Row(
            name,
            view=view,
            matrix=None if view is None else self.layers.matrix(info),
            shape=info.shape,
            dtype=tuple(
                one.storage or dtype_name(one.dtype) for one in (info, other) if one is not None
            ),
            tuned_name=None if renamed == name else renamed,
        )
        return judged_row(row, found)


_LONG = 300.0
"""Seconds from which a user is told what would take less."""


def _say_estimates(jobs: Sequence[Job], progress: Progress) -> None:
    """Say what quicker ways take, where this one takes long."""
    cores = max(1, torch.get_num_threads())
    full, fast, screen = (
        sum(one(job) for job in jobs) / cores
        for one in (compared_seconds, partial(compared_seconds, vectors=False), screened_seconds)
    )
    if full > _LONG:
        progress.note(
            f"comparing {counted(len(jobs), 'matrices')} takes about {_say_time(full)}; --screen "
            f"takes about {_say_time(screen)} (a verdict without singular values), --fast about "
            f"{_say_time(fast)} (without singular vectors)"
        )


def _say_time(seconds: float) -> str:
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2.0 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(1.0, seconds):.0f} s"


def _completed(S_base: Tensor, S: Tensor, base: BaseMatrix, rank: int) -> tuple[Tensor, Tensor]:
    """Append the singular values that truncated factors leave as they are in the base.

    Then a tuned file of truncated factors and its merged checkpoint have the same spectra.
    """
    kept = S.shape[-1]
    if kept >= rank or base.broken:
        return S_base, S
    rest = base.spectra()[..., kept:].reshape(*S.shape[:-1], rank - kept)
    before, after = (torch.cat((one.double(), rest), dim=-1) for one in (S_base, S))
    return before, after
