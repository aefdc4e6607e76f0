"""Reading by position into memory of one's own.

Nothing is mapped: a file that is cut off while it is read raises an error where a mapping would end
the process.
"""

from __future__ import annotations

import argparse
import copy
import os
import zipfile
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Linux reads at most this many bytes in one call.
_CHUNK = 1 << 30
_LOCAL_HEADER = 30


def fill(descriptor: int, target: memoryview, offset: int) -> None:
    """Read bytes from `offset` on until `target` is full.

    Raises
    ------
    OSError
        If the file ends before, or the system refuses.
    """
    done = 0
    while done < len(target):
        count = os.preadv(descriptor, [target[done : done + _CHUNK]], offset + done)
        if count == 0:
            raise OSError(f"the file ends at byte {offset + done}")
        done += count


class Records:
    """The storages in a zip archive of torch.

    Parameters
    ----------
    path : Path

    Raises
    ------
    ValueError
        If an entry is compressed, which torch never writes, or the directory is broken.
    OSError
        If it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        try:
            self._sizes = self._find()
        except zipfile.BadZipFile as error:
            self.close()
            raise ValueError(str(error)) from None
        except BaseException:
            self.close()
            raise

    def _find(self) -> dict[int, int]:
        """Return the bytes of each record by the place where they begin."""
        sizes: dict[int, int] = {}
        with zipfile.ZipFile(self._file) as archive:
            entries = archive.infolist()
            self.byteorder = next(
                (archive.read(one) for one in entries if one.filename.endswith("/byteorder")), b""
            )
        for one in entries:
            if one.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"the entry {one.filename[:80]!r} is compressed")
            head = bytearray(_LOCAL_HEADER)
            fill(self._file.fileno(), memoryview(head), one.header_offset)
            extra = int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
            sizes[one.header_offset + _LOCAL_HEADER + extra] = one.file_size
        return sizes

    @staticmethod
    def place(tensor: Tensor) -> int | None:
        """Return where the storage of a tensor that was loaded as ``meta`` lies in the file."""
        return getattr(tensor.untyped_storage(), "_checkpoint_offset", None)

    def holds(self, tensor: Tensor) -> bool:
        """Tell whether a tensor's whole storage is in the file."""
        place = self.place(tensor)
        if place is None:
            return False
        return tensor.untyped_storage().nbytes() <= self._sizes.get(place, -1)

    def read(self, tensor: Tensor) -> Tensor:
        """Return the values of a tensor that was loaded as ``meta``.

        Raises
        ------
        OSError
            If the file has been cut off since it was opened, or cannot be read.
        """
        begin = self.place(tensor)
        assert begin is not None
        width = tensor.element_size()
        raw = torch.empty(extent(tensor) * width, dtype=torch.uint8)
        fill(self._file.fileno(), raw.numpy().data, begin + int(tensor.storage_offset()) * width)
        flat = raw.view(tensor.dtype)
        # A new tensor even where the strides are the usual ones: the caller owns it.
        values = torch.as_strided(flat, tensor.shape, tensor.stride())
        values = values.conj() if tensor.is_conj() else values
        values = torch._neg_view(values) if tensor.is_neg() else values
        return values.resolve_conj().resolve_neg().contiguous()

    def filled(self, tree: Any) -> Any:
        """Return what a pickle holds with values in place of its ``meta`` tensors.

        Tensors of one storage share one again, and what the pickle holds twice is one object again.

        Raises
        ------
        OSError
            If the file has been cut off since it was opened, or cannot be read.
        """
        return _Filler(self).value(tree)

    def storage(self, tensor: Tensor) -> torch.UntypedStorage:
        """Return the whole storage of a tensor that was loaded as ``meta``.

        Raises
        ------
        OSError
            As `read`.
        """
        begin = self.place(tensor)
        if begin is None or not self.holds(tensor):
            raise OSError("the values of a tensor are not in the file")
        raw = torch.empty(tensor.untyped_storage().nbytes(), dtype=torch.uint8)
        fill(self._file.fileno(), raw.numpy().data, begin)
        return raw.untyped_storage()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class _Filler:
    """Walks through what a pickle of torch can hold: dictionaries, lists, tensors, namespaces."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._storages: dict[int | None, torch.UntypedStorage] = {}
        # The old object is kept beside the new one, so that its identity stays taken.
        self._done: dict[int, tuple[Any, Any]] = {}

    def value(self, old: Any) -> Any:
        known = self._done.get(id(old))
        if known is not None:
            return known[1]
        new = self._built(old)
        self._done[id(old)] = old, new
        return new

    def _built(self, old: Any) -> Any:
        if isinstance(old, Tensor):
            return self._tensor(old) if old.device.type == "meta" else old
        if isinstance(old, MutableMapping):
            new = copy.copy(old)
            for key, item in old.items():
                new[key] = self.value(item)
            return new
        if isinstance(old, argparse.Namespace):
            return argparse.Namespace(**{key: self.value(item) for key, item in vars(old).items()})
        if type(old) in (list, tuple, set):
            return type(old)(map(self.value, old))
        return old

    def _tensor(self, old: Tensor) -> Tensor:
        place = Records.place(old)
        if place not in self._storages:
            self._storages[place] = self._records.storage(old)
        new = torch.empty(0, dtype=old.dtype)
        new.set_(self._storages[place], old.storage_offset(), old.shape, old.stride())
        new = new.conj() if old.is_conj() else new
        new = torch._neg_view(new) if old.is_neg() else new
        if isinstance(old, nn.Parameter):
            return nn.Parameter(new, requires_grad=old.requires_grad)
        return new.requires_grad_(old.requires_grad)


def extent(tensor: Tensor) -> int:
    """Return how many elements of its storage a tensor reaches over."""
    if not tensor.numel():
        return 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in steps)
