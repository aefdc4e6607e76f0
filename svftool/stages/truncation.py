"""Changes on their way to an adapter, by one or many processes; what is finished is kept.

Each layer is truncated once. Its matrices, then what is known of them, are renamed into place, so a
run that was killed at any moment goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from svftool.adapters.low_rank import LowRank, Truncated, truncate
from svftool.checkpoints import tensor_digest
from svftool.choices.adapters import AdapterRank
from svftool.engine import Job, job_bytes, run_layers, share
from svftool.engine.gpu import to_host
from svftool.errors import CheckpointError, counted
from svftool.factors.spool import Spool
from svftool.numerics import ThreadPool
from svftool.processes import Processes
from svftool.progress import Progress


@dataclass(frozen=True)
class Finished:
    """What is known of a truncated layer.

    Attributes
    ----------
    rank : int
        0 where nothing of the change is above rounding.
    total, rest : float
        Norms of the change, and of what the matrices miss of it.
    floored : bool
        Whether the rank ends where rounding begins.
    digests : mapping of str to str
        SHA-256 of ``B`` and ``A``.
    """

    rank: int
    total: float
    rest: float
    floored: bool
    digests: Mapping[str, str]

    @property
    def error(self) -> float:
        """``||D - BA||_F / ||D||_F``."""
        return self.rest / self.total if self.total > 0 else 0.0


class AdapterSpool(Spool):
    """Truncated layers of an adapter that is not finished."""

    def add(self, name: str, found: Truncated) -> None:
        """Store a layer."""
        layer = found.layer
        tensors = {} if layer is None else {"B": layer.B, "A": layer.A}
        digests = {part: tensor_digest(one) for part, one in tensors.items()}
        rank = 0 if layer is None else layer.rank
        record = Finished(rank, found.total, found.rest, found.floored, digests)
        self.keep(name, tensors, asdict(record))

    def finished(self) -> dict[str, Finished]:
        """List the layers that are finished, by name."""
        return self.records(_finished)

    def intact(self, name: str, one: Finished) -> bool:
        """Whether a finished layer's matrices are here and hold what was written."""
        if not one.rank:
            return True
        try:
            found = self.tensors(name) if self.has_tensors(name) else {}
        except CheckpointError:
            return False
        return {part: tensor_digest(value) for part, value in found.items()} == one.digests

    def read(self, name: str) -> LowRank:
        """Read a finished layer."""
        found = self.tensors(name)
        return LowRank(name, found["B"], found["A"])


def _finished(item: Mapping[str, Any]) -> Finished:
    return Finished(
        rank=int(item["rank"]),
        total=float(item["total"]),
        rest=float(item["rest"]),
        floored=bool(item["floored"]),
        digests=dict(item["digests"]),
    )


@dataclass(frozen=True)
class Truncation:
    """How changes are truncated.

    Attributes
    ----------
    rank : AdapterRank
    dtype : torch.dtype
        Of the two matrices.
    device : torch.device
    change : callable
        Gives the change of a layer, as a matrix.
    floor : callable
        Bounds what rounding makes of a layer's singular values.
    held : callable
        Gives the bytes that a layer takes in the checkpoint.
    """

    rank: AdapterRank
    dtype: torch.dtype
    device: torch.device
    change: Callable[[str], Tensor]
    floor: Callable[[str], float]
    held: Callable[[str], int]

    def run(
        self,
        jobs: Sequence[Job],
        spool: AdapterSpool,
        *,
        processes: Processes,
        progress: Progress,
    ) -> None:
        """Truncate what is not finished; each process does its share."""
        done = {name for name, one in spool.finished().items() if spool.intact(name, one)}
        if done:
            progress.note(f"resuming: {counted(len(done), 'layers', 'are', of=len(jobs))} finished")
        mine = share([job for job in jobs if job.name not in done], processes.count)
        # Everyone has looked at what is finished before anyone adds to it.
        processes.meet()
        for name, found in self._truncated(mine[processes.rank], progress):
            spool.add(name, found)
        processes.meet()

    def _truncated(
        self, jobs: Sequence[Job], progress: Progress
    ) -> Iterable[tuple[str, Truncated]]:
        floors: dict[str, float] = {}

        def read(name: str) -> Tensor:
            floors[name] = self.floor(name)
            return self.change(name)

        def do(job: Job, change: Tensor, pool: ThreadPool) -> Truncated:
            found = truncate(
                job.name,
                change,
                self.rank,
                dtype=self.dtype,
                floor=floors.pop(job.name),
                pool=pool,
            )
            return _on_host(found)

        return run_layers(
            jobs,
            read,
            do,
            size=self._bytes,
            title="truncating",
            device=self.device,
            progress=progress,
        )

    def _bytes(self, job: Job) -> int:
        kept = self.rank.limit(*job.matrix) if self.rank.kind == "count" else None
        # The two weights are there while their difference is formed.
        return job_bytes(job, kept) + 2 * self.held(job.name)


def _on_host(found: Truncated) -> Truncated:
    layer = found.layer
    if layer is None:
        return found
    here = LowRank(layer.name, to_host(layer.B), to_host(layer.A), layer.scale)
    return Truncated(here, found.total, found.rest, found.floored)
