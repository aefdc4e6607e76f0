"""Shards that are laid out before the work, so that each factor is written once, to its place.

Where all ranks are known beforehand, so is every byte of the shards but the numbers. The shards are
made with their headers and their full size; whoever finishes a layer writes it where it belongs,
waits until it is on the disk, and notes it in the journal (see `svftool.factors.spool`) with the
digests of what was written. What a journal says is believed where the digests agree: a place that
was written again in part, or that a loss of power emptied, is another's work.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from svftool.checkpoints import (
    Checkpoint,
    SafetensorsWriter,
    open_checkpoint,
    tensor_digest,
    write_errors,
)
from svftool.checkpoints.writer import check_room
from svftool.factors.spool import PARTS, FinishedLayer
from svftool.factors.store import LayerFactors
from svftool.factors.writer import FactorShard, open_shard
from svftool.files.output import sync


class ShardPlaces:
    """The places of all tensors in the shards of a folder that is being made.

    The shards lie in a folder of their own until all of them are complete. Between two writes none
    is open, however many there are.

    Parameters
    ----------
    folder : Path
        Where the shards will lie.
    work : Path
        Where they are made; on the same disk.
    shards : sequence of FactorShard
        All that the folder will hold.
    """

    def __init__(self, folder: Path, work: Path, shards: Sequence[FactorShard]) -> None:
        self._folder, self._work = folder, work
        self._shards = {shard.file: shard for shard in shards}
        self._home = {info.name: shard.file for shard in shards for info in shard.infos}
        self._writers: dict[str, SafetensorsWriter] = {}

    def lay_out(self) -> None:
        """Make the shards, once for all processes; those of an interrupted run are taken up.

        Raises
        ------
        ResourceError
            If the disk has no room for those that are made, or refuses them.
        """
        missing = 0
        for file, shard in self._shards.items():
            with write_errors(self._work / file):
                if (self._folder / file).is_file():
                    (self._folder / file).replace(self._work / file)
                elif not (self._work / file).is_file():
                    missing += sum(info.nbytes for info in shard.infos)
        check_room(self._work / next(iter(self._shards)), missing)
        for file in self._shards:
            self._writer(file)

    def put_out(self) -> None:
        """Put the shards, now complete, where they will lie; once for all processes."""
        for file in self._shards:
            with write_errors(self._folder / file):
                sync(self._work / file)
                (self._work / file).replace(self._folder / file)

    def _writer(self, file: str) -> SafetensorsWriter:
        if file not in self._writers:
            writer = open_shard(self._work / file, self._shards[file], again=True)
            writer.abort()
            self._writers[file] = writer
        return self._writers[file]

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors of one shard to their places; for one thread at a time.

        Raises
        ------
        ResourceError
            If the disk refuses it.
        """
        (file,) = {self._home[name] for name in tensors}
        writer = self._writer(file)
        with writer.reopened():
            for name, tensor in tensors.items():
                writer.write(name, tensor)

    def write_layer(self, name: str, factors: LayerFactors) -> None:
        """Write the factors of one layer to their places."""
        self.write({f"{name}.{part}": getattr(factors, part) for part in PARTS})

    def sync(self, layers: Sequence[str]) -> None:
        """Wait until what was written of some layers is on the disk."""
        for file in sorted({self._home[f"{name}.S"] for name in layers}):
            with write_errors(self._work / file):
                sync(self._work / file)

    def held(self, layers: Iterable[FinishedLayer]) -> set[str]:
        """List the layers whose places hold what was written of them, by its digests."""
        by_file: dict[str, list[FinishedLayer]] = {}
        for layer in layers:
            by_file.setdefault(self._home[f"{layer.record.name}.S"], []).append(layer)
        return {name for file, some in by_file.items() for name in self._held_in(file, some)}

    def _held_in(self, file: str, layers: Sequence[FinishedLayer]) -> Iterator[str]:
        with open_checkpoint(self._work / file) as shard:
            for layer in layers:
                if holds(shard, layer):
                    yield layer.record.name


def holds(shard: Checkpoint, layer: FinishedLayer) -> bool:
    """Whether a shard holds what was written of a layer, by its digests."""
    name = layer.record.name
    found = {part: tensor_digest(shard.read(f"{name}.{part}")) for part in PARTS}
    return found == dict(layer.digests)


class LayerJournal:
    """Notes layers as finished once they are on the disk, in a thread of its own.

    The disk is waited for once for all that came meanwhile, and nobody else waits for it. As a
    context manager it ends when everything handed in is noted, whatever ended its block.

    Parameters
    ----------
    sync : callable
        Waits until what was written of the layers of these names is on the disk.
    note : callable
        Notes one layer.
    """

    def __init__(
        self, sync: Callable[[Sequence[str]], None], note: Callable[[FinishedLayer], None]
    ) -> None:
        self._sync, self._note = sync, note
        self._queue: queue.SimpleQueue[FinishedLayer | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="svftool-journal", daemon=True)

    def add(self, layer: FinishedLayer) -> None:
        """Hand in a layer that has been written.

        Raises
        ------
        ResourceError
            If the disk refused an earlier one.
        """
        if self._failure is not None:
            raise self._failure
        self._queue.put(layer)

    def _run(self) -> None:
        try:
            more = True
            while more:
                layers, more = self._waiting()
                if layers:
                    self._sync([layer.record.name for layer in layers])
                for layer in layers:
                    self._note(layer)
        except BaseException as error:  # noqa: BLE001  (raised again by the caller's thread)
            self._failure = error

    def _waiting(self) -> tuple[list[FinishedLayer], bool]:
        """Wait for a layer and take all there are; tell whether more may come."""
        taken = [self._queue.get()]
        while not self._queue.empty():
            taken.append(self._queue.get())
        return [layer for layer in taken if layer is not None], None not in taken

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._queue.put(None)
        self._thread.join()
        if kind is None and self._failure is not None:
            raise self._failure
