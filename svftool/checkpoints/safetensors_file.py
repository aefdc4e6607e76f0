"""Reading one safetensors file, one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from svftool.checkpoints.base import TensorInfo
from svftool.checkpoints.dtypes import DTYPE_OF_CODE, torch_shape
from svftool.checkpoints.positions import fill
from svftool.errors import CheckpointError, system_fault
from svftool.files.header import Entry, read_header


class SafetensorsFile:
    """A safetensors file open for reading, its header checked.

    Tensors are read by position into memory of their own, never mapped: a file that is cut off
    while it is read raises an error where a mapping would kill the process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb")
        try:
            header = read_header(self._file, path, os.fstat(self._file.fileno()).st_size)
            infos = [_info(entry, path) for entry in header.entries]
        except BaseException:
            self._file.close()
            raise
        self._spans = {entry.name: (entry.begin, entry.end) for entry in header.entries}
        self.infos: Mapping[str, TensorInfo] = MappingProxyType({info.name: info for info in infos})
        self.metadata = header.metadata
        self.nesting: tuple[str, ...] = ()
        self.notes: tuple[str, ...] = ()
        self.warnings: tuple[str, ...] = ()
        self.passed_over: Mapping[str, int] = {}
        self.tied: tuple[tuple[str, ...], ...] = ()

    def read(self, name: str) -> Tensor:
        """Return one tensor that the caller owns.

        Raises
        ------
        CheckpointError
            If the file has been cut off since it was opened, or cannot be read.
        """
        info = self.infos[name]
        begin, end = self._spans[name]
        # A tensor's memory is aligned for its dtype even where its bytes in the file are not.
        raw = torch.empty(end - begin, dtype=torch.uint8)
        try:
            fill(self._file.fileno(), raw.numpy().data, begin)
        except OSError as error:
            system_fault(error, self.path)
            raise CheckpointError(
                f"{self.path}: {name}: reading failed ({error.strerror or error}), "
                f"expected {end - begin} bytes at byte {begin}. Copy or download the file again."
            ) from error
        return raw.view(info.dtype).reshape(info.shape)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _info(entry: Entry, path: Path) -> TensorInfo:
    """Say what an entry is in torch's terms."""
    dtype = DTYPE_OF_CODE.get(entry.code)
    try:
        shape = torch_shape(entry.code, entry.shape)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: {entry.name}: {error}, expected an even last dimension. "
            "Copy or download the file again."
        ) from None
    if dtype is None:
        raise CheckpointError(
            f"{path}: {entry.name}: the dtype is {entry.code}, expected one that torch "
            f"{torch.__version__} knows. Install a newer torch."
        )
    return TensorInfo(entry.name, dtype, shape, path.name)
