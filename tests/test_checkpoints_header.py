"""The safetensors format, byte by byte: what is written, and each way to break it."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svftool.checkpoints import open_checkpoint
from svftool.checkpoints.dtypes import code_of
from svftool.errors import CheckpointError
from svftool.files.header import MAX_HEADER, format_header, read_header


def raw_file(header: bytes | dict[str, Any] | str, data: bytes = b"") -> bytes:
    if isinstance(header, dict):
        header = json.dumps(header)
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


GOOD = {"a": entry("F32", [2], 0, 8), "b": entry("F32", [1], 8, 12)}
TWICE = '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{}}'

BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", r"the file has 0 bytes, expected safetensors"),
    "shorter than a length": (b"\x01\x02", r"the file has 2 bytes, expected safetensors"),
    "length beyond the file": (
        struct.pack("<Q", 2**62) + b"{}",
        r"the first 8 bytes announce a header of 4611686018427387904 bytes in a file of 10, "
        r"expected .* at most 2",
    ),
    "git lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        r"the file is a Git LFS pointer \(git lfs pull.*, expected a safetensors header",
    ),
    "web page": (
        b"<!DOCTYPE html><html></html>",
        r"the file is a web page, expected a safetensors header",
    ),
    "zip archive": (
        b"PK\x03\x04" + b"\0" * 60,
        r"the file is a zip archive.*, expected a safetensors header",
    ),
    "not an object": (raw_file("[1]"), r"the header starts with b'\[', expected '\{'"),
    "empty header": (raw_file(b""), r"the header starts with b'', expected '\{'"),
    "not JSON": (raw_file('{"a":'), r"the header is not readable \(.*\), expected JSON in UTF-8"),
    "not UTF-8": (raw_file(b'{"\xff":1}'), r"the header is not readable .*, expected JSON"),
    "half a surrogate": (raw_file('{"\\ud800":1}'), r"the header is not readable .*, expected"),
    "nested too deep": (raw_file('{"a":' * 20_000), r"the header is not readable .*, expected"),
    "number too long": (raw_file('{"a":' + "9" * 9_000 + "}"), r"the header is not readable"),
    "duplicate name": (raw_file(TWICE, bytes(8)), r"a: the header holds the name twice, expected"),
    "metadata of numbers": (
        raw_file({"__metadata__": {"epoch": 3}}),
        r"__metadata__ holds more than texts, expected text for text",
    ),
    "entry no object": (raw_file({"a": 3}), r"a: an odd entry in the header, expected dtype"),
    "entry without dtype": (
        raw_file({"a": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        r"a: an odd entry in the header, expected dtype, shape, data_offsets",
    ),
    "unknown dtype": (
        raw_file({"a": entry("F6_E2M3", [4], 0, 3)}, bytes(3)),
        r"a: the dtype is F6_E2M3, expected one that torch",
    ),
    "dtype no text": (
        raw_file({"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        r"a: the dtype is \[\], expected",
    ),
    "negative shape": (
        raw_file({"a": entry("F32", [-2, -1], 0, 8)}, bytes(8)),
        r"a: the shape is \[-2, -1\], expected a list of numbers from 0 up",
    ),
    "shape with true": (
        raw_file({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, bytes(4)),
        r"a: the shape is \[True\], expected",
    ),
    "offsets reversed": (
        raw_file({"a": entry("F32", [2], 8, 0)}, bytes(8)),
        r"a: data_offsets is \[8, 0\], expected a begin and a later end",
    ),
    "three offsets": (
        raw_file({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}, bytes(8)),
        r"a: data_offsets is \[0, 4, 8\], expected",
    ),
    "wrong size": (
        raw_file({"a": entry("F32", [3], 0, 8)}, bytes(8)),
        r"a: 8 bytes of data, expected 12 for F32 \[3\]",
    ),
    "shape overflows": (
        raw_file({"a": entry("F32", [2**62, 4], 0, 0)}),
        r"a: 0 bytes of data, expected 73786976294838206464 for F32",
    ),
    "half a byte": (
        raw_file({"a": entry("F4", [3], 0, 2)}, bytes(2)),
        r"a: shape \[3\] does not fill whole bytes, expected an even last dimension",
    ),
    "overlap": (
        raw_file({"a": entry("F32", [2], 0, 8), "b": entry("F32", [1], 4, 8)}, bytes(8)),
        r"b: begins at byte \d+ and overlaps with a, expected to begin at byte \d+",
    ),
    "hole": (
        raw_file({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}, bytes(12)),
        r"b: begins at byte \d+ and leaves a hole after a, expected to begin at byte \d+",
    ),
    "hole at the start": (
        raw_file({"a": entry("F32", [1], 4, 8)}, bytes(8)),
        r"a: begins at byte \d+ and leaves a hole after the header, expected",
    ),
    "cut off": (
        raw_file(GOOD, bytes(10)),
        r"b: ends at byte \d+, but the file is cut off at byte \d+, expected \d+ bytes",
    ),
    "data missing": (raw_file(GOOD), r"a: ends at byte \d+, but the file is cut off"),
    "bytes behind": (
        raw_file(GOOD, bytes(20)),
        r"the file has \d+ bytes, 8 of them behind b, expected \d+",
    ),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"broken\.safetensors: {message}") as caught:
        open_checkpoint(path)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(("Copy or download the file again.", "Install a newer torch."))


def test_the_table_of_broken_files_can_fail(tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    path.write_bytes(raw_file(GOOD, bytes(12)))
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint.infos) == ["a", "b"]


def test_a_header_longer_than_the_format_allows_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "long.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER + 1))
        file.truncate(MAX_HEADER + 100)
    with pytest.raises(
        CheckpointError, match=f"expected a safetensors header of at most {MAX_HEADER}"
    ):
        open_checkpoint(path)


@given(st.binary(max_size=200))
def test_random_bytes_never_raise_anything_else(content: bytes) -> None:
    file = io.BytesIO(content)
    with pytest.raises(CheckpointError):
        read_header(file, Path("random.safetensors"), len(content))


@given(st.integers(0, 200), st.integers(0, 255))
def test_one_wrong_byte_is_refused_or_harmless(position: int, value: int) -> None:
    content = bytearray(raw_file({"__metadata__": {"format": "pt"}, **GOOD}, bytes(12)))
    content[position % len(content)] = value
    try:
        header = read_header(io.BytesIO(bytes(content)), Path("x.safetensors"), len(content))
    except CheckpointError:
        return
    assert sum(one.end - one.begin for one in header.entries) == 12


def test_the_bytes_of_a_header_are_these() -> None:
    raw, spans = format_header(
        {"b": ("I64", (2,)), "ä": ("F8_E4M3", ())}, {"z": "2", "format": "pt"}
    )
    text = (
        '{"__metadata__":{"format":"pt","z":"2"},'
        '"b":{"dtype":"I64","shape":[2],"data_offsets":[0,16]},'
        '"ä":{"dtype":"F8_E4M3","shape":[],"data_offsets":[16,17]}}'
    ).encode()
    padded = text + b" " * (-len(text) % 8)
    assert raw == struct.pack("<Q", len(padded)) + padded
    assert len(raw) % 8 == 0
    assert spans == {"b": (len(raw), len(raw) + 16), "ä": (len(raw) + 16, len(raw) + 17)}


NAMES = st.text(st.characters(codec="utf-8"), max_size=20).filter(lambda n: n != "__metadata__")
LAYOUTS = st.dictionaries(
    NAMES,
    st.tuples(
        st.sampled_from(["F32", "BF16", "BOOL", "I64"]),
        st.lists(st.integers(0, 4), max_size=4).map(tuple),
    ),
    max_size=6,
)


@given(LAYOUTS, st.dictionaries(NAMES, st.text(st.characters(codec="utf-8"), max_size=9)))
def test_what_is_written_is_read(
    layout: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    raw, spans = format_header(layout, metadata)
    size = max((end for _, end in spans.values()), default=len(raw))
    content = raw.ljust(size, b"\0")
    header = read_header(io.BytesIO(content), Path("x.safetensors"), len(content))
    assert header.metadata == metadata
    assert {one.name: (one.code, one.shape) for one in header.entries} == layout
    assert {one.name: (one.begin, one.end) for one in header.entries} == spans


@pytest.mark.parametrize("metadata", [None, {}])
def test_no_metadata_is_left_out(metadata: dict[str, str] | None) -> None:
    assert b"__metadata__" not in format_header({"a": ("F32", (1,))}, metadata)[0]


def test_a_dtype_without_a_code_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"w: the dtype is torch.qint8, expected one that"):
        code_of("w", torch.qint8)


def test_the_name_of_the_metadata_is_taken() -> None:
    with pytest.raises(CheckpointError, match="safetensors' own, expected another name"):
        format_header({"__metadata__": ("F32", (1,))}, None)
