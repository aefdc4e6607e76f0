"""Writing safetensors files with tensors in any order, and checkpoints of one or more shards."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from svftool.checkpoints.base import TensorInfo
from svftool.checkpoints.dtypes import byte_size, code_of, stored_shape
from svftool.checkpoints.sharding import shard_names, write_index
from svftool.errors import ResourceError, counted, shortlist, write_errors
from svftool.files.header import format_header

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

_CHUNK = 1 << 30


class SafetensorsWriter:
    """A safetensors file that is written tensor by tensor, in any order, from any thread.

    The header comes first, so the layout is fixed beforehand; the same layout, metadata and
    tensors give the same bytes. As a context manager it checks completeness only when its block
    ends without an error.

    Parameters
    ----------
    path : Path
        Must not exist.
    layout : mapping of str to (dtype, shape)
        Every tensor that will be written.
    metadata : mapping of str to str, or None
        Beside ``format``, best kept to one key: other writers do not order them.
    keep_order : bool
        Lay the tensors down in the order of `layout`. Otherwise wider dtypes come first, so that
        every tensor is aligned.
    again : bool
        Go on with a file of the same header and size, whatever its tensors hold, instead of
        refusing one that exists; any other file is written anew.

    Raises
    ------
    CheckpointError
        If the format cannot hold a dtype.
    ResourceError
        If the disk has no room for the whole file, or refuses it.
    """

    def __init__(
        self,
        path: Path,
        layout: Layout,
        *,
        metadata: Mapping[str, str] | None = None,
        keep_order: bool = False,
        again: bool = False,
    ) -> None:
        ordered = dict(layout) if keep_order else _aligned(layout)
        stated = {
            name: (code_of(name, dtype), stored_shape(dtype, shape))
            for name, (dtype, shape) in ordered.items()
        }
        header, self._spans = format_header(stated, metadata)
        self.path = path
        self.layout: Layout = ordered
        self._left = set(ordered)
        self._lock = threading.Lock()
        size = len(header) + sum(byte_size(dtype, shape) for dtype, shape in ordered.values())
        self._open = False
        if not (again and self._take_up(header, size)):
            self._create(header, size, anew=again)

    def _take_up(self, header: bytes, size: int) -> bool:
        """Open a file that has this header and size; tell whether there is one."""
        with write_errors(self.path):
            if self.path.is_symlink() or not self.path.is_file():
                return False
            with self.path.open("rb") as file:
                if os.fstat(file.fileno()).st_size != size or file.read(len(header)) != header:
                    return False
            self._file = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
            self._open = True
            return True

    def _create(self, header: bytes, size: int, *, anew: bool) -> None:
        with write_errors(self.path):
            if anew:
                self.path.unlink(missing_ok=True)
            check_room(self.path, size)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._file = os.open(self.path, flags, 0o666)
            self._open = True
            try:
                os.ftruncate(self._file, size)
                self._put(memoryview(header), 0)
            except BaseException:
                self.abort()
                raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor at its place.

        Raises
        ------
        KeyError
            If the layout has no such name.
        ValueError
            If the tensor differs from the layout in dtype or shape, or was written before.
        ResourceError
            If the disk refuses it.
        """
        dtype, shape = self.layout[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"{name}: {tensor.dtype} {tuple(tensor.shape)}, "
                f"expected {dtype} {tuple(shape)} as in the layout"
            )
        with self._lock:
            if name not in self._left:
                raise ValueError(f"{name}: written twice, expected once")
            self._left.remove(name)
        if tensor.numel():
            raw = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
            with write_errors(self.path):
                self._put(raw.reshape(-1).view(torch.uint8).numpy().data, self._spans[name][0])

    def sync(self) -> None:
        """Wait until what was written is on the disk.

        Raises
        ------
        ResourceError
            If the disk refuses it.
        """
        with write_errors(self.path):
            os.fsync(self._file)

    def close(self) -> None:
        """Finish the file.

        Raises
        ------
        ValueError
            If a tensor of the layout was never written.
        ResourceError
            If the disk refuses what was written.
        """
        missing = [name for name in self.layout if name in self._left]
        if missing:
            self.abort()
            raise ValueError(
                f"{self.path}: {shortlist(missing)}: never written, expected all of the layout"
            )
        with write_errors(self.path):
            self.abort()

    def abort(self) -> None:
        """Close the file as it is, complete or not."""
        if self._open:
            self._open = False
            os.close(self._file)

    @contextmanager
    def reopened(self) -> Iterator[None]:
        """Context in which a file that was closed by `abort` is open again, to write more of it."""
        with write_errors(self.path):
            self._file = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
        self._open = True
        try:
            yield
        finally:
            self.abort()

    @property
    def complete(self) -> bool:
        """Whether every tensor of the layout has been handed in."""
        return not self._left

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _put(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._file, data[done : done + _CHUNK], offset + done)


def _aligned(layout: Layout) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return dict(sorted(layout.items(), key=lambda item: -item[1][0].itemsize))


def check_room(path: Path, size: int) -> None:
    """Raise ResourceError now if `size` bytes at `path` would fill the disk later.

    Raises
    ------
    ResourceError
        If the disk has less room, or the folder cannot be looked at.
    """
    with write_errors(path):
        free = shutil.disk_usage(path.parent).free
    if free < size:
        raise ResourceError(
            f"{path}: {free} bytes free on the disk, expected {size}. "
            "Free some space, or choose another disk."
        )


class CheckpointWriter:
    """A checkpoint in a folder: one safetensors file, or shards with their index.

    Parameters
    ----------
    folder : Path
        Exists.
    shards : sequence of sequence of TensorInfo
        What each weight file will hold; see `plan_shards`.
    stem : str
        ``STEM.safetensors``, or ``STEM-00001-of-0000N.safetensors`` with
        ``STEM.safetensors.index.json``.
    metadata : mapping, or sequence of one mapping a shard, or None
        Of the weight files. None stands for ``{"format": "pt"}``, an empty mapping for none.
    index_metadata : mapping, optional
        What the index says beside ``total_size``.
    files : sequence of str, optional
        Names of the weight files, where they are not to follow from `stem`.
    index_file : str, optional
        Name of the index, where it is not to follow from `stem`.
    keep_order : bool
        See `SafetensorsWriter`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        shards: Sequence[Sequence[TensorInfo]],
        stem: str = "model",
        metadata: Mapping[str, str] | Sequence[Mapping[str, str]] | None = None,
        index_metadata: Mapping[str, Any] | None = None,
        files: Sequence[str] | None = None,
        index_file: str | None = None,
        keep_order: bool = False,
    ) -> None:
        self.folder = folder
        self.files = tuple(files or shard_names(stem, len(shards)))
        if len(self.files) != len(shards):
            raise ValueError(f"{len(self.files)} file names for {counted(len(shards), 'shards')}")
        self._index_file = index_file or (
            f"{stem}.safetensors.index.json" if len(shards) > 1 else None
        )
        self._index_metadata = dict(index_metadata or {})
        self._home = {info.name: number for number, shard in enumerate(shards) for info in shard}
        if len(self._home) != sum(map(len, shards)):
            raise ValueError("a tensor name stands in two places of the shards")
        self._size = sum(info.nbytes for shard in shards for info in shard)
        check_room(folder / self.files[0], self._size)
        texts = (
            metadata
            if isinstance(metadata, Sequence)
            else [{"format": "pt"} if metadata is None else metadata] * len(shards)
        )
        self._writers: list[SafetensorsWriter] = []
        try:
            for name, shard, text in zip(self.files, shards, texts, strict=True):
                layout = {info.name: (info.dtype, info.shape) for info in shard}
                writer = SafetensorsWriter(
                    folder / name, layout, metadata=text, keep_order=keep_order
                )
                self._writers.append(writer)
        except BaseException:
            self.abort()
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor at its place, in any order, from any thread.

        Raises
        ------
        KeyError, ValueError, ResourceError
            As `SafetensorsWriter.write` does.
        """
        self._writers[self._home[name]].write(name, tensor)

    def close(self) -> None:
        """Finish all files and write the index.

        Raises
        ------
        ValueError
            If a tensor was never written.
        ResourceError
            If the disk refuses what was written.
        """
        for writer in self._writers:
            writer.close()
        if self._index_file is not None:
            weight_map = {name: self.files[number] for name, number in self._home.items()}
            path = self.folder / self._index_file
            write_index(path, weight_map, total_size=self._size, metadata=self._index_metadata)

    def abort(self) -> None:
        """Close all files as they are; no index is written."""
        for writer in self._writers:
            writer.abort()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()
