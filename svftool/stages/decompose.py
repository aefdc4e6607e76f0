"""Checkpoint -> factor checkpoint: the singular value decomposition of every selected layer.

The work has three passes. *Examining* reads every tensor once: its digest for the fingerprint, and
whether selected weights are finite. *Planning* fixes ranks and the layout of the output. *Running*
decomposes the layers, longest first, and writes each where it belongs as soon as it is done.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch

from svftool.checkpoints import (
    Checkpoint,
    Choice,
    Fingerprint,
    Selection,
    TensorInfo,
    dtype_name,
    matrix_shape,
    open_checkpoint,
    parse_size,
    replace_output,
    select,
    side_files,
)
from svftool.engine import Job, RankRule, parse_rank, run_svds, run_values
from svftool.errors import NumericalError, UsageError, shortlist
from svftool.factors import (
    BaseRecord,
    FactorConfig,
    FactorWriter,
    LayerFactors,
    LayerLayout,
    LayerRecord,
    write_config,
)
from svftool.numerics import Svd, reconstruct
from svftool.progress import SILENT, Progress
from svftool.stages.examine import Examination, examine
from svftool.stages.usage import peak_memory_bytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
METHODS = ("auto", "exact", "randomized")
IMPORTED_BYTES = 400 << 20


class DecomposeOptions(TypedDict, total=False):
    """Options of `decompose` and `plan`; each may be left out."""

    rank: str
    method: str
    include: Sequence[str]
    exclude: Sequence[str]
    views: Sequence[str]
    dtype: str
    max_shard_size: str
    layers_only: bool
    skip_bad: bool
    device: str


@dataclass(frozen=True)
class LayerPlan:
    """One layer to decompose: what it is and how large its factors will be.

    Attributes
    ----------
    info : TensorInfo
        The tensor.
    choice : Choice
        Its name and view.
    matrix : tuple of int
        ``(m, n)`` or ``(E, m, n)``.
    rank : int or None
        Singular values kept; None before the spectrum is known (energy rule, dry run).
    """

    info: TensorInfo
    choice: Choice
    matrix: tuple[int, ...]
    rank: int | None

    @property
    def factor_bytes(self) -> int:
        """Bytes of the factors in float32 (at full rank where the rank is open)."""
        *batch, m, n = self.matrix
        rank = min(m, n) if self.rank is None else self.rank
        return 4 * (batch[0] if batch else 1) * rank * (m + n + 1)


@dataclass(frozen=True)
class Plan:
    """What `decompose` would do.

    Attributes
    ----------
    checkpoint : Path
        What would be decomposed.
    layers : tuple of LayerPlan
        In file order.
    left_whole : mapping of str to str
        Every other tensor with the reason.
    output_bytes : int
        Bytes to be written (an upper bound where the spectrum decides the rank).
    peak_memory_bytes : int
        Estimate of the largest anonymous memory.
    """

    checkpoint: Path
    layers: tuple[LayerPlan, ...]
    left_whole: Mapping[str, str]
    output_bytes: int
    peak_memory_bytes: int


@dataclass(frozen=True)
class DecomposeResult:
    """What `decompose` did.

    Attributes
    ----------
    output : Path
        The factor checkpoint.
    config : FactorConfig
        As written to ``svf_config.json``.
    layer_seconds : mapping of str to float
        Time that each decomposition took.
    seconds : float
        Wall time in all.
    peak_memory_bytes : int
        Largest resident memory, mapped files included.
    """

    output: Path
    config: FactorConfig
    layer_seconds: Mapping[str, float]
    seconds: float
    peak_memory_bytes: int


def plan(
    checkpoint: str | os.PathLike[str],
    *,
    progress: Progress = SILENT,
    **options: Unpack[DecomposeOptions],
) -> Plan:
    """Say what `decompose` would do; reads no tensor.

    Parameters are those of `decompose`.
    """
    settings = _Settings.parse(options)
    with open_checkpoint(checkpoint) as source:
        return _plan(source, settings)


def decompose(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    resume: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
    **options: Unpack[DecomposeOptions],
) -> DecomposeResult:
    """Decompose the layers of a checkpoint into a factor checkpoint.

    Parameters
    ----------
    checkpoint : path-like or str
        A file, a folder (with or without an index) or a hub id.
    output : path-like
        Folder to write.
    resume : bool
        Continue where an interrupted run of the same options on the same checkpoint stopped.
    force : bool
        Replace an existing output once the new one is complete.
    progress : Progress
        Told how far the work is.
    rank : str
        ``"full"``, a count, a fraction of the short side (``"0.25"``), or ``"energy:0.99"``: the
        smallest rank that keeps this share of the sum of squares.
    method : {"auto", "exact", "randomized"}
        ``auto`` takes the fastest way that passes its checks.
    include, exclude : sequence of str
        Globs of tensor names.
    views : sequence of str
        ``"GLOB=batch"`` for 3-D tensors that are a batch of matrices.
    dtype : {"float32", "bfloat16", "float16"}
        Storage of ``U`` and ``Vh``; ``S`` is always float32.
    max_shard_size : str
        Where a new shard begins, such as ``"5GB"``.
    layers_only : bool
        Leave out the tensors that are not decomposed.
    skip_bad : bool
        Leave layers with NaN or infinity whole instead of stopping.
    device : str
        ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:i"``.

    Returns
    -------
    DecomposeResult

    Raises
    ------
    CheckpointError
        If the checkpoint cannot be read.
    NumericalError
        If selected weights hold NaN or infinity; all of them are named.
    UsageError
        If options contradict each other or the output exists.
    """
    started = time.perf_counter()
    settings = _Settings.parse(options)
    target = Path(output)
    with open_checkpoint(checkpoint) as source:
        for note in source.notes:
            progress.note(note)
        inputs = [source.path]
        with replace_output(target, force=force, inputs=inputs, keep_partial=resume) as partial:
            run = _Run(source, settings, partial, target, progress)
            config = run.execute()
    return DecomposeResult(
        output=target,
        config=config,
        layer_seconds=run.seconds,
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(),
    )


@dataclass(frozen=True)
class _Settings:
    """Options, parsed and checked."""

    rank: RankRule
    method: Any
    selection: Selection
    dtype: str
    max_shard_bytes: int
    layers_only: bool
    skip_bad: bool
    device: str

    @classmethod
    def parse(cls, options: DecomposeOptions) -> _Settings:
        method, dtype = options.get("method", "auto"), options.get("dtype", "float32")
        _check_choice("--method", method, METHODS)
        _check_choice("--dtype", dtype, tuple(DTYPES))
        return cls(
            rank=parse_rank(options.get("rank", "full")),
            method=method,
            selection=Selection(
                include=tuple(options.get("include", ())),
                exclude=tuple(options.get("exclude", ())),
                views=tuple(map(_parse_view, options.get("views", ()))),
            ),
            dtype=dtype,
            max_shard_bytes=parse_size(options.get("max_shard_size", "5GB")),
            layers_only=options.get("layers_only", False),
            skip_bad=options.get("skip_bad", False),
            device=options.get("device", "auto"),
        )


def _check_choice(option: str, found: str, allowed: Sequence[str]) -> None:
    if found not in allowed:
        raise UsageError(f"{option}: {found!r}, expected one of {', '.join(allowed)}")


def _parse_view(text: str) -> tuple[str, Any]:
    glob, separator, view = text.rpartition("=")
    if not separator or view not in ("batch", "matrix"):
        raise UsageError(f"--view: {text!r}, expected GLOB=batch or GLOB=matrix")
    return glob, view


def _plan(source: Checkpoint, settings: _Settings) -> Plan:
    chosen, left = select(source.infos, settings.selection, config=source.config)
    layers = []
    for choice in chosen:
        info = source.infos[choice.name]
        matrix = matrix_shape(info.shape, choice.view)
        layers.append(LayerPlan(info, choice, matrix, settings.rank.fixed(*matrix[-2:])))
    whole = 0 if settings.layers_only else sum(source.infos[one.name].nbytes for one in left)
    largest = max((math.prod(one.matrix[-2:]) for one in layers), default=0)
    return Plan(
        checkpoint=source.path,
        layers=tuple(layers),
        left_whole={one.name: one.reason for one in left},
        output_bytes=whole + sum(one.factor_bytes for one in layers),
        peak_memory_bytes=4 * 8 * largest + IMPORTED_BYTES,
    )


@dataclass
class _Run:
    """One decomposition on its way from a checkpoint to a partial folder."""

    source: Checkpoint
    settings: _Settings
    partial: Path
    target: Path
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    def execute(self) -> FactorConfig:
        plan = _plan(self.source, self.settings)
        names = [layer.info.name for layer in plan.layers]
        seen = examine(self.source, check_finite=names, progress=self.progress)
        layers, left_whole = self._without_bad(plan, seen)
        self.partial.mkdir(exist_ok=True)
        if self.source.is_folder:
            for file in side_files(self.source.path):
                shutil.copy(file, self.partial / file.name)
        records, fingerprint = self._write(layers, left_whole)
        config = self._configure(seen.fingerprint, fingerprint, records, left_whole)
        write_config(self.partial, config)
        return config

    def _without_bad(self, plan: Plan, seen: Examination) -> tuple[list[LayerPlan], dict[str, str]]:
        left_whole = dict(plan.left_whole)
        if seen.non_finite and not self.settings.skip_bad:
            listed = shortlist(f"{name!r} ({what})" for name, what in seen.non_finite.items())
            raise NumericalError(
                f"{self.source.path}: {len(seen.non_finite)} of {len(plan.layers)} layers hold "
                f"values that are not finite: {listed}. Expected finite weights; leave such "
                "layers whole with --skip-bad."
            )
        left_whole |= {name: f"not finite ({what})" for name, what in seen.non_finite.items()}
        return [one for one in plan.layers if one.info.name not in seen.non_finite], left_whole

    def _jobs(self, layers: Sequence[LayerPlan]) -> list[Job]:
        return [Job(one.info.name, one.matrix, one.info.dtype) for one in layers]

    def _ranks(self, layers: Sequence[LayerPlan]) -> dict[str, int]:
        """Fix every rank, so that the layout of the output is known before it is written."""
        ranks = {one.info.name: one.rank for one in layers if one.rank is not None}
        undecided = {one.info.name: one for one in layers if one.rank is None}
        if undecided:
            spectra = run_values(
                self._jobs(list(undecided.values())),
                self.source.read,
                device=self.settings.device,
                progress=self.progress,
            )
            for name, S in spectra:
                ranks[name] = self.settings.rank.rank_of(S, *undecided[name].matrix[-2:])
        return ranks

    def _write(
        self, layers: Sequence[LayerPlan], left_whole: Mapping[str, str]
    ) -> tuple[dict[str, LayerRecord], str]:
        settings, plans = self.settings, {one.info.name: one for one in layers}
        ranks = self._ranks(layers)
        layout = [LayerLayout(one.info.name, one.matrix, ranks[one.info.name]) for one in layers]
        kept = [] if settings.layers_only else [self.source.infos[name] for name in left_whole]
        dtype = DTYPES[settings.dtype]
        total, records = Fingerprint(), {}
        with FactorWriter(
            self.partial, layout, kept, dtype=dtype, max_shard_bytes=settings.max_shard_bytes
        ) as writer:
            for info in kept:
                writer.write_whole(info.name, self.source.read(info.name))
            for name, svd in self._svds(layers):
                svd = self._stored(name, svd, dtype)
                digests = writer.write_layer(name, LayerFactors(svd.U, svd.S, svd.Vh))
                for info in LayerLayout(name, plans[name].matrix, svd.rank).infos(dtype):
                    total.add_digest(
                        info.name, dtype_name(info.dtype), info.shape, digests[info.name]
                    )
                records[name] = _record(plans[name], svd)
                self.seconds[name] = svd.seconds
        return {one.info.name: records[one.info.name] for one in layers}, total.hexdigest()

    def _stored(self, name: str, svd: Svd, dtype: torch.dtype) -> Svd:
        """Round the factors to the storage dtype and measure what that costs."""
        if dtype == torch.float32:
            return svd
        rounded = replace(svd, U=svd.U.to(dtype), Vh=svd.Vh.to(dtype))
        weight = self.source.read(name).double().reshape(*svd.U.shape[:-1], svd.Vh.shape[-1])
        U, Vh = rounded.U.double(), rounded.Vh.double()
        norm = torch.linalg.vector_norm(weight)
        residual = torch.linalg.vector_norm(weight - reconstruct(U, svd.S.double(), Vh))
        identity = torch.eye(svd.rank, dtype=torch.float64)
        defects = (U.mT @ U - identity).abs().max(), (Vh @ Vh.mT - identity).abs().max()
        return replace(
            rounded,
            reconstruction_error=float(residual / norm) if norm > 0 else 0.0,
            orthogonality_error=float(max(defects)),
        )

    def _svds(self, layers: Sequence[LayerPlan]) -> Iterator[tuple[str, Svd]]:
        return run_svds(
            self._jobs(layers),
            self.source.read,
            rank=self.settings.rank,
            method=self.settings.method,
            device=self.settings.device,
            progress=self.progress,
        )

    def _configure(
        self,
        base: str,
        factors: str,
        records: Mapping[str, LayerRecord],
        left_whole: Mapping[str, str],
    ) -> FactorConfig:
        hub = self.source.hub_id
        return FactorConfig(
            base=BaseRecord(
                place=hub or os.path.relpath(self.source.path.resolve(), self.target.resolve()),
                hub=hub is not None,
                fingerprint=base,
            ),
            fingerprint=factors,
            selection=self.settings.selection,
            rank=str(self.settings.rank),
            method=self.settings.method,
            dtype=self.settings.dtype,
            layers_only=self.settings.layers_only,
            plan={},
            layers=records,
            left_whole=left_whole,
        )


def _record(plan: LayerPlan, svd: Svd) -> LayerRecord:
    return LayerRecord(
        name=plan.info.name,
        shape=plan.info.shape,
        dtype=dtype_name(plan.info.dtype),
        view=plan.choice.view,
        matrix=plan.matrix,
        rank=svd.rank,
        method=svd.method,
        reconstruction_error=svd.reconstruction_error,
        orthogonality_error=svd.orthogonality_error,
        energy=svd.energy,
    )
