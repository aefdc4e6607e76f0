"""Shards put together out of spooled layers, each as soon as its layers are finished.

Where the spectrum decides the ranks nobody knows beforehand where a layer will lie. But shards fill
in file order: once every layer up to the end of one is finished, it is written and what was spooled
of it is removed. So what lies on the disk twice is about one shard. How many shards there will be
is known at the end; until then they have numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from svftool.checkpoints import open_checkpoint, write_errors
from svftool.errors import CheckpointError
from svftool.factors.places import holds
from svftool.factors.spool import PARTS, FinishedLayer, LayerSpool
from svftool.factors.writer import FactorShard, write_shard


class ShardAssembly:
    """The shards of a decomposition whose layers are spooled.

    Parameters
    ----------
    folder : Path
        Where they will lie.
    spool : LayerSpool
        Where the layers are, and the shards until all of them are complete.
    layers : sequence of str
        All layers in file order.
    plan : callable
        Shares layers out over shards, from their ranks by name, and whether tensors that are kept
        as they are follow them. From its last shard on, more layers may change a plan.
    read_whole : callable
        Gives a tensor that is kept as it is.
    """

    def __init__(
        self,
        folder: Path,
        spool: LayerSpool,
        layers: Sequence[str],
        plan: Callable[[Mapping[str, int], bool], list[FactorShard]],
        read_whole: Callable[[str], Tensor],
    ) -> None:
        self._folder, self._spool, self._layers = folder, spool, tuple(layers)
        self._plan, self._read_whole = plan, read_whole
        self._seen = self._full = 0  # layers that are finished, and shards
        self._waiting: dict[str, int] = {}  # ranks of layers that are in no full shard
        self._read_layer = lru_cache(maxsize=1)(spool.read)

    def take_up(self, found: Mapping[str, FinishedLayer]) -> set[str]:
        """Keep the shards of an interrupted run that hold what it finished, and remove all others.

        Parameters
        ----------
        found : mapping of str to FinishedLayer
            What it noted.

        Returns
        -------
        set of str
            The layers they hold.
        """
        first = self._first_layers(found)
        complete = len(first) == len(self._layers)
        shards = self._plan({name: found[name].record.rank for name in first}, complete)
        kept: dict[Path, tuple[str, ...]] = {}
        for number, shard in enumerate(shards if complete else shards[:-1]):
            file = self._file(number)
            if complete and (self._folder / shard.file).is_file():
                with write_errors(file):
                    (self._folder / shard.file).replace(file)
            if self._is(file, shard, found):
                kept[file] = shard.layers
        for file in self._spool.folder.glob("shard-*"):
            if file not in kept:
                with write_errors(file):
                    file.unlink()
        return {name for names in kept.values() for name in names}

    def advance(self) -> None:
        """Write the shards that have become full; for one process alone."""
        before = self._seen
        for name in self._layers[before:]:
            layer = self._spool.one(name)
            if layer is None:
                break
            self._waiting[name] = layer.record.rank
            self._seen += 1
        if self._seen == before:
            return
        for shard in self._plan(self._waiting, False)[:-1]:
            self._write(self._full, shard)
            self._full += 1
            for name in shard.layers:
                del self._waiting[name]

    def finish(self, shards: Sequence[FactorShard], *, rank: int, count: int) -> None:
        """Write what is missing of all shards; the processes take turns."""
        for number in range(rank, len(shards), count):
            self._write(number, shards[number])

    def put_out(self, shards: Sequence[FactorShard]) -> None:
        """Put the shards, now complete, where they will lie; once for all processes."""
        for number, shard in enumerate(shards):
            with write_errors(self._folder / shard.file):
                self._file(number).replace(self._folder / shard.file)

    def _first_layers(self, found: Mapping[str, FinishedLayer]) -> list[str]:
        """List the layers before the first that is not finished."""
        gap = next((i for i, name in enumerate(self._layers) if name not in found), None)
        return list(self._layers[:gap])

    def _file(self, number: int) -> Path:
        return self._spool.folder / f"shard-{number:05d}.safetensors"

    @staticmethod
    def _is(file: Path, shard: FactorShard, found: Mapping[str, FinishedLayer]) -> bool:
        """Whether a file is this shard, by its tensors and the digests of its layers."""
        if not file.is_file():
            return False
        try:
            with open_checkpoint(file) as opened:
                stated = {(info.name, info.dtype, info.shape) for info in opened.infos.values()}
                planned = {(info.name, info.dtype, info.shape) for info in shard.infos}
                return stated == planned and all(holds(opened, found[one]) for one in shard.layers)
        except CheckpointError:
            return False

    def _write(self, number: int, shard: FactorShard) -> None:
        file = self._file(number)
        if file.is_file():
            return
        layers = set(shard.layers)

        def read(name: str) -> Tensor:
            layer, _, part = name.rpartition(".")
            if layer in layers and part in PARTS:
                return getattr(self._read_layer(layer), part)  # type: ignore[no-any-return]
            return self._read_whole(name)

        write_shard(file, shard, read)
        for name in shard.layers:
            self._spool.drop_factors(name)
