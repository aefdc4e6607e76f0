"""One decomposition on its way from a checkpoint to a finished folder, by one or many processes.

Where the ranks are known beforehand the shards are laid out and each layer is written to its place
(see `svftool.factors.places`); where the spectrum decides, layers are spooled until their shards
can be put together (see `svftool.factors.spool`). Either way a run that was killed at any moment
goes on where it was. The layers are shared out by cost; what a layer's factors are does not depend
on which process computes them, or on how many there are.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from svftool.checkpoints import (
    Checkpoint,
    Choice,
    Fingerprint,
    Selection,
    TensorInfo,
    dtype_name,
    side_files,
)
from svftool.engine import Job, RankRule, run_svds, share
from svftool.engine.examine import LARGEST, SMALLEST, Examination, examine
from svftool.errors import NumericalError, counted, shortlist
from svftool.factors import (
    BaseRecord,
    FactorConfig,
    FactorShard,
    FinishedLayer,
    LayerFactors,
    LayerJournal,
    LayerRecord,
    LayerSpool,
    ShardAssembly,
    ShardPlaces,
    digests_of,
    factor_infos,
    finish_factors,
    plan_factor_shards,
)
from svftool.files.hub import lasting_path
from svftool.files.names import real
from svftool.files.side_files import named
from svftool.numerics import Method, Svd, reconstruct
from svftool.processes import Processes
from svftool.progress import Progress


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
        Singular values kept; None where the spectrum decides.
    """

    info: TensorInfo
    choice: Choice
    matrix: tuple[int, ...]
    rank: int | None

    @property
    def job(self) -> Job:
        """The layer as the engine takes it."""
        return Job(self.info.name, self.matrix, self.info.dtype)

    def fits(self, record: LayerRecord) -> bool:
        """Whether a record, which an interrupted run left, is of this layer."""
        mine = (self.info.name, self.info.shape, dtype_name(self.info.dtype), self.matrix)
        theirs = (record.name, record.shape, record.dtype, record.matrix)
        return mine == theirs and self.rank in (None, record.rank)

    @property
    def factor_bytes(self) -> int:
        """Bytes of the factors in float32, at full rank where the rank is open."""
        *batch, m, n = self.matrix
        rank = min(m, n) if self.rank is None else self.rank
        return 4 * (batch[0] if batch else 1) * rank * (m + n + 1)


@dataclass(frozen=True)
class FactoriseSettings:
    """Options of a decomposition, parsed and checked."""

    rank: RankRule
    method: Method
    selection: Selection
    dtype: torch.dtype
    max_shard_bytes: int
    layers_only: bool
    skip_bad: bool
    device: torch.device


@dataclass
class Factorisation:
    """The run.

    Attributes
    ----------
    source : Checkpoint
        What is decomposed.
    layers : list of LayerPlan
        The selected layers in file order.
    left_whole : dict of str to str
        Every other tensor with the reason.
    settings : FactoriseSettings
        Options.
    target, partial : Path
        Where the folder will be, and where it is being made.
    processes : Processes
        This process among those that share the work.
    progress : Progress
        Told how far the work is.
    """

    source: Checkpoint
    layers: Sequence[LayerPlan]
    left_whole: Mapping[str, str]
    settings: FactoriseSettings
    target: Path
    partial: Path
    processes: Processes
    progress: Progress

    def run(self, *, resume: bool) -> tuple[FactorConfig, dict[str, float]]:
        """Decompose every layer and finish the folder.

        Returns
        -------
        config : FactorConfig
            As written.
        seconds : dict of str to float
            Time that each layer's decomposition took.
        """
        seen = self._examine()
        spool = LayerSpool(self.partial, [one.info.name for one in self.layers])
        self.processes.once(lambda: spool.begin(self._facts(seen), resume=resume))
        work = self._placed if self._ranks_are_known else self._spooled
        shards, finished = work(spool)
        self.processes.meet()
        config = self._configuration(seen, finished)
        self.processes.once(lambda: self._finish(spool, shards, config))
        return config, {name: layer.seconds for name, layer in finished.items()}

    @property
    def _ranks_are_known(self) -> bool:
        # Two machines that write into one page of a shared file can undo each other's bytes.
        return self.processes.one_machine and all(one.rank is not None for one in self.layers)

    def _placed(self, spool: LayerSpool) -> tuple[list[FactorShard], dict[str, FinishedLayer]]:
        """Write every layer to its place in shards that are laid out beforehand."""
        shards = self._shards({one.info.name: one.rank for one in self.layers})
        places = ShardPlaces(self.partial, spool.folder, shards)
        self.processes.once(places.lay_out)
        done = self._done(spool, places.held)
        with LayerJournal(places.sync, spool.note) as journal:
            for layer, factors in self._decomposed(done):
                places.write_layer(layer.record.name, factors)
                journal.add(layer)
                del factors
        for name in self._kept[self.processes.rank :: self.processes.count]:
            places.write({name: self.source.read(name)})
        self.processes.meet()
        self.processes.once(places.put_out)
        return shards, spool.finished()

    def _spooled(self, spool: LayerSpool) -> tuple[list[FactorShard], dict[str, FinishedLayer]]:
        """Spool every layer, and put the shards together as they fill."""
        names = [one.info.name for one in self.layers]
        assembly = ShardAssembly(self.partial, spool, names, self._shards, self.source.read)
        in_shards = self.processes.once(lambda: assembly.take_up(self._found(spool)))

        def held(layers: Sequence[FinishedLayer]) -> set[str]:
            return {
                layer.record.name
                for layer in layers
                if layer.record.name in in_shards or spool.intact(layer, self._infos(layer.record))
            }

        done = self._done(spool, held)
        self.processes.once(lambda: spool.forget(set(names) - done))
        for layer, factors in self._decomposed(done, in_order=self._many_shards):
            spool.add(layer, factors)
            del factors
            if self.processes.first:
                assembly.advance()
        self.processes.meet()
        finished = spool.finished()
        shards = self._shards({name: layer.record.rank for name, layer in finished.items()})
        assembly.finish(shards, rank=self.processes.rank, count=self.processes.count)
        self.processes.meet()
        self.processes.once(lambda: assembly.put_out(shards))
        return shards, finished

    @property
    def _many_shards(self) -> bool:
        """Whether there may be several: layers then come in file order, so that the first fill."""
        return sum(one.factor_bytes for one in self.layers) > self.settings.max_shard_bytes

    def _examine(self) -> Examination:
        names = {one.info.name: one.matrix for one in self.layers}
        seen = examine(self.source, check=names, processes=self.processes, progress=self.progress)
        if seen.non_finite and not self.settings.skip_bad:
            listed = shortlist(f"{name!r} ({what})" for name, what in seen.non_finite.items())
            raise NumericalError(
                f"{self.source.path}: "
                f"{counted(len(seen.non_finite), 'layers', 'hold', of=len(names))} values that are "
                f"not finite: {listed}. Expected finite weights; leave such layers whole with "
                "--skip-bad."
            )
        if seen.out_of_range and not self.settings.skip_bad:
            listed = shortlist(f"{name!r} ({what})" for name, what in seen.out_of_range.items())
            raise NumericalError(
                f"{self.source.path}: "
                f"{counted(len(seen.out_of_range), 'layers', 'are', of=len(names))} beyond the "
                f"singular values that factors hold: {listed}. Expected the largest between "
                f"{SMALLEST:.0e} and {LARGEST:.1e}; leave such layers whole with --skip-bad."
            )
        bad = {name: f"not finite ({what})" for name, what in seen.non_finite.items()}
        bad |= {name: f"beyond float32 ({what})" for name, what in seen.out_of_range.items()}
        self.left_whole = {**self.left_whole, **bad}
        self.layers = [one for one in self.layers if one.info.name not in bad]
        return seen

    def _facts(self, seen: Examination) -> dict[str, Any]:
        """Everything that decides the result: an interrupted run must agree to be resumed."""
        settings = self.settings
        return {
            "checkpoint": seen.fingerprint,
            "layers": [[one.info.name, *one.matrix] for one in self.layers],
            "rank": str(settings.rank),
            "method": settings.method,
            "dtype": dtype_name(settings.dtype),
            "max_shard_bytes": settings.max_shard_bytes,
            "layers_only": settings.layers_only,
        }

    def _found(self, spool: LayerSpool) -> dict[str, FinishedLayer]:
        """List what an interrupted run noted of these layers."""
        planned = {one.info.name: one for one in self.layers}
        return {
            name: layer
            for name, layer in spool.finished().items()
            if planned[name].fits(layer.record)
        }

    def _done(
        self, spool: LayerSpool, held: Callable[[Sequence[FinishedLayer]], set[str]]
    ) -> set[str]:
        """List the layers that an interrupted run finished and whose factors are still there."""
        mine = list(self._found(spool).values())[self.processes.rank :: self.processes.count]
        # A meeting, too: everyone has looked at what is finished before anyone adds to it.
        done = set[str]().union(*self.processes.gather(held(mine)))
        if done:
            self.progress.note(
                f"resuming: {counted(len(done), 'layers', 'are', of=len(self.layers))} finished"
            )
        return done

    def _decomposed(
        self, done: set[str], *, in_order: bool = False
    ) -> Iterator[tuple[FinishedLayer, LayerFactors]]:
        """Decompose this process's share of what is not done, longest or first layers first."""
        plans = {one.info.name: one for one in self.layers if one.info.name not in done}
        shares = share([one.job for one in plans.values()], self.processes.count)
        mine = {job.name: job for job in shares[self.processes.rank]}
        jobs = [mine[name] for name in plans if name in mine]
        for name, svd in self._svds(jobs, in_order=in_order):
            stored = self._stored(name, svd)
            factors = LayerFactors(stored.U, stored.S, stored.Vh)
            record = _record(plans[name], stored)
            yield FinishedLayer(record, digests_of(factors), svd.seconds), factors
            del svd, stored, factors  # their memory is counted until the next one is asked for

    def _svds(self, jobs: Sequence[Job], *, in_order: bool) -> Iterator[tuple[str, Svd]]:
        return run_svds(
            jobs,
            self.source.read,
            rank=self.settings.rank,
            method=self.settings.method,
            device=self.settings.device,
            in_order=in_order,
            progress=self.progress,
        )

    def _stored(self, name: str, svd: Svd) -> Svd:
        """Round the factors to the storage dtype and measure what that costs."""
        dtype = self.settings.dtype
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

    @property
    def _kept(self) -> list[str]:
        """Tensors that are written as they are, in file order."""
        kept = () if self.settings.layers_only else self.left_whole
        return [name for name in self.source.infos if name in kept]

    def _shards(self, ranks: Mapping[str, int | None], whole: bool = True) -> list[FactorShard]:
        dtype = self.settings.dtype
        return plan_factor_shards(
            {
                one.info.name: factor_infos(one.info.name, one.matrix, rank, dtype)
                for one in self.layers
                if (rank := ranks.get(one.info.name)) is not None
            },
            [self.source.infos[name] for name in self._kept if whole],
            max_bytes=self.settings.max_shard_bytes,
        )

    def _infos(self, record: LayerRecord) -> tuple[TensorInfo, ...]:
        return factor_infos(record.name, record.matrix, record.rank, self.settings.dtype)

    def _configuration(
        self, seen: Examination, finished: Mapping[str, FinishedLayer]
    ) -> FactorConfig:
        total = Fingerprint()
        digests = {name: seen.digests[name] for name in self._kept}
        for layer in finished.values():
            for info in self._infos(layer.record):
                digest = layer.digests[info.name.rpartition(".")[2]]
                total.add_digest(info.name, dtype_name(info.dtype), info.shape, digest)
                digests[info.name] = digest
        hub, settings = self.source.hub_id, self.settings
        return FactorConfig(
            base=BaseRecord(
                place=hub or os.path.relpath(lasting_path(self.source.path), real(self.target)),
                hub=hub is not None,
                fingerprint=seen.fingerprint,
            ),
            fingerprint=total.hexdigest(),
            selection=settings.selection,
            rank=str(settings.rank),
            method=settings.method,
            dtype=dtype_name(settings.dtype),
            layers_only=settings.layers_only,
            layers={one.info.name: finished[one.info.name].record for one in self.layers},
            left_whole=self.left_whole,
            digests=dict(sorted(digests.items())),
        )

    def _finish(
        self, spool: LayerSpool, shards: Sequence[FactorShard], config: FactorConfig
    ) -> None:
        if self.source.is_folder:
            beside = side_files(self.source.path, weights=self.source.own_files)
            beside.copy(self.partial)
            if beside.left:
                self.progress.warn(f"{self.source.path}: not copied: {named(beside.left)}")
        finish_factors(self.partial, shards, config)
        shutil.rmtree(spool.folder)


def storing_bytes(plan: LayerPlan, dtype: torch.dtype) -> int:
    """Bound what rounding one layer's factors to the storage dtype takes; see `_stored`."""
    if dtype == torch.float32:
        return 0
    *batch, m, n = plan.matrix
    k = min(m, n) if plan.rank is None else min(plan.rank, m, n)
    # In float64: the weight, its reconstruction and their difference; U twice, and Vh.
    return 8 * math.prod(batch) * (3 * m * n + 2 * m * k + k * n + k * k)


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
