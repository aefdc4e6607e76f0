"""The exact delta: a safetensors file that turns one checkpoint into another bit for bit.

Its metadata describe every tensor of the result: what it is made from, how, and its SHA-256. Its
tensors are bytes, those that `svftool.numerics.words.pack` makes, under the names of the result.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from svftool.checkpoints.base import Closing, TensorInfo
from svftool.checkpoints.dtypes import byte_size, dtype_name, dtype_named
from svftool.checkpoints.fingerprint import tensor_digest
from svftool.checkpoints.safetensors_file import SafetensorsFile
from svftool.errors import CheckpointError, MissingDependencyError, ResourceError, brief, shortlist
from svftool.files.header import parse_json
from svftool.files.names import EXACT_KEY, is_plain_name
from svftool.machine import available_memory

try:
    from svftool.numerics.words import BLOCK, WIDEST, as_words, packed_sizes, unpack
except ModuleNotFoundError as error:
    raise MissingDependencyError(
        "backports.zstd", extra="exact", purpose="an exact delta"
    ) from error

VERSION = 1
WAYS = ("same", "xor", "difference", "whole")
"""``same``: as in the base, nothing is stored. Others: see `svftool.numerics.words.Way`."""

_CODEC = f"zstd, byte planes of {BLOCK} words"
_LARGE = 1 << 28
_AGAIN = "Make it again with 'svftool extract BASE TUNED -o DELTA --as exact', or copy it again."


@dataclass(frozen=True)
class ExactEntry:
    """One tensor of the result.

    Attributes
    ----------
    name : str
    dtype : str
        As `dtype_name` gives it.
    shape : tuple of int
    way : {"same", "xor", "difference", "whole"}
    sha256 : str
        As `tensor_digest` gives it.
    origin : str or None
        The tensor of the base that it is made from, of the same dtype and shape; None of ``whole``.
    origin_sha256 : str or None
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    way: str
    sha256: str
    origin: str | None = None
    origin_sha256: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return byte_size(dtype_named(self.dtype), self.shape)


@dataclass(frozen=True)
class ExactFacts:
    """What an exact delta says of itself.

    Attributes
    ----------
    base_fingerprint, tuned_fingerprint : str
        Of all tensors of both sides.
    entries : tuple of ExactEntry
        Every tensor of the result, in its order.
    removed : tuple of str
        Tensors of the base that the result does not have.
    shards : tuple of (str, int)
        Weight files of the result and how many of the entries each holds, in order.
    metadata : tuple of mapping of str to str
        Of each weight file.
    index_file : str or None
        Name of the shard index, where there is one.
    side_files : mapping of str to int
        Files beside the result's weights that the base's folder does not have in this form, and
        that are not in the delta, with their bytes.
    """

    base_fingerprint: str
    tuned_fingerprint: str
    entries: tuple[ExactEntry, ...]
    removed: tuple[str, ...]
    shards: tuple[tuple[str, int], ...]
    metadata: tuple[Mapping[str, str], ...]
    index_file: str | None = None
    side_files: Mapping[str, int] = field(default_factory=dict)

    def to_metadata(self) -> dict[str, str]:
        """Return the metadata of the file."""
        about = {"version": VERSION, "codec": _CODEC, "bytes": self.nbytes}
        text = json.dumps({**about, **asdict(self)}, sort_keys=True)
        return {"format": "pt", EXACT_KEY: text}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the result."""
        return sum(entry.nbytes for entry in self.entries)


class ExactFile(Closing):
    """An exact delta open for reading.

    Parameters
    ----------
    path : Path

    Raises
    ------
    CheckpointError
        If it is none, is cut off, or says what does not hold together.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = SafetensorsFile(path)
        try:
            self.facts = _facts(path, self._file)
        except BaseException:
            self._file.close()
            raise

    def restore(self, entry: ExactEntry, before: Tensor | None) -> Tensor | None:
        """Make one tensor of the result, and hold it against its SHA-256.

        Every way can be undone, so that a base of other bytes gives other bytes: one digest tells
        that both the base and the delta are right.

        Parameters
        ----------
        entry : ExactEntry
        before : Tensor or None
            The tensor of the base; not changed. None of ``whole``.

        Returns
        -------
        Tensor or None
            None where the base is another.

        Raises
        ------
        CheckpointError
            If the file's bytes are not those that were written.
        ResourceError
            If memory cannot hold the tensor.
        """
        try:
            found = self._made(entry, before)
        except ValueError as error:
            raise self._broken(entry, str(error)) from None
        digest = tensor_digest(found)
        if digest == entry.sha256:
            return found
        if before is not None and tensor_digest(before) != entry.origin_sha256:
            return None
        raise self._broken(entry, f"restored with the SHA-256 {digest[:12]}")

    def _made(self, entry: ExactEntry, before: Tensor | None) -> Tensor:
        if entry.way == "same":
            assert before is not None
            return before
        dtype = dtype_named(entry.dtype)
        width = min(dtype.itemsize, WIDEST)
        packed = self._file.read(entry.name).numpy().data
        packed_sizes(packed, entry.nbytes // width, width)
        self._check_memory(entry)
        raw = torch.empty(entry.nbytes, dtype=torch.uint8)
        unpack(
            packed,
            None if before is None else words_of(before),
            entry.way,  # type: ignore[arg-type]
            as_words(raw.numpy(), width),
        )
        return raw.view(dtype).reshape(entry.shape)

    def _check_memory(self, entry: ExactEntry) -> None:
        """Refuse a tensor that memory cannot hold: zeros of any size take next to nothing here."""
        free = available_memory() if entry.nbytes > _LARGE else None
        if free is not None and entry.nbytes > free:
            raise ResourceError(
                f"{self.path}: {entry.name}: {free} bytes of memory free, expected {entry.nbytes} "
                "for the tensor. Use a machine with more."
            )

    def _broken(self, entry: ExactEntry, found: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: {entry.name}: {found}, expected a tensor of {entry.nbytes} bytes with "
            f"the SHA-256 {entry.sha256[:12]}. {_AGAIN}"
        )

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def words_of(tensor: Tensor) -> Any:
    """Return a dense tensor's bytes as words, without a copy where it is contiguous."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return as_words(flat.numpy(), tensor.element_size())


# Reading what a file says, and trusting none of it.


def _facts(path: Path, file: SafetensorsFile) -> ExactFacts:
    if EXACT_KEY not in file.metadata:
        raise CheckpointError(
            f"{path}: no {EXACT_KEY!r} metadata, expected an exact delta of "
            "'svftool extract --as exact'."
        )
    try:
        stated = parse_json(file.metadata[EXACT_KEY])
        if not isinstance(stated, dict):
            raise TypeError(f"a JSON {type(stated).__name__}")  # noqa: TRY301
        if stated.get("version") == VERSION and stated.get("codec") == _CODEC:
            return _checked(_parsed(stated), file.infos, stated["bytes"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: {EXACT_KEY!r} metadata does not hold together "
            f"({brief(str(error), 160)}), expected what 'svftool extract' wrote. {_AGAIN}"
        ) from None
    raise CheckpointError(
        f"{path}: an exact delta of version {brief(stated.get('version'))} "
        f"({brief(stated.get('codec'))}), expected {VERSION} ({_CODEC}). "
        "Use the svftool version that wrote it."
    )


def _parsed(stated: Mapping[str, Any]) -> ExactFacts:
    return ExactFacts(
        base_fingerprint=_text(stated["base_fingerprint"]),
        tuned_fingerprint=_text(stated["tuned_fingerprint"]),
        entries=tuple(_entry(one) for one in _list(stated["entries"])),
        removed=tuple(_text(name) for name in _list(stated["removed"])),
        shards=tuple((_text(name), _count(size)) for name, size in _list(stated["shards"])),
        metadata=tuple(
            {_text(key): _text(value) for key, value in dict(one).items()}
            for one in _list(stated["metadata"])
        ),
        index_file=None if stated["index_file"] is None else _text(stated["index_file"]),
        side_files={_text(key): _count(size) for key, size in dict(stated["side_files"]).items()},
    )


def _entry(stated: Mapping[str, Any]) -> ExactEntry:
    way = stated["way"]
    if way not in WAYS or set(stated) != {one.name for one in fields(ExactEntry)}:
        raise ValueError(f"an odd entry, {brief(stated)}")
    shape = tuple(_count(side) for side in _list(stated["shape"]))
    origin = None if way == "whole" else _text(stated["origin"])
    before = None if way == "whole" else _text(stated["origin_sha256"])
    entry = ExactEntry(
        _text(stated["name"]), _text(stated["dtype"]), shape, way, _text(stated["sha256"]), origin,
        before,
    )  # fmt: skip
    dtype_named(entry.dtype)
    return entry


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{brief(value)}, expected a text")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{brief(value)}, expected a list")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{brief(value)}, expected a number from 0 up")
    return value


def _checked(facts: ExactFacts, infos: Mapping[str, TensorInfo], size: Any) -> ExactFacts:
    """Hold the entries against each other and against the file's tensors."""
    if size != facts.nbytes:
        raise ValueError(f"{brief(size)} bytes, expected {facts.nbytes} as the entries say")
    _check_entries(facts, infos)
    _check_files(facts)
    return facts


def _check_entries(facts: ExactFacts, infos: Mapping[str, TensorInfo]) -> None:
    names = [entry.name for entry in facts.entries]
    stored = [entry.name for entry in facts.entries if entry.way != "same"]
    if len(set(names)) != len(names):
        raise ValueError("a tensor has two entries")
    if set(stored) != set(infos):
        odd = sorted(set(stored) ^ set(infos))
        raise ValueError(f"{shortlist(odd, 3)}: with an entry and no bytes, or the reverse")
    for info in infos.values():
        if info.dtype != torch.uint8 or len(info.shape) != 1:
            raise ValueError(f"{info.name} is {dtype_name(info.dtype)}, expected a row of bytes")
    odd = [e.name for e in facts.entries if e.way == "same" and e.sha256 != e.origin_sha256]
    if odd:
        raise ValueError(f"{shortlist(odd, 3)}: the same as in the base, with another SHA-256")


def _check_files(facts: ExactFacts) -> None:
    """Refuse files that do not add up, and names that lead elsewhere."""
    if sum(count for _, count in facts.shards) != len(facts.entries):
        raise ValueError("the files hold another number of tensors than there are")
    if len(facts.metadata) != len(facts.shards):
        raise ValueError("not every file has its metadata")
    index = facts.index_file
    if index is not None and (not index.endswith(".json") or not is_plain_name(f"{index}.bin")):
        raise ValueError(f"{brief(index)}, expected the plain name of an index")
    files = [name for name, _ in facts.shards]
    if len(set(files)) != len(files) or not all(map(is_plain_name, files)):
        raise ValueError(f"{brief(files)}, expected plain names of weight files, each once")


# Several tensors at a time, in order, and no more than that.

T = TypeVar("T")
R = TypeVar("R")


def in_order(items: Iterable[T], work: Callable[[T], R]) -> Iterator[R]:
    """Yield the results of `work` in order, a few of them made ahead by threads."""
    threads = min(4, os.cpu_count() or 1)
    rest = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        waiting: list[Future[R]] = [pool.submit(work, one) for one in islice(rest, threads)]
        try:
            while waiting:
                yield waiting.pop(0).result()
                waiting += [pool.submit(work, one) for one in islice(rest, 1)]
        finally:
            for one in waiting:
                one.cancel()
