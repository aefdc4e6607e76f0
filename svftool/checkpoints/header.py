"""The header of a safetensors file: strict reading, canonical writing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from svftool.checkpoints.dtypes import (
    CODE_OF_DTYPE,
    DTYPE_OF_CODE,
    byte_size,
    stored_shape,
    torch_shape,
)
from svftool.errors import CheckpointError

MAX_HEADER = 100_000_000
"""Longest header, in bytes, that the format's own library accepts."""

_WAY_OUT = "Copy or download the file again."


@dataclass(frozen=True)
class Entry:
    """One tensor of a header; `begin` and `end` are bytes from the start of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header: entries in the order of their bytes, and the file's metadata."""

    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]


def read_header(file: BinaryIO, path: Path, size: int) -> Header:
    """Read and check the header of a safetensors file.

    Parameters
    ----------
    file : binary file
        At its start.
    path : Path
        For messages.
    size : int
        Bytes of the whole file.

    Raises
    ------
    CheckpointError
        If anything in it contradicts the format or the file's size.
    """
    if size < 8:
        raise CheckpointError(
            f"{path}: the file has {size} bytes, expected a safetensors header of 8 or more. {_WAY_OUT}"
        )
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if length > MAX_HEADER or length + 8 > size:
        room = min(MAX_HEADER, size - 8)
        raise CheckpointError(
            f"{path}: {_foreign(start, length)}, expected a safetensors header of at most {room} bytes. {_WAY_OUT}"
        )
    raw = file.read(length)
    if not raw.startswith(b"{"):
        raise CheckpointError(
            f"{path}: the header starts with {raw[:1]!r}, expected '{{' as in safetensors. {_WAY_OUT}"
        )
    fields = _parse(raw, path)
    metadata = _metadata(fields.pop("__metadata__", {}), path)
    entries = [_entry(name, value, path, 8 + length) for name, value in fields.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _check_cover(entries, path, 8 + length, size)
    return Header(tuple(entries), metadata)


def _foreign(start: bytes, length: int) -> str:
    if start.startswith(b"PK\x03\x04"):
        return "the file is a zip archive (a pickle of torch under another suffix, perhaps)"
    if start.startswith(b"version "):
        return "the file is a Git LFS pointer (git lfs pull fetches the weights)"
    if start.lstrip().startswith(b"<"):
        return "the file is a web page"
    return f"the first 8 bytes announce a header of {length} bytes"


def _parse(raw: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(key for key, _ in pairs)
        twice = [key for key, count in counts.items() if count > 1]
        if twice:
            raise CheckpointError(
                f"{path}: {twice[0]}: the header holds the name twice, expected once. {_WAY_OUT}"
            )
        for key in counts:
            key.encode("utf-8")  # half of a surrogate pair, which no writer can put down again
        return dict(pairs)

    try:
        fields = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: the header is not readable ({_short(error)}), expected JSON in UTF-8. {_WAY_OUT}"
        ) from None
    if not isinstance(fields, dict):
        raise CheckpointError(
            f"{path}: the header is a {type(fields).__name__}, expected an object. {_WAY_OUT}"
        )
    return fields


def _short(error: Exception) -> str:
    return str(error).splitlines()[0][:120]


def _metadata(value: object, path: Path) -> dict[str, str]:
    if isinstance(value, dict) and all(isinstance(text, str) for text in value.values()):
        return value
    raise CheckpointError(
        f"{path}: __metadata__ is not an object of texts, expected text for text. {_WAY_OUT}"
    )


def _entry(name: str, value: object, path: Path, base: int) -> Entry:
    def bad(found: str, expected: str) -> CheckpointError:
        return CheckpointError(f"{path}: {name}: {found}, expected {expected}. {_WAY_OUT}")

    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise bad("the header's entry is incomplete", "dtype, shape and data_offsets")
    code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    dtype = DTYPE_OF_CODE.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise bad(
            f"the dtype is {code!r}, which torch {torch.__version__} cannot hold", "a known dtype"
        )
    if not _counts(shape):
        raise bad(f"the shape is {shape!r}", "a list of numbers from 0 up")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise bad(f"data_offsets is {offsets!r}", "a begin and an end that is not before it")
    begin, end = offsets
    try:
        inner = torch_shape(code, shape)
    except ValueError as error:
        raise bad(str(error), "an even last dimension") from None
    if byte_size(dtype, inner) != end - begin:
        raise bad(f"{end - begin} bytes of data", f"{byte_size(dtype, inner)} for {code} {shape}")
    return Entry(name, dtype, inner, base + begin, base + end)


def _counts(value: object) -> bool:
    return isinstance(value, list) and all(type(one) is int and one >= 0 for one in value)


def _check_cover(entries: Sequence[Entry], path: Path, base: int, size: int) -> None:
    """Check that the tensors fill the file: no overlap, no hole, nothing missing, nothing behind."""
    reached, last = base, "the header"
    for entry in entries:
        if entry.begin != reached:
            fault = "overlaps with" if entry.begin < reached else "leaves a hole after"
            raise CheckpointError(
                f"{path}: {entry.name}: begins at byte {entry.begin} and {fault} {last}, "
                f"expected to begin at byte {reached}. {_WAY_OUT}"
            )
        if entry.end > size:
            raise CheckpointError(
                f"{path}: {entry.name}: ends at byte {entry.end} of a file of {size} bytes, "
                f"expected {entries[-1].end} bytes or more: the file is cut off. {_WAY_OUT}"
            )
        reached, last = entry.end, entry.name
    if reached != size:
        raise CheckpointError(
            f"{path}: the file has {size} bytes, expected {reached}: {size - reached} bytes lie behind "
            f"{last}. {_WAY_OUT}"
        )


def format_header(
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Write the canonical header for tensors that lie in the order of `layout`.

    Parameters
    ----------
    layout : mapping of str to (dtype, shape)
        Every tensor of the file.
    metadata : mapping of str to str, or None
        Written sorted by key; None leaves it out.

    Returns
    -------
    raw : bytes
        Length and header, padded with spaces to a multiple of eight bytes.
    spans : dict of str to (int, int)
        First byte and end of each tensor, from the start of the file.

    Raises
    ------
    CheckpointError
        If the format has no code for a dtype.
    """
    fields: dict[str, Any] = {}
    if metadata is not None:
        fields["__metadata__"] = dict(sorted(metadata.items()))
    offsets: dict[str, tuple[int, int]] = {}
    reached = 0
    for name, (dtype, shape) in layout.items():
        if name == "__metadata__":
            raise CheckpointError(f"{name}: the name is taken by the format, expected another name")
        if dtype not in CODE_OF_DTYPE:
            raise CheckpointError(
                f"{name}: the dtype is {dtype}, expected one that safetensors can hold. Write a .pth file instead."
            )
        end = reached + byte_size(dtype, shape)
        fields[name] = {
            "dtype": CODE_OF_DTYPE[dtype],
            "shape": list(stored_shape(dtype, shape)),
            "data_offsets": [reached, end],
        }
        offsets[name] = (reached, end)
        reached = end
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    raw = len(text).to_bytes(8, "little") + text
    return raw, {name: (base + begin, base + end) for name, (begin, end) in offsets.items()}
