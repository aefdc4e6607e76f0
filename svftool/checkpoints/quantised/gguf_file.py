"""Reading GGUF: its blocks as the numbers they stand for, one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from svftool.checkpoints.base import TensorInfo
from svftool.checkpoints.positions import fill
from svftool.checkpoints.quantised.gguf_names import naming
from svftool.checkpoints.quantised.gguf_steps import steps
from svftool.errors import CheckpointError, MissingDependencyError, brief, counted, system_fault
from svftool.files.gguf import BLOCKS, GGUFEntry, GGUFHeader, gguf_parts, read_gguf_header

_SIZES = {name: (values, size) for name, values, size in BLOCKS.values()}
_PLAIN = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
_ROW, _ROWS = 1 << 13, 1 << 9
"""Values of a row, and rows that are decoded at once."""


class GGUFFile:
    """GGUF open for reading; its floating tensors come in float32, as transformers has them.

    Tensors are named and turned as transformers does where it knows the architecture; those that
    it passes over are passed over here. A file that is split into several is read as one.

    Parameters
    ----------
    path : Path
        The file, or one of those that it is split into.

    Raises
    ------
    CheckpointError
        If a header is broken, or a part is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        parts = gguf_parts(path)
        header, homes = _joined(parts)
        self._entries = {one.name: one for one in header.entries}
        self._naming = naming(parts[0], header)
        self.config = self._naming.config
        self._files = {part: part.open("rb") for part in parts}
        self._homes = homes
        self.infos: Mapping[str, TensorInfo] = MappingProxyType(
            {name: self._info(name) for name in self._naming.sources}
        )
        used = {one for group in self._naming.sources.values() for one in group}
        self.passed_over: Mapping[str, int] = {
            one.name: one.nbytes for one in header.entries if one.name not in used
        }
        self.metadata: Mapping[str, str] = {}
        self.nesting: tuple[str, ...] = ()
        self.warnings: tuple[str, ...] = self._left_out()
        self.notes: tuple[str, ...] = (*self._said(), *self.warnings)
        self.tied: tuple[tuple[str, ...], ...] = ()

    def read(self, name: str) -> Tensor:
        """Return one tensor that the caller owns.

        Raises
        ------
        CheckpointError
            If the file has been cut off since it was opened, cannot be read, or holds blocks of a
            kind that the gguf package cannot decode.
        MissingDependencyError
            If it is not installed.
        """
        try:
            made = self._naming.make(name, self._values)
        except (ValueError, LookupError, TypeError, ArithmeticError) as error:
            raise CheckpointError(
                f"{self.path}: {name}: {brief(str(error))}, expected a tensor of shape "
                f"{self.infos[name].shape} as the metadata say. Download the file again."
            ) from error
        if made.shape != self.infos[name].shape:
            raise CheckpointError(
                f"{self.path}: {name}: shape {tuple(made.shape)}, expected "
                f"{self.infos[name].shape} as the metadata say. Download the file again."
            )
        return made

    def step(self, name: str) -> Tensor | None:
        """Return the distance of neighbouring values of a tensor, None where none was quantised."""
        if not self.infos[name].storage:
            return None
        return self._naming.make(name, self._steps)

    def close(self) -> None:
        """Close the file."""
        for file in self._files.values():
            file.close()

    def _info(self, name: str) -> TensorInfo:
        entries = [self._entries[one] for one in self._naming.sources[name]]
        shape = self._naming.shapes.get(name, entries[0].shape)
        if math.prod(shape) != sum(math.prod(one.shape) for one in entries):
            shape = entries[0].shape
        codes = sorted({one.kind for one in entries} - _PLAIN.keys())
        dtype = _PLAIN.get(entries[0].kind, torch.float32)
        if dtype.is_floating_point and dtype != torch.float64:
            dtype = torch.float32
        return TensorInfo(name, dtype, shape, self.path.name, storage=" and ".join(codes))

    def _said(self) -> tuple[str, ...]:
        count = sum(bool(one.storage) for one in self.infos.values())
        kinds = sorted({one.storage for one in self.infos.values() if one.storage})
        blocks = (
            f"{self.path.name}: {counted(count, 'tensors', 'are')} stored as "
            f"{', '.join(kinds)} blocks"
        )
        said = (f"{blocks}; read as the numbers that they stand for",) if count else ()
        return (*said, self._naming.note) if self._naming.note else said

    def _left_out(self) -> tuple[str, ...]:
        if not self.passed_over:
            return ()
        names = ", ".join(list(self.passed_over)[:3])
        return (
            f"{self.path.name}: {counted(len(self.passed_over), 'tensors', 'have')} no place in "
            f"transformers' model and are not read: {names}",
        )

    def _raw(self, entry: GGUFEntry) -> Tensor:
        raw = torch.empty(entry.nbytes, dtype=torch.uint8)
        try:
            fill(self._files[self._homes[entry.name]].fileno(), raw.numpy().data, entry.begin)
        except OSError as error:
            system_fault(error, self.path)
            raise CheckpointError(
                f"{self.path}: {entry.name}: reading failed ({error.strerror or error}), "
                f"expected {entry.nbytes} bytes at byte {entry.begin}. Copy or download the file "
                "again."
            ) from error
        return raw

    def _values(self, source: str) -> Tensor:
        entry = self._entries[source]
        raw = self._raw(entry)
        plain = _PLAIN.get(entry.kind)
        if plain is not None:
            values = raw.view(plain).reshape(entry.shape)
            return values.float() if plain in (torch.float16, torch.bfloat16) else values
        blocks = raw.reshape(-1, _SIZES[entry.kind][1]) if entry.kind in _SIZES else raw
        return self._decoded(entry, blocks.numpy())

    def _decoded(self, entry: GGUFEntry, blocks: NDArray[np.uint8]) -> Tensor:
        quants = _package()
        try:
            kind = _type_of(quants, entry.kind)
            each = _SIZES[entry.kind][0]
            found = torch.empty(len(blocks), each)
            for first, part in _parts(blocks, each):
                values = torch.from_numpy(quants.dequantize(part, kind)).reshape(-1, each)
                found[first : first + len(values)] = values
        except (KeyError, NotImplementedError):
            raise CheckpointError(
                f"{self.path}: {entry.name}: blocks of kind {entry.kind}, expected one that the "
                "gguf package decodes. Install a newer gguf, or convert the file to another kind."
            ) from None
        return found.reshape(entry.shape)

    def _steps(self, source: str) -> Tensor:
        entry = self._entries[source]
        values = self._values(source)
        if entry.kind in _PLAIN:
            return torch.zeros(entry.shape)
        blocks = self._raw(entry).reshape(-1, _SIZES[entry.kind][1])
        return steps(entry.kind, blocks, values.reshape(len(blocks), -1)).reshape(entry.shape)


def _parts(blocks: NDArray[np.uint8], each: int) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yield a tensor's blocks in parts, as rows of several: where a part begins, and the part.

    The package decodes 16 rows at a time, and rows of one block take it 15 times as long.
    """
    many = _ROW // each
    whole = len(blocks) // many * many
    for first in range(0, whole, many * _ROWS):
        rows = blocks[first : min(first + many * _ROWS, whole)]
        yield first, rows.reshape(-1, many * blocks.shape[1])
    if whole < len(blocks):
        yield whole, blocks[whole:]


def _joined(parts: Sequence[Path]) -> tuple[GGUFHeader, dict[str, Path]]:
    """Return the first part's header with the tensors of all, and where each lies."""
    headers = {part: read_gguf_header(part) for part in parts}
    homes = {one.name: part for part, header in headers.items() for one in header.entries}
    first = headers[parts[0]]
    entries = tuple(one for header in headers.values() for one in header.entries)
    stated = first.metadata.get("split.tensors.count", len(entries)) if len(parts) > 1 else None
    if len(homes) != len(entries) or stated not in (None, len(entries)):
        raise CheckpointError(
            f"{parts[0]}: its {counted(len(parts), 'parts', 'hold')} "
            f"{counted(len(homes), 'tensors')} of {len(entries)}, expected {stated}, each once. "
            "Download them again, all of one model."
        )
    return replace(first, entries=entries), homes


def _package() -> Any:
    try:
        return import_module("gguf.quants")
    except ImportError:
        raise MissingDependencyError("gguf", extra="gguf", purpose="blocks of GGUF") from None


def _type_of(quants: Any, kind: str) -> Any:
    return quants.GGMLQuantizationType[kind]
