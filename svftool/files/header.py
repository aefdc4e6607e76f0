"""The header of a safetensors file: strict reading, canonical writing."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from svftool.errors import CheckpointError

DTYPES: dict[str, tuple[str, int]] = {
    "BOOL": ("bool", 8),
    "F4": ("float4_e2m1fn_x2", 4),
    "F6_E2M3": ("float6_e2m3fn", 6),
    "F6_E3M2": ("float6_e3m2fn", 6),
    "U8": ("uint8", 8),
    "I8": ("int8", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "I16": ("int16", 16),
    "U16": ("uint16", 16),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "I32": ("int32", 32),
    "U32": ("uint32", 32),
    "F32": ("float32", 32),
    "C64": ("complex64", 64),
    "F64": ("float64", 64),
    "I64": ("int64", 64),
    "U64": ("uint64", 64),
}
"""The codes of the format: what torch calls each (or would), and its bits a value."""


def stored_bytes(code: str, shape: Sequence[int]) -> int:
    """Return the bytes that values of one code take.

    Raises
    ------
    ValueError
        If values of less than a byte do not fill whole bytes.

    Examples
    --------
    >>> stored_bytes("BF16", [3, 5]), stored_bytes("F4", [3, 6])
    (30, 9)
    """
    bits = math.prod(shape) * DTYPES[code][1]
    if bits % 8:
        raise ValueError(f"shape {list(shape)} does not fill whole bytes")
    return bits // 8


# Saying what a file that is no checkpoint seems to be.


_STARTS: tuple[tuple[bytes, str], ...] = (
    (b"version ", "the file is a Git LFS pointer (git lfs pull fetches the weights)"),
    (b"PK\x03\x04", "the file is a zip archive, as torch writes under other suffixes"),
    (b"\x80\x02", "the file is a pickle, as torch writes under other suffixes"),
    (b"GGUF", "the file is in GGUF format"),
    (b"\x89HDF", "the file is in HDF5 format"),
    (b"\x93NUMPY", "the file is a NumPy array"),
    (b"\x1f\x8b", "the file is compressed with gzip"),
    (b"\x28\xb5\x2f\xfd", "the file is compressed with zstd"),
    (b"\x89PNG", "the file is a picture (PNG)"),
    (b"\xff\xd8\xff", "the file is a picture (JPEG)"),
    (b"GIF8", "the file is a picture (GIF)"),
    (b"RIFF", "the file is a picture or a sound (RIFF)"),
    (b"%PDF", "the file is a PDF"),
)
_PAGES = (b"<!doc", b"<html", b"<?xml", b"<head")


def describe_start(start: bytes) -> str:
    """Return what a file seems to be, judged by its first bytes (eight or more).

    Examples
    --------
    >>> describe_start(b"GGUF....")
    'the file is in GGUF format'
    >>> describe_start(b"hello there")
    "the file starts with b'hello th'"
    """
    if not start:
        return "the file is empty"
    if start.lstrip().lower().startswith(_PAGES):
        return "the file is a web page"
    known = (what for magic, what in _STARTS if start.startswith(magic))
    return next(known, f"the file starts with {start[:8]!r}")


def is_described(start: bytes) -> bool:
    """Tell whether `describe_start` knows more than the bytes themselves."""
    return "starts with" not in describe_start(start)


MAX_HEADER = 100_000_000
"""Longest header, in bytes, that the format's own library accepts."""

_METADATA = "__metadata__"
_MOST = 1 << 63
_MOST_DIMENSIONS = 64
_BRIEF = 120
_LONGEST_NAME = 300
_WAY_OUT = "Copy or download the file again."


@dataclass(frozen=True)
class Entry:
    """One tensor of a header: its code, the shape as stated, and its bytes in the file."""

    name: str
    code: str
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
    raw = _read_text(file, path, size)
    fields = _parse(raw, path)
    metadata = _check_metadata(fields.pop(_METADATA, {}), path)
    base = 8 + len(raw)
    entries = [_entry(name, value, path, base) for name, value in fields.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _check_cover(entries, path, base, size)
    return Header(tuple(entries), metadata)


def announces_header(start: bytes, size: int) -> bool:
    """Tell whether a file of `size` bytes that begins with `start` can only be safetensors.

    Neither a pickle nor a zip archive begins with a number as small as a header's length.
    """
    return int.from_bytes(start[:8], "little") <= size - 8 and start[8:9] == b"{"


def _fault(path: Path, found: str, expected: str, *, name: str | None = None) -> CheckpointError:
    where = f"{path}: {name[:_LONGEST_NAME]}" if name is not None else f"{path}"
    return CheckpointError(f"{where}: {found}, expected {expected}. {_WAY_OUT}")


def _read_text(file: BinaryIO, path: Path, size: int) -> bytes:
    """Return the header's text, its length checked against the file and the format."""
    start = file.read(8)
    if size < 8:
        raise _fault(path, f"the file has {size} bytes", "safetensors, which has 8 or more")
    length = int.from_bytes(start, "little")
    if length > min(MAX_HEADER, size - 8):
        found = (
            describe_start(start)
            if is_described(start)
            else f"the first 8 bytes announce a header of {length} bytes in a file of {size}"
        )
        raise _fault(path, found, f"a safetensors header of at most {min(MAX_HEADER, size - 8)}")
    raw = file.read(length)
    if not raw.startswith(b"{"):
        raise _fault(path, f"the header starts with {raw[:1]!r}", "'{' as in safetensors")
    return raw


def json_text(value: Any, *, indent: int | None = None) -> str:
    r"""Serialise a value for a file in UTF-8, whatever its strings hold.

    A file name that is no UTF-8 comes as halves of surrogate pairs; then everything beyond ASCII is
    written as JSON's escapes, and is the same name when it is read.

    Examples
    --------
    >>> json_text(["\udcff"])
    '["\\udcff"]'
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    if text.isprintable() or not any("\ud800" <= one <= "\udfff" for one in text):
        return text
    return json.dumps(value, indent=indent)


def _parse(raw: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(key for key, _ in pairs)
        twice = [key for key, count in counts.items() if count > 1]
        if twice:
            raise _fault(path, "the header holds the name twice", "once", name=twice[0])
        for key in counts:
            key.encode("utf-8")  # half of a surrogate pair, which no writer can put down again
        return dict(pairs)

    try:
        fields: dict[str, Any] = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:100]
        raise _fault(path, f"the header is not readable ({reason})", "JSON in UTF-8") from None
    return fields


_DEEPEST = 100


def parse_json(text: str | bytes) -> Any:
    """Parse JSON out of somebody's file, and nothing that later fails where it is used.

    Raises
    ------
    ValueError
        If it is no JSON in UTF-8, is nested deeper than 100 levels, or holds half of a surrogate
        pair, which cannot be written down again.

    Examples
    --------
    >>> parse_json('{"a": [1]}')
    {'a': [1]}
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested deeper than {_DEEPEST} levels") from None
    level, depth = [value], 0
    while level:
        if depth > _DEEPEST:
            raise ValueError(f"nested deeper than {_DEEPEST} levels")
        level, depth = [inner for one in level for inner in _inside(one)], depth + 1
    return value


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, str):
        value.encode("utf-8")
    elif isinstance(value, dict):
        return (*value, *value.values())
    return value if isinstance(value, list) else ()


def _check_metadata(value: object, path: Path) -> dict[str, str]:
    if isinstance(value, dict) and all(isinstance(text, str) for text in value.values()):
        return value
    raise _fault(path, f"{_METADATA} holds more than texts", "text for text")


def _entry(name: str, value: object, path: Path, base: int) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _fault(path, "an odd entry in the header", "dtype, shape, data_offsets", name=name)
    code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise _fault(path, f"the dtype is {_brief(code)}", "a code of the format", name=name)
    if not _are_counts(shape):
        raise _fault(
            path, f"the shape is {_brief(shape)}", "a list of numbers from 0 up", name=name
        )
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _fault(
            path, f"data_offsets is {_brief(offsets)}", "a begin and a later end", name=name
        )
    try:
        size = stored_bytes(code, shape)
    except ValueError as error:
        raise _fault(path, str(error), "an even last dimension", name=name) from None
    begin, end = offsets
    if size != end - begin:
        expected = f"{size} for {code} {_brief(shape)}"
        raise _fault(path, f"{end - begin} bytes of data", expected, name=name)
    # An empty tensor has no bytes, whatever its other sides: torch counts strides with them too.
    if len(shape) > _MOST_DIMENSIONS or math.prod(side for side in shape if side) >= _MOST:
        raise _fault(path, f"the shape is {_brief(shape)}", "one that torch can hold", name=name)
    return Entry(name, code, tuple(shape), base + begin, base + end)


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(one) is int and 0 <= one < _MOST for one in value)


def _brief(value: object) -> str:
    """Return a value as an error line can hold it."""
    text = repr(value)
    return text if len(text) <= _BRIEF else f"{text[:_BRIEF]}..."


def _check_cover(entries: Sequence[Entry], path: Path, base: int, size: int) -> None:
    """Check that the tensors fill the file: no overlap, no hole, nothing cut off, no rest."""
    reached, last = base, "the header"
    for entry in entries:
        if entry.begin != reached:
            how = "overlaps with" if entry.begin < reached else "leaves a hole after"
            found = f"begins at byte {entry.begin} and {how} {last}"
            raise _fault(path, found, f"to begin at byte {reached}", name=entry.name)
        if entry.end > size:
            found = f"ends at byte {entry.end}, but the file is cut off at byte {size}"
            raise _fault(path, found, f"{entries[-1].end} bytes", name=entry.name)
        reached, last = entry.end, entry.name
    if reached != size:
        found = f"the file has {size} bytes, {size - reached} of them behind {last}"
        raise _fault(path, found, f"{reached}")


def format_header(
    layout: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Write the canonical header for tensors that lie in the order of `layout`.

    Parameters
    ----------
    layout : mapping of str to (code, shape)
        Every tensor of the file, its shape as the format states it.
    metadata : mapping of str to str, or None
        Written sorted by key; None and an empty mapping leave it out.

    Returns
    -------
    raw : bytes
        Length and header, padded with spaces to a multiple of eight bytes.
    spans : dict of str to (int, int)
        First byte and end of each tensor, from the start of the file.

    Raises
    ------
    CheckpointError
        If a name is taken by the format.
    """
    fields: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    offsets: dict[str, tuple[int, int]] = {}
    reached = 0
    for name, (code, shape) in layout.items():
        if name == _METADATA:
            raise CheckpointError(f"{name}: the name is safetensors' own, expected another name")
        end = reached + stored_bytes(code, shape)
        offsets[name] = (reached, end)
        fields[name] = {"dtype": code, "shape": list(shape), "data_offsets": [reached, end]}
        reached = end
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    raw = len(text).to_bytes(8, "little") + text
    return raw, {name: (base + begin, base + end) for name, (begin, end) in offsets.items()}
