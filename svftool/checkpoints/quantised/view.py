"""A checkpoint whose codes are read as numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from svftool.checkpoints.base import Checkpoint, Format, Shard, TensorInfo, WeightFile
from svftool.checkpoints.quantised.coded import Coded, Numbers, StoredParts
from svftool.checkpoints.quantised.packed import awq, compressed, gptq
from svftool.checkpoints.quantised.scaled import scaled
from svftool.checkpoints.quantised.tables import (
    bitsandbytes_4bit,
    bitsandbytes_int8,
    mxfp4,
    nvfp4,
)
from svftool.errors import CheckpointError, counted
from svftool.files.folder import Place

FORMATS: tuple[Callable[[StoredParts], Iterable[Coded]], ...] = (
    bitsandbytes_4bit,
    bitsandbytes_int8,
    mxfp4,
    nvfp4,
    gptq,
    awq,
    compressed,
    scaled,
)
"""What recognises each family of formats. The first that takes a tensor has it."""


def understood(checkpoint: Checkpoint) -> dict[str, Coded]:
    """Say which tensors of a checkpoint are codes of a format that is understood.

    A format is recognised by all of its parts, their dtypes and their shapes. GGUF has formats of
    its own.
    """
    if checkpoint.format == "gguf":
        return {}
    stated = (checkpoint.config or {}).get("quantization_config")
    config = stated if isinstance(stated, Mapping) else {}
    source = StoredParts(checkpoint.infos, config, checkpoint.read)
    found: dict[str, Coded] = {}
    taken: set[str] = set()
    for recognise in FORMATS:
        for one in recognise(source):
            parts = set(one.parts.values())
            free = one.name in parts or one.name not in checkpoint.infos
            if free and one.name not in found and not parts & taken:
                found[one.name] = one
                taken |= parts
    return found


class QuantisedCheckpoint(Checkpoint):
    """A checkpoint whose codes are read as the numbers that they stand for, in float32.

    Scales, zero points and tables are no tensors of it. A tensor is decoded when it is read, so
    that memory holds one at a time.

    Parameters
    ----------
    place, files, format
        As of `Checkpoint`.
    coded : mapping of str to Coded
        As `understood` returns it.
    """

    def __init__(
        self,
        place: Place,
        files: Sequence[WeightFile],
        coded: Mapping[str, Coded],
        *,
        format: Format,  # noqa: A002
    ) -> None:
        super().__init__(place, files, format=format)
        self._coded = coded
        stored = self.infos
        hidden = {part: one for one in coded.values() for part in one.parts.values()}
        names = {one.parts["codes"]: one.name for one in coded.values()}

        def shown(shard: Shard) -> Iterator[str]:
            for name in shard.names:
                if name in names:
                    yield names[name]
                elif name not in hidden:
                    yield name

        self.shards = tuple(replace(shard, names=tuple(shown(shard))) for shard in self.shards)
        self.infos = MappingProxyType(
            {name: self._info(name, stored) for shard in self.shards for name in shard.names}
        )
        self.hidden = tuple(part for part in hidden if part not in self.infos)
        self.notes = (*self.notes, *_say(self.path.name, coded.values()))

    def read(self, name: str) -> Tensor:
        """Return one tensor; as the numbers that its codes stand for, where it is stored so."""
        return self.numbers(name).values if name in self._coded else super().read(name)

    def step(self, name: str) -> Tensor | None:
        """Return the distance of neighbouring values of a tensor, None where it is no codes."""
        return self.numbers(name).step() if name in self._coded else super().step(name)

    def numbers(self, name: str) -> Numbers:
        """Decode one tensor.

        Raises
        ------
        CheckpointError
            If its parts contradict each other.
        """
        one = self._coded[name]
        read = super().read
        try:
            found = one.decode({role: read(part) for role, part in one.parts.items()})
        except (ValueError, LookupError, TypeError, ArithmeticError, RuntimeError) as error:
            raise self._broken(one, str(error).splitlines()[0][:150]) from error
        if found.values.shape != one.shape:
            shape = tuple(found.values.shape)
            raise self._broken(one, f"the parts make a tensor of shape {shape}")
        return Numbers(found.values.contiguous(), found.step)

    def _broken(self, one: Coded, found: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: {one.name}: {found}, expected {one.storage} of shape "
            f"{one.shape}. Copy or download the files again."
        )

    def _info(self, name: str, stored: Mapping[str, TensorInfo]) -> TensorInfo:
        one = self._coded.get(name)
        if one is None:
            return stored[name]
        file = stored[one.parts["codes"]].file
        return TensorInfo(name, torch.float32, one.shape, file, storage=one.storage)


def _say(name: str, coded: Iterable[Coded]) -> Iterator[str]:
    for storage, count in Counter(one.storage for one in coded).items():
        tensors = counted(count, "tensors", "are")
        yield f"{name}: {tensors} stored as {storage}; read as the numbers that the codes stand for"
