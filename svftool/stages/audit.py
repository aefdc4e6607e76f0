"""Base and fine-tunes -> what changed, layer by layer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from svftool.auditing import (
    LayerDrift,
    Source,
    drift_of_factors,
    drift_of_tuned,
    layer_verdict,
    match_names,
    open_source,
    overall_verdict,
    single_spectrum,
)
from svftool.auditing.drift import drift_of_vectors
from svftool.auditing.matching import Matching
from svftool.auditing.verdicts import BROKEN
from svftool.checkpoints import (
    Choice,
    Selection,
    TensorInfo,
    View,
    matrix_shape,
    select,
    to_matrix,
)
from svftool.engine import Job, run_svds, run_values
from svftool.errors import CheckpointError, FactorsError, NumericalError, shortlist
from svftool.factors import TunedFile, is_tuned, read_tuned
from svftool.numerics import Svd
from svftool.progress import SILENT, Progress

_BASE, _TUNED = "\0base", "\0tuned"
_COMPARED_AS_VALUES = frozenset(
    {"fewer than two dimensions", "one side of the matrix is 1", "not floating point"}
)

EVERYTHING = Selection(include=("*",))
"""Embeddings and heads are looked at too, though `decompose` leaves them whole by default."""


@dataclass(frozen=True)
class Unread:
    """A tensor that is in no comparison, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Comparison:
    """A base and one fine-tune, or a base alone.

    Attributes
    ----------
    base : Path
        The base.
    tuned : Path or None
        The fine-tune.
    layers : tuple of LayerDrift
        One row a matched tensor, in the base's order.
    unmatched_base, unmatched_tuned : tuple of Unread
        Every other tensor of both sides, with the reason.
    verdict : str
        For the whole.
    notes : tuple of str
        What was found and dropped on the way.
    """

    base: Path
    tuned: Path | None
    layers: tuple[LayerDrift, ...]
    unmatched_base: tuple[Unread, ...] = ()
    unmatched_tuned: tuple[Unread, ...] = ()
    verdict: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class AuditResult:
    """All comparisons of one call, in the order of the fine-tunes."""

    comparisons: tuple[Comparison, ...]


def audit(
    base: str | os.PathLike[str],
    tuned: Sequence[str | os.PathLike[str]] = (),
    *,
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
        Dense checkpoints, factor checkpoints and tuned files. Without any, the base's spectra are
        summarised.
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
    """
    if not tuned and is_tuned(base):
        return AuditResult((_of_tuned_file(Path(base), read_tuned(base)),))
    selection = Selection(include=tuple(include) or EVERYTHING.include, exclude=tuple(exclude))
    with open_source(base) as source:
        for note in source.notes:
            progress.note(note)
        auditor = _Auditor(source, selection, device, progress)
        if not tuned:
            return AuditResult((auditor.alone(),))
        return AuditResult(tuple(auditor.compare(path) for path in tuned))


def _of_tuned_file(base: Path, tuned: TunedFile) -> Comparison:
    rows = [_judged(drift_of_tuned(name, tuned)) for name in tuned.S]
    whole = tuple(Unread(name, "trained whole; its base is not here") for name in tuned.whole)
    return Comparison(
        base=base,
        tuned=tuned.path,
        layers=tuple(rows),
        unmatched_tuned=whole,
        verdict=overall_verdict(rows),
    )


def _collect(broken: dict[str, str]) -> Callable[[str, NumericalError], None]:
    return lambda name, error: broken.update({name: str(error)})


def _split(job: str) -> tuple[str, str]:
    name, _, side = job.rpartition("\0")
    return name, f"\0{side}"


def _judged(row: LayerDrift) -> LayerDrift:
    return replace(row, verdict=row.verdict or layer_verdict(row))


@dataclass
class _Auditor:
    """Compares one opened base with one fine-tune after another."""

    base: Source
    selection: Selection
    device: str
    progress: Progress

    def alone(self) -> Comparison:
        choices, left = select(self.base.infos, self.selection, config=self.base.config)
        matrices = {one.name: self._matrix(one, self.base.infos[one.name]) for one in choices}
        views = {one.name: self._view(one) for one in choices}
        broken: dict[str, str] = {}
        jobs = [Job(name, matrix, self.base.infos[name].dtype) for name, matrix in matrices.items()]
        found = {
            name: single_spectrum(name, views[name], matrices[name], S)
            for name, S in run_values(
                jobs,
                self.base.read,
                device=self.device,
                skip=_collect(broken),
                progress=self.progress,
            )
        }
        for name in broken:
            found[name] = LayerDrift(name, views[name], matrices[name], verdict=BROKEN)
        rows = tuple(found[one.name] for one in choices)
        rest = tuple(Unread(one.name, one.reason) for one in left)
        return Comparison(
            self.base.path,
            None,
            rows,
            unmatched_base=rest,
            verdict=BROKEN if broken else "",
            notes=self.base.notes,
        )

    def compare(self, path: str | os.PathLike[str]) -> Comparison:
        if is_tuned(path):
            return self._compare_tuned(read_tuned(path))
        with open_source(path) as tuned:
            matching = match_names(self.base.infos, tuned.infos)
            notes = (*self.base.notes, *tuned.notes, *matching.notes)
            for note in (*tuned.notes, *matching.notes):
                self.progress.note(note)
            if not matching.pairs:
                raise CheckpointError(
                    f"{tuned.path}: no tensor in common with {self.base.path}, expected a "
                    f"fine-tune of it (base has {shortlist(matching.base_only, 2)}; this has "
                    f"{shortlist(matching.tuned_only, 2)})."
                )
            rows, unread = self._rows(matching, tuned)
        misshapen = {
            pair.base: f"shape {self.base.infos[pair.base].shape}, "
            f"tuned {tuned.infos[pair.tuned].shape}"
            for pair in matching.misshapen
        }
        return Comparison(
            base=self.base.path,
            tuned=tuned.path,
            layers=rows,
            unmatched_base=(
                *(Unread(name, "not in the fine-tune") for name in matching.base_only),
                *(Unread(name, reason) for name, reason in misshapen.items()),
                *unread,
            ),
            unmatched_tuned=tuple(Unread(name, "not in the base") for name in matching.tuned_only),
            verdict=overall_verdict(rows),
            notes=notes,
        )

    def _compare_tuned(self, tuned: TunedFile) -> Comparison:
        if self._fingerprint() != tuned.base_fingerprint:
            raise FactorsError(
                f"{tuned.path}: was trained on the base {tuned.base_fingerprint[:12]}, expected "
                f"{self._fingerprint()[:12]}, that of {self.base.path}. "
                "Inspect it with its own base."
            )
        rows = [drift_of_tuned(name, tuned) for name in tuned.S]
        for name, value in tuned.whole.items():
            info = self.base.infos.get(name)
            if info is not None and info.shape == tuple(value.shape):
                rows.append(drift_of_vectors(name, self.base.read(name), value))
        judged = {row.name: _judged(row) for row in rows}
        added = tuple(Unread(name, "new") for name in tuned.whole if name not in judged)
        rest = [name for name in self.base.infos if name not in judged]
        return Comparison(
            base=self.base.path,
            tuned=tuned.path,
            layers=tuple(judged[name] for name in self.base.infos if name in judged),
            unmatched_base=tuple(Unread(name, "not trained") for name in rest),
            unmatched_tuned=added,
            verdict=overall_verdict(list(judged.values())),
            notes=self.base.notes,
        )

    def _fingerprint(self) -> str:
        return self.base.fingerprint(self.progress)

    def _rows(
        self, matching: Matching, tuned: Source
    ) -> tuple[tuple[LayerDrift, ...], tuple[Unread, ...]]:
        """Compare matched pairs: matrices by their decompositions, the rest by their values."""
        counterpart = {pair.base: pair.tuned for pair in matching.pairs}
        infos = {name: self.base.infos[name] for name in counterpart}
        choices, left = select(infos, self.selection, config=self.base.config)
        rows = {row.name: row for row in self._matrices(choices, counterpart, tuned)}
        unread = []
        for one in left:
            if one.reason in _COMPARED_AS_VALUES:
                read = self.base.read(one.name), tuned.read(counterpart[one.name])
                rows[one.name] = _judged(drift_of_vectors(one.name, *read))
            else:
                unread.append(Unread(one.name, one.reason))
        return tuple(rows[name] for name in counterpart if name in rows), tuple(unread)

    def _matrices(
        self, choices: Sequence[Choice], counterpart: Mapping[str, str], tuned: Source
    ) -> Iterator[LayerDrift]:
        views = {one.name: self._view(one) for one in choices}
        broken: dict[str, str] = {}
        jobs = []
        for one in choices:
            matrix = self._matrix(one, self.base.infos[one.name])
            jobs.append(Job(f"{one.name}{_BASE}", matrix, self.base.infos[one.name].dtype))
            info = tuned.infos[counterpart[one.name]]
            jobs.append(Job(f"{one.name}{_TUNED}", matrix, info.dtype))

        def read(job: str) -> Tensor:
            name, side = _split(job)
            return self.base.read(name) if side == _BASE else tuned.read(counterpart[name])

        waiting: dict[str, Svd] = {}
        for job, svd in run_svds(
            jobs, read, device=self.device, skip=_collect(broken), progress=self.progress
        ):
            name, side = _split(job)
            twin = name + (_TUNED if side == _BASE else _BASE)
            if twin in broken:
                continue
            if twin not in waiting:
                waiting[job] = svd
                continue
            found = {job: svd, twin: waiting.pop(twin)}
            view = views[name]
            before, after = (to_matrix(read(name + one), view) for one in (_BASE, _TUNED))
            drift = drift_of_factors(
                name, view, before, after, found[name + _BASE], found[name + _TUNED]
            )
            yield _judged(drift)
        for name in dict.fromkeys(_split(job)[0] for job in broken):
            yield LayerDrift(name, views[name], None, verdict=BROKEN)

    def _view(self, choice: Choice) -> View:
        return self.base.views.get(choice.name, choice.view)

    def _matrix(self, choice: Choice, info: TensorInfo) -> tuple[int, ...]:
        return matrix_shape(info.shape, self._view(choice))
