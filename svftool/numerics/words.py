"""Stored words of one tensor as a change of another's: byte planes, each compressed by itself."""

from __future__ import annotations

import sys
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Way = Literal["xor", "difference", "whole"]
"""``after ^ before``; ``after - before`` with a sign in every byte, so that small changes of both
signs have zeros above; or the words themselves."""

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.unsignedinteger]

BLOCK = 1 << 17
"""Words that are coded at a time, few enough for a processor's cache; part of the format."""

WIDEST = 8
"""Bytes of the widest words; a wider dtype is taken as several."""

_SAMPLES, _SAMPLE = 4, 1 << 16
_TABLE = np.dtype("<u4")
_BYTE = np.uint8(8)
_PARAMETER = zstd.CompressionParameter
# Planes of weights repeat by accident alone: a match finder that sees little leaves the work to the
# entropy coder, which is smaller and faster here than any higher level.
_COMPRESSION: dict[int, int] = {
    _PARAMETER.compression_level: 1,
    _PARAMETER.min_match: 7,
    _PARAMETER.hash_log: 6,
}
_DECOMPRESSION: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 21}


def as_words(data: Bytes, itemsize: int) -> Words:
    """Return bytes as the words of a dtype; of one wider than `WIDEST`, as several words.

    Parameters
    ----------
    data : ndarray of uint8
        Contiguous.
    itemsize : int
        Bytes of one value.
    """
    return data.view(f"<u{min(itemsize, WIDEST)}")


def best_way(after: Words, before: Words) -> Way:
    """Return the way that makes the smaller file, judged by samples from all of a tensor."""
    starts = np.linspace(0, max(len(after) - _SAMPLE, 0), _SAMPLES).astype(int)
    cuts = [slice(at, at + _SAMPLE) for at in np.unique(starts)]
    sizes: dict[Way, int] = {
        way: sum(len(pack(after[cut], before[cut], way)) for cut in cuts)
        for way in ("difference", "xor")
    }
    return min(sizes, key=lambda way: sizes[way])


def pack(after: Words, before: Words | None, way: Way) -> bytes:
    """Code words, in blocks: a table of the planes' sizes, then the planes.

    A plane of zeros has size 0. One that does not shrink is stored as it is.

    Parameters
    ----------
    after : (n,) ndarray of unsigned integers
    before : (n,) ndarray of the same dtype, or None
        None for ``whole`` alone.
    way : {"xor", "difference", "whole"}

    Examples
    --------
    >>> after, before = np.arange(9, dtype="<u2") + 1, np.arange(9, dtype="<u2")
    >>> data = pack(after, before, "difference")
    >>> out = np.empty(9, "<u2")
    >>> unpack(memoryview(data), before, "difference", out)
    >>> out.tolist()
    [1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    planes: list[bytes] = []
    for at in range(0, len(after), BLOCK):
        cut = slice(at, at + BLOCK)
        words = _coded(after[cut], None if before is None else before[cut], way)
        split = words.view(np.uint8).reshape(-1, words.itemsize)
        planes += [_shrunk(np.ascontiguousarray(split[:, byte])) for byte in range(words.itemsize)]
    table = np.array([len(plane) for plane in planes], _TABLE)
    return b"".join((table.tobytes(), *planes))


def _coded(after: Words, before: Words | None, way: Way) -> Words:
    if before is None:
        return np.ascontiguousarray(after)
    if way == "xor":
        return after ^ before
    bias = _bias(after)
    words: Words = ((after - before) + bias) ^ bias
    return words


def _shrunk(plane: Bytes) -> bytes:
    if not plane.any():
        return b""
    small = zstd.compress(plane.data, options=_COMPRESSION)
    return small if len(small) < len(plane) else plane.tobytes()


def unpack(data: memoryview, before: Words | None, way: Way, out: Words) -> None:
    """Decode what `pack` made; nothing is decompressed whose size is not the one expected.

    Parameters
    ----------
    data : memoryview
    before : (n,) ndarray or None
    way : {"xor", "difference", "whole"}
    out : (n,) ndarray
        Filled; contiguous.

    Raises
    ------
    ValueError
        If the data is not what `pack` makes of so many words.
    """
    sizes = packed_sizes(data, len(out), out.itemsize)
    at = sizes.nbytes
    number = 0
    for start in range(0, len(out), BLOCK):
        block = out[start : start + BLOCK]
        filled = sizes[number : number + block.itemsize].tolist()
        starts = [at + sum(filled[:byte]) for byte in range(block.itemsize)]
        block[:] = 0
        for size, begin in zip(reversed(filled), reversed(starts), strict=True):
            if block.itemsize > 1:
                block <<= _BYTE
            if size:
                plane = _grown(data[begin : begin + size], len(block))
                np.bitwise_or(block, plane, out=block)
        number, at = number + block.itemsize, at + sum(filled)
        if before is not None:
            _undo(block, before[start : start + BLOCK], way)


def packed_sizes(data: memoryview, count: int, itemsize: int) -> npt.NDArray[np.unsignedinteger]:
    """Return the size of every plane, checked against the data.

    Parameters
    ----------
    data : memoryview
        As `pack` makes it.
    count : int
        Words.
    itemsize : int
        Bytes of a word.

    Raises
    ------
    ValueError
        If the data cannot be so many words.
    """
    planes = -(-count // BLOCK) * itemsize
    if len(data) < planes * _TABLE.itemsize:
        raise ValueError(f"{len(data)} bytes, expected a table of {planes} sizes")
    sizes = np.frombuffer(data[: planes * _TABLE.itemsize], _TABLE)
    expected = sizes.nbytes + int(sizes.sum(dtype=np.uint64))
    if expected != len(data):
        raise ValueError(f"{len(data)} bytes, expected {expected} as its table says")
    return sizes


def _grown(data: memoryview, count: int) -> Bytes:
    if len(data) == count:
        return np.frombuffer(data, np.uint8)
    try:
        stated = zstd.get_frame_info(data).decompressed_size
        if stated != count:
            raise ValueError(f"a plane of {stated} bytes, expected {count}")
        reader = zstd.ZstdDecompressor(options=_DECOMPRESSION)
        plane = reader.decompress(data, max_length=count)
    except zstd.ZstdError as error:
        raise ValueError(f"a plane cannot be decompressed ({error})") from None
    if len(plane) != count or not reader.eof or reader.unused_data:
        raise ValueError(f"a plane does not end after {count} bytes")
    return np.frombuffer(plane, np.uint8)


def _undo(words: Words, before: Words, way: Way) -> None:
    words ^= before if way == "xor" else _bias(words)
    if way == "difference":
        words -= _bias(words)
        words += before


def _bias(words: Words) -> Any:
    """Return the word that carries a byte's sign up: 128 in every byte but the highest."""
    return words.dtype.type(int.from_bytes(b"\x80" * (words.itemsize - 1), "little"))
