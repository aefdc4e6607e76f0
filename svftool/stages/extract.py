"""Base factors + a dense fine-tune -> the tuned file that approximates it best."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from svftool.adapters.low_rank import common_rank
from svftool.auditing import AuditSource, Counterparts, counterparts, open_source
from svftool.checkpoints import (
    TensorInfo,
    dtype_name,
    matrix_shape,
    replace_output,
    table_role,
    to_matrix,
)
from svftool.choices.regimes import Form, Matrices, Regime, check_sizes, parse_form
from svftool.engine import Job, run_values
from svftool.errors import CheckpointError, FactorsError, NumericalError, UsageError, shortlist
from svftool.factors import (
    FactorStore,
    LayerFactors,
    SpectralChange,
    check_names,
    is_factors,
    is_tuned,
    open_factors,
    write_tuned,
)
from svftool.factors.delta import norm
from svftool.files.output import scratch_folder
from svftool.numerics.rounding import round_once
from svftool.progress import SILENT, Progress
from svftool.stages.changes import BothSides
from svftool.stages.decompose import decompose, plan
from svftool.stages.fitting import fit

LITTLE = 0.5
"""Share of a change (as a norm) that singular values may miss before an adapter is proposed."""
ENERGY = 0.95
"""Share of the squares of the changes that a proposed rank keeps."""


_SLACK = 1.1
"""By how much the best may exceed its numbers: ranks and sides are whole numbers."""


@dataclass(frozen=True)
class LayerExtract:
    """One layer's approximation.

    Attributes
    ----------
    name : str
        Tensor name in the base.
    change : float
        ``||W' - W||_F / ||W||_F``.
    error : float
        ``||W' - W - D||_F / ||W' - W||_F`` for the change D of the form, ``U diag(S* - S) Vh`` of
        svf: the share of the change that it cannot make; 0 where nothing changed.
    """

    name: str
    change: float
    error: float


@dataclass(frozen=True)
class Dropped:
    """A part of a fine-tune that is left out: its name, why, and its bytes."""

    name: str
    reason: str
    bytes: int


@dataclass(frozen=True)
class Proposal:
    """The adapter that would hold what singular values do not.

    Attributes
    ----------
    rank : int
        The least, one for all layers, that keeps 95 % of the squares of what changed beyond
        rounding.
    error : float
        What it loses of the change of the layers, as a norm.
    """

    rank: int
    error: float


@dataclass(frozen=True)
class Candidate:
    """A form that was tried.

    Attributes
    ----------
    form : str
        Its name, as a regime.
    numbers : int
        How many numbers it has.
    error : float
        As `LayerExtract.error`, over all layers together.
    chosen : bool
        Whether it is the one that was written.
    """

    form: str
    numbers: int
    error: float
    chosen: bool


@dataclass(frozen=True)
class ExtractResult:
    """What `extract` did.

    Attributes
    ----------
    output : Path
        The tuned file.
    layers : tuple of LayerExtract
        In file order.
    error : float
        As `LayerExtract.error`, over all layers together.
    whole : tuple of str
        Tensors that are no layers, changed, and stored whole.
    missing : tuple of str
        Layers that the fine-tune does not have; they stay as the base.
    dropped : tuple of Dropped
        What the fine-tune holds and the tuned file does not.
    proposal : Proposal or None
        Where singular values miss more than half of the change, the adapter that holds it; None
        too where that would be as large as the layers themselves.
    form : str
        What the change was brought into: ``svf``, ``core:8`` ...
    numbers : int
        How many numbers that has in the layers.
    candidates : tuple of Candidate
        All forms that were tried, where the best was looked for.
    """

    output: Path
    layers: tuple[LayerExtract, ...]
    error: float
    whole: tuple[str, ...]
    missing: tuple[str, ...]
    dropped: tuple[Dropped, ...] = ()
    proposal: Proposal | None = None
    form: str = "svf"
    numbers: int = 0
    candidates: tuple[Candidate, ...] = ()

    @property
    def poor(self) -> bool:
        """Whether the form makes little of the change."""
        return self.error > LITTLE


def extract(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str],
    form: str = "svf",
    force: bool = False,
    progress: Progress = SILENT,
) -> ExtractResult:
    """Turn a dense fine-tune into a small tuned file.

    ``S* = diag(U' W' V)`` minimises ``||W' - U diag(S) Vh||_F`` over all singular values, because
    the pairs ``u_i vh_i`` are orthonormal.

    Parameters
    ----------
    base : path-like
        The base, decomposed for the purpose; or its factor checkpoint.
    tuned : path-like
        The dense fine-tune, or a PEFT LoRA folder.
    output : path-like
        The tuned file.
    form : str
        A regime of the singular basis, ``"svf+scale"`` or ``"core:8"`` say, or ``"best:4x"``: the
        one of them that comes nearest with at most four times svf's numbers.
    force : bool
        Replace an existing output.
    progress : Progress
        Told how far the work is.

    Returns
    -------
    ExtractResult

    Raises
    ------
    CheckpointError
        If the two have no layer in common.
    UsageError
        If the fine-tune is a tuned file already, the output exists, or there is no such form.
    NumericalError
        If the fine-tune holds NaN or infinity where the base does not.
    """
    target, wanted = Path(output), parse_form(form)
    if is_tuned(tuned):
        raise UsageError(
            f"{tuned}: a tuned file already, expected a dense fine-tune or a LoRA folder"
        )
    with ExitStack() as stack:
        after = stack.enter_context(open_source(tuned))
        for note in after.notes:
            if note not in after.warnings:
                progress.note(note)
        inputs = [Path(base), Path(tuned)]
        partial = stack.enter_context(replace_output(target, force=force, inputs=inputs))
        if is_factors(base):
            store = stack.enter_context(open_factors(base))
            before = stack.enter_context(_weights(base, store, progress))
            side = _checked(store.layers, before, after, progress)
        else:
            before = stack.enter_context(open_source(base))
            layers = [one.info.name for one in plan(base).layers]
            side = _checked(layers, before, after, progress)
            store = stack.enter_context(_factors(base, partial, progress))
        return _extract(store, before, side, wanted, partial, target, progress)


def _checked(
    layers: Collection[str], before: AuditSource, after: AuditSource, progress: Progress
) -> Counterparts:
    """Match the fine-tune to its base; refuse what cannot be stored before any decomposition."""
    for warning in dict.fromkeys((*before.warnings, *after.warnings)):
        progress.warn(warning)
    side = counterparts(before, after, progress)
    if not any(side.holds(name) for name in layers if name in side.names):
        raise CheckpointError(
            f"{after.path}: no layer in common with {before.path}, expected a fine-tune of it. "
            "Name the base that it was tuned from."
        )
    check_names(layers, {*before.infos, *after.infos}, where=str(before.path))
    if after.lora is None:
        _check_finite(before, side, progress)
    return side


def _check_finite(before: AuditSource, side: Counterparts, progress: Progress) -> None:
    own = {other: name for name, other in side.others.items()}
    bad = []
    with progress.task("checking", len(side.source.infos), unit="tensors") as task:
        for other, info in side.source.infos.items():
            if info.dtype.is_floating_point and info.layout == "dense":
                value = side.source.read(other)
                start = before.read(own[other]) if other in own else None
                if not bool(value.float().isfinite().all()) and not _is_sound(value, start, info):
                    bad.append(other)
            task.advance(detail=other)
    if bad:
        raise NumericalError(
            f"{side.source.path}: {shortlist(map(repr, bad), 4)}: NaN or infinity where the base "
            "has none, expected finite values. Name a fine-tune that did not diverge."
        )


def _is_sound(value: Tensor, start: Tensor | None, info: TensorInfo) -> bool:
    """Whether what is not finite was not finite in the base, or is a mask."""
    wide = value.double()
    if start is not None and start.shape == value.shape:
        before = start.double()
        same = (wide == before) | (wide.isnan() & before.isnan())
        return bool((wide.isfinite() | same).all())
    return table_role(info) == "attention mask" and not bool(wide.isnan().any())


@contextmanager
def _factors(
    base: str | os.PathLike[str], partial: Path, progress: Progress
) -> Iterator[FactorStore]:
    """Decompose the base beside the output: the system's folder may be in memory, or small."""
    with scratch_folder(partial) as folder:
        decompose(base, folder / "factors", progress=progress)
        with open_factors(folder / "factors") as store:
            yield store


def _weights(base: str | os.PathLike[str], store: FactorStore, progress: Progress) -> AuditSource:
    """Open the base's own weights; where they are gone, the factors make them up to rounding."""
    if not is_factors(base):
        return open_source(base)
    try:
        with store.open_base(progress=progress) as found:
            path = found.path
    except (FactorsError, CheckpointError) as error:
        progress.note(f"changes are measured from the factors, not from the base ({error})")
        return open_source(base)
    place = store.config.base
    return open_source(place.place if place.hub else path)


def _extract(
    store: FactorStore,
    before: AuditSource,
    side: Counterparts,
    form: Form,
    partial: Path,
    target: Path,
    progress: Progress,
) -> ExtractResult:
    names = set(side.names)
    found = [name for name in store.layers if name in names]
    matrices = [_matrix_of(store, name) for name in found]
    for regime in form.regimes if form.times is None else ():
        check_sizes(regime, matrices)
    tried = {regime.name: _Tried(regime, {}, {}) for regime in form.regimes}
    changed: dict[str, tuple[float, float]] = {}
    with progress.task("extracting", len(store.layers), unit="layers") as task:
        for name in found:
            change = to_matrix(_change(before, side, name), store.layers[name].view)
            factors = store.read(name)
            changed[name] = norm(change), norm(factors.S.double())
            for one in tried.values():
                one.take(name, factors, change)
            task.advance(detail=name)
    total = math.hypot(*(size for size, _ in changed.values()))
    chosen, candidates = _chosen(form, list(tried.values()), matrices, total)
    error = chosen.error(total)
    proposal = _proposal(store, before, side, progress) if error > LITTLE else None
    whole = _changed_whole(store, before, side)
    S = {name: store.read_S(name).double() + chosen.changes[name].delta for name in found}
    parts = {name: chosen.changes[name].parts() for name in found}
    write_tuned(partial, store=store, S=S, parts=parts, whole=whole, task="extract")
    return ExtractResult(
        output=target,
        layers=tuple(
            LayerExtract(
                name,
                change=size / base if base > 0 else 0.0,
                error=chosen.rests[name] / size if size > 0 else 0.0,
            )
            for name, (size, base) in changed.items()
        ),
        error=error,
        whole=tuple(whole),
        missing=tuple(name for name in store.layers if name not in S),
        dropped=_dropped(side, progress),
        proposal=proposal,
        form=chosen.regime.name,
        numbers=chosen.numbers(matrices),
        candidates=candidates,
    )


def _matrix_of(store: FactorStore, name: str) -> tuple[int, int, int, int]:
    layer = store.layers[name]
    m, n = layer.matrix[-2:]
    return math.prod(layer.matrix[:-2]), m, n, layer.rank


@dataclass(frozen=True)
class _Tried:
    """A regime, the changes it makes of each layer, and what they miss."""

    regime: Regime
    changes: dict[str, SpectralChange]
    rests: dict[str, float]

    def take(self, name: str, factors: LayerFactors, change: Tensor) -> None:
        assert self.regime.spectral is not None
        found = fit(self.regime.spectral, factors, change)
        S = factors.S.double() + found.change.delta
        sound = all(bool(one.float().isfinite().all()) for one in (S, *found.change.tensors()))
        if not bool(change.isfinite().all()) or not sound:
            raise NumericalError(
                f"{name!r}: its change is not finite, or beyond float32, expected finite singular "
                "values. Name a fine-tune that did not diverge."
            )
        self.changes[name], self.rests[name] = found.change, found.rest

    def error(self, total: float) -> float:
        return math.hypot(*self.rests.values()) / total if total > 0 else 0.0

    def numbers(self, matrices: Matrices) -> int:
        assert self.regime.spectral is not None
        return sum(e * self.regime.spectral.of(m, n, k).count for e, m, n, k in matrices)


def _chosen(
    form: Form, tried: list[_Tried], matrices: Matrices, total: float
) -> tuple[_Tried, tuple[Candidate, ...]]:
    """Return the form that comes nearest, of those that are small enough, and all that were."""
    if form.times is None:
        return tried[0], ()
    most = _SLACK * form.times * sum(count * k for count, _, _, k in matrices)
    small = [one for one in tried if one.numbers(matrices) <= most]
    best = min(small, key=lambda one: (one.error(total), one.numbers(matrices)))
    return best, tuple(
        Candidate(one.regime.name, one.numbers(matrices), one.error(total), one is best)
        for one in small
    )


def _proposal(
    store: FactorStore, before: AuditSource, side: Counterparts, progress: Progress
) -> Proposal | None:
    """Find the rank of an adapter for what singular values cannot make; one that is small."""
    pair = BothSides(before, side)
    jobs = [
        Job(name, matrix_shape(layer.shape))
        for name, layer in store.layers.items()
        if side.holds(name) and layer.view == "matrix"
    ]
    spectra, floors, total = {}, {}, 0.0

    def read(name: str) -> Tensor:
        floors[name] = pair.floor(name)
        return to_matrix(pair.change(name))

    for name, S in run_values(jobs, read, progress=progress):
        total += float(S.square().sum())
        spectra[name] = torch.where(floors[name] < S, S, 0.0)
    rank, kept = common_rank(list(spectra.values()), ENERGY)
    dense = sum(math.prod(job.matrix) for job in jobs)
    thin = sum(sum(job.matrix) * min(rank, min(job.matrix)) for job in jobs)
    if not rank or thin >= dense:
        return None
    return Proposal(rank, math.sqrt(max(0.0, 1.0 - kept / total)))


def _dropped(side: Counterparts, progress: Progress) -> tuple[Dropped, ...]:
    """Return what a fine-tune holds that the tuned file does not; parts of adapters are said aloud.

    Entries of a pickle were warned of when it was opened.
    """
    lora = side.source.lora
    if lora is None:
        beside = side.source.passed_over.items()
        return tuple(Dropped(name, "not among the tensors", size) for name, size in beside)
    found = tuple(
        Dropped(one.name, one.reason, lora.bytes_of(one.name))
        for one in side.tuned_only
        if one.name not in side.source.infos
    )
    if found:
        listed = shortlist((f"{one.name} ({one.reason}, {one.bytes:,} bytes)" for one in found), 4)
        progress.warn(f"{side.source.path.name}: left out: {listed}")
    return found


def _change(before: AuditSource, side: Counterparts, name: str) -> Tensor:
    weight = before.read(name)
    found = side.read(name, weight)
    if found is None:
        return torch.zeros(weight.shape, dtype=torch.float64)
    change = found.whole_change
    if change is not None:
        return change
    assert found.weight is not None
    return torch.sub(found.weight.double(), weight.double())


def _changed_whole(
    store: FactorStore, before: AuditSource, side: Counterparts
) -> dict[str, Tensor]:
    """Take along what changed and is no layer, what has another shape, and what is new."""
    whole = {name: side.source.read(other) for name, other in side.misshapen.items()}
    for name in side.names:
        if name in store.layers or not side.holds(name):
            continue
        weight = before.read(name)
        found = side.read(name, weight)
        assert found is not None
        value = found.weight
        if value is None:
            change = found.whole_change
            assert change is not None
            value = round_once(weight.double() + change, weight.dtype)
            if not _is_sound(value, weight, before.infos[name]):
                raise NumericalError(
                    f"{side.source.path}: {name!r}: NaN, infinity or an overflow of "
                    f"{dtype_name(weight.dtype)}, expected finite values. Name a fine-tune that "
                    "did not diverge."
                )
        if not torch.equal(value, weight):
            whole[name] = value
    added = {one.name for one in side.tuned_only} & set(side.source.infos)
    added -= set(side.misshapen.values())
    return whole | {name: side.source.read(name) for name in sorted(added)}
