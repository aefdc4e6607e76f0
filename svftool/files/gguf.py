"""The header of a GGUF file: its metadata, and where each tensor lies.

Layout and types: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from svftool.errors import CheckpointError, counted, shortlist

MAGIC = b"GGUF"

BLOCKS: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
"""Types of tensors by number: name, values of a block, bytes of a block."""

_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_LONGEST = 1 << 20
_MOST = 1 << 20
_MOST_DIMENSIONS = 8
_WAY_OUT = "Copy or download the file again."


@dataclass(frozen=True)
class GGUFEntry:
    """One tensor; `shape` has the order of torch, the opposite of the file's."""

    name: str
    kind: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """Entries in the order of the file, and the metadata.

    Attributes
    ----------
    version : int
    metadata : dict of str to object
        Numbers and texts as they are; of a list, its length as ``"[N values]"``.
    entries : tuple of GGUFEntry
    spans : dict of str to (int, int)
        Where each of the metadata lies in the file, its key included.
    described : (int, int)
        Where the description of the tensors lies.
    """

    version: int
    metadata: dict[str, Any]
    entries: tuple[GGUFEntry, ...]
    spans: dict[str, tuple[int, int]]
    described: tuple[int, int]


_PART_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_MOST_PARTS = 1000


def gguf_parts(path: Path) -> tuple[Path, ...]:
    """Return the files that a GGUF file is split into, in order; the file alone where it is not.

    Raises
    ------
    CheckpointError
        If one of them is missing.

    Examples
    --------
    >>> gguf_parts(Path("model.gguf"))
    (PosixPath('model.gguf'),)
    """
    named = _PART_NAME.fullmatch(path.name)
    if named is None or not 1 < int(named[3]) <= _MOST_PARTS:
        return (path,)
    count = int(named[3])
    names = [f"{named[1]}-{number:05d}-of-{named[3]}.gguf" for number in range(1, count + 1)]
    parts = tuple(path.with_name(name) for name in names)
    missing = [one.name for one in parts if not one.is_file()]
    if missing:
        raise CheckpointError(
            f"{path}: {counted(len(missing), 'files', 'are', of=count)} missing "
            f"({shortlist(missing, 3)}), expected all in one folder. Download the rest."
        )
    return parts


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read and check the header of a GGUF file.

    Raises
    ------
    CheckpointError
        If it is none, contradicts itself, or tensors lie outside of the file.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            return _Reader(file, path, size).header()
        except (struct.error, UnicodeDecodeError, OverflowError, ValueError) as error:
            raise CheckpointError(
                f"{path}: the GGUF header is not readable ({str(error)[:100]}). {_WAY_OUT}"
            ) from None


def read_gguf_texts(path: Path, header: GGUFHeader, key: str) -> list[str] | None:
    """Read a list of texts of the metadata, which `read_gguf_header` passes over.

    Parameters
    ----------
    path : Path
    header : GGUFHeader
        Of this file.
    key : str

    Returns
    -------
    list of str or None
        None where there is no list of texts by this name.
    """
    if key not in header.spans:
        return None
    with path.open("rb") as file:
        file.seek(header.spans[key][0])
        return _Reader(file, path, os.fstat(file.fileno()).st_size).texts()


_LONG_LIST = 4096
"""Values from which a list is a vocabulary or the like, which names and shapes do not need."""


def write_outline(parts: Sequence[Path], target: Path) -> None:
    """Write a file with the header of others, but for long lists, and a hole where the data are.

    Readers that turn every entry of a vocabulary into an object take seconds for it.

    Parameters
    ----------
    parts : sequence of Path
        A file, or those that it is split into.
    target : Path

    Raises
    ------
    CheckpointError
        As `read_gguf_header`.
    """
    headers = [read_gguf_header(part) for part in parts]
    first, count = headers[0], sum(len(header.entries) for header in headers)
    kept = [span for key, span in first.spans.items() if not _is_long(first.metadata[key])]
    spans = [(parts[0], span) for span in kept]
    spans += [(part, one.described) for part, one in zip(parts, headers, strict=True)]
    with target.open("wb") as outline:
        outline.write(MAGIC + struct.pack("<IQQ", first.version, count, len(kept)))
        for part, (begin, end) in spans:
            with part.open("rb") as source:
                source.seek(begin)
                outline.write(source.read(end - begin))
        # Tensors are described by offsets in the data, which reach no further than here.
        outline.truncate(outline.tell() + _MOST + max(part.stat().st_size for part in parts))


def _is_long(value: Any) -> bool:
    count = list_length(value)
    return count is not None and count > _LONG_LIST


def list_length(value: Any) -> int | None:
    """Return how long a list of the metadata is; None of other values.

    Examples
    --------
    >>> list_length("[49152 values]"), list_length("llama")
    (49152, None)
    """
    found = re.fullmatch(r"\[(\d+) values\]", value) if isinstance(value, str) else None
    return None if found is None else int(found[1])


class _Reader:
    """Reads values one after another."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self._file, self._path, self._size = file, path, size

    def header(self) -> GGUFHeader:
        if self._file.read(4) != MAGIC:
            raise ValueError("no GGUF magic at its start")
        version = self._number("I")
        if version not in _VERSIONS:
            raise ValueError(f"version {version}, expected {' or '.join(map(str, _VERSIONS))}")
        tensors, fields = self._count(_MOST), self._count(_MOST)
        metadata, spans = {}, {}
        for _ in range(fields):
            begin, key = self._file.tell(), self._text()
            metadata[key] = self._value(self._number("I"))
            spans[key] = begin, self._file.tell()
        begin = self._file.tell()
        entries = [self._entry() for _ in range(tensors)]
        described = begin, self._file.tell()
        return GGUFHeader(version, metadata, self._placed(entries, metadata), spans, described)

    def texts(self) -> list[str] | None:
        """Read a field of the metadata that is a list of texts; None of any other."""
        self._text()
        if self._number("I") != _ARRAY or self._number("I") != _STRING:
            return None
        return [self._text() for _ in range(self._count(self._size))]

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack(f"<{code}", self._file.read(struct.calcsize(code)))
        return value

    def _count(self, most: int) -> int:
        count = int(self._number("Q"))
        if count > most:
            raise ValueError(f"a count of {count}, expected at most {most}")
        return count

    def _text(self) -> str:
        raw = self._file.read(self._count(_LONGEST))
        return raw.decode("utf-8", "replace")

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            inner, count = self._number("I"), self._count(self._size)
            self._skip(inner, count)
            return f"[{counted(count, 'values')}]"
        raise ValueError(f"a value of kind {kind}, which GGUF does not have")

    def _skip(self, kind: int, count: int) -> None:
        """Pass over a list: vocabularies are long, and nothing here needs them."""
        if kind in _SCALARS:
            self._file.seek(count * struct.calcsize(_SCALARS[kind]), os.SEEK_CUR)
        elif kind == _STRING:
            for _ in range(count):
                self._file.seek(self._count(_LONGEST), os.SEEK_CUR)
        else:
            raise ValueError(f"a list of kind {kind}, expected numbers or texts")
        if self._file.tell() > self._size:
            raise ValueError("a list that ends behind the file")

    def _entry(self) -> GGUFEntry:
        name, dimensions = self._text(), self._number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"{name[:80]}: {dimensions} dimensions")
        sides = [self._count(1 << 40) for _ in range(dimensions)]
        kind, offset = self._number("I"), self._number("Q")
        known, block, size = BLOCKS.get(kind, (f"type {kind}", 1, 0))
        values = math.prod(sides)
        if size and (sides[0] if sides else 1) % block:
            raise ValueError(f"{name[:80]}: rows of {sides[0]} values, expected blocks of {block}")
        return GGUFEntry(name, known, tuple(reversed(sides)), offset, values // block * size)

    def _placed(self, entries: list[GGUFEntry], metadata: dict[str, Any]) -> tuple[GGUFEntry, ...]:
        """Turn offsets in the data into places in the file, all inside of it."""
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= _MOST:
            raise ValueError(f"general.alignment is {alignment!r}")
        base = -(-self._file.tell() // alignment) * alignment
        placed = []
        for one in entries:
            if base + one.begin + one.nbytes > self._size:
                raise CheckpointError(
                    f"{self._path}: {one.name[:200]}: ends at byte "
                    f"{base + one.begin + one.nbytes}, but the file is cut off at byte "
                    f"{self._size}, expected all of it. {_WAY_OUT}"
                )
            placed.append(GGUFEntry(one.name, one.kind, one.shape, base + one.begin, one.nbytes))
        twice = len(placed) - len({one.name for one in placed})
        if twice:
            raise ValueError(f"{twice} names of tensors stand there twice")
        return tuple(placed)
