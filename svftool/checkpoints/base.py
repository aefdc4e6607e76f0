"""A checkpoint open for reading: what it holds, where, and one tensor at a time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Literal, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from svftool.checkpoints.dtypes import byte_size
from svftool.errors import counted, shortlist
from svftool.files.folder import Place
from svftool.files.side_files import side_files
from svftool.progress import Progress

# Things that are open and must be closed.


class Closing(ABC):
    """A context manager that is closed at the end, whatever happened."""

    @abstractmethod
    def close(self) -> None:
        """Close the files."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


Format = Literal["safetensors", "pickle", "gguf"]
Layout = Literal["dense", "sparse", "quantised"]


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it.

    Attributes
    ----------
    name : str
        As in the file.
    dtype : torch.dtype
    shape : tuple of int
    file : str
        Name of the weight file that holds it, without folder.
    layout : {"dense", "sparse", "quantised"}
        How pickles may hold a tensor; always ``dense`` in safetensors.
    storage : str
        The format whose codes stand for the numbers; empty where they are stored as they are.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    layout: Layout = "dense"
    storage: str = ""

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the values, stored densely."""
        return byte_size(self.dtype, self.shape)


@dataclass(frozen=True)
class Shard:
    """One weight file of a checkpoint: its name, its tensors in file order, its own metadata."""

    file: str
    names: tuple[str, ...]
    metadata: Mapping[str, str]


class WeightFile(Protocol):
    """One weight file open for reading, whatever its format."""

    path: Path
    infos: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    nesting: tuple[str, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    passed_over: Mapping[str, int]
    tied: tuple[tuple[str, ...], ...]

    def read(self, name: str) -> Tensor:
        """Return one tensor that the caller owns."""

    def close(self) -> None:
        """Give the file back; reading is over."""


@runtime_checkable
class Stepped(Protocol):
    """A weight file that knows how far the values of its quantised tensors lie apart."""

    def step(self, name: str) -> Tensor | None:
        """Return the distance of neighbouring values of a tensor, None where none was quantised."""


class Checkpoint(Closing):
    """A checkpoint open for reading; a context manager. Made by `open_checkpoint`.

    Attributes
    ----------
    path : Path
        The file or folder that was opened.
    is_folder : bool
    format : {"safetensors", "pickle", "gguf"}
    infos : mapping of str to TensorInfo
        In file order, shard after shard; names exactly as in the files.
    shards : tuple of Shard
    index_file : str or None
        Name of the shard index, where there is one.
    index_metadata : mapping
        The index's own metadata (``total_size`` and what else it holds).
    metadata : mapping of str to str
        Metadata of the first shard.
    prefix : str
        Wrapper that every name starts with, such as ``module.``; empty where there is none.
    nesting : tuple of str
        Dictionary keys under which a pickle holds its tensors, outermost first.
    tied : tuple of tuple of str
        Groups of names that share one storage (pickles only).
    notes : tuple of str
        Sentences for the user: what was chosen, found, or costs memory; warnings among them.
    warnings : tuple of str
        Those that say what was left out and may be missed.
    passed_over : mapping of str to int
        Entries of pickles that hold tensors and are not read, and second copies of tensors in
        other shards, with their bytes.
    hidden : tuple of str
        Tensors of the files that are parts of others: codes, scales, tables.
    config : mapping or None
        ``config.json`` beside the weights, unread by anything here.
    hub_id : str or None
        Repository on the hub, where the checkpoint came from there.
    """

    def __init__(self, place: Place, files: Sequence[WeightFile], *, format: Format) -> None:  # noqa: A002
        self.path = place.path
        self.is_folder = place.path.is_dir()
        self.format: Format = format
        self.files = tuple(files)
        self.index_file = place.index_file
        self.index_metadata = place.index_metadata
        self.config = place.config
        self.hub_id = place.hub_id
        self.metadata: Mapping[str, str] = files[0].metadata if files else {}
        self.hidden: tuple[str, ...] = ()
        self._home: dict[str, WeightFile] = {}
        self.shards = tuple(self._adopt(file, place.weight_map) for file in files)
        self.infos: Mapping[str, TensorInfo] = MappingProxyType(
            {name: self._home[name].infos[name] for shard in self.shards for name in shard.names}
        )
        self.prefix = wrapper_prefix(self.infos)
        self.nesting = files[0].nesting if files else ()
        self.tied = tuple(group for file in files for group in file.tied)
        again = {file.path.name: self._again(file) for file in files}
        self.warnings = (
            *(text for file in files for text in file.warnings),
            *(_say_again(file, named) for file, named in again.items() if named),
        )
        self.notes = tuple(dict.fromkeys((*self._notes(place, files), *self.warnings)))
        self.passed_over: Mapping[str, int] = {
            **{key: size for file in files for key, size in file.passed_over.items()},
            **{
                f"{name} in {file}": size
                for file, named in again.items()
                for name, size in named.items()
            },
        }

    def read(self, name: str) -> Tensor:
        """Return one tensor, which the caller owns. Safe to call from several threads.

        Parameters
        ----------
        name : str
            As in `infos`.

        Returns
        -------
        Tensor
            On the CPU, contiguous, with the dtype and shape of the file.

        Raises
        ------
        KeyError
            If the checkpoint has no tensor of that name.
        CheckpointError
            If the file changed or became unreadable since it was opened.
        """
        return self._home[name].read(name)

    def step(self, name: str) -> Tensor | None:
        """Return the distance of neighbouring values of a quantised tensor, None of others.

        Parameters
        ----------
        name : str
            As in `infos`.

        Returns
        -------
        Tensor or None
            Broadcasts to what `read` returns.
        """
        file = self._home[name]
        return file.step(name) if isinstance(file, Stepped) else None

    @property
    def own_files(self) -> tuple[str, ...]:
        """Names of its weight files and its index."""
        index = () if self.index_file is None else (self.index_file,)
        return (*(shard.file for shard in self.shards), *index)

    def dropped(self) -> dict[str, int]:
        """Return what is not taken over where its folder is copied, with its bytes.

        These are entries of pickles that hold tensors and are not read, and files beside the
        weights.
        """
        found = dict(self.passed_over)
        if self.is_folder:
            found |= side_files(self.path, weights=self.own_files).left
        return found

    def tell(self, progress: Progress) -> None:
        """Say the notes, and warn of what may be missed."""
        for note in dict.fromkeys(self.notes):
            if note in self.warnings:
                progress.warn(note)
            else:
                progress.note(note)

    def live_name(self, name: str, known: Collection[str]) -> str:
        """Return what a live model calls a tensor: its name without wrappers.

        Parameters
        ----------
        name : str
            As in `infos`.
        known : collection of str
            Names of the model; a wrapper that the model has too stays.
        """
        short = name.removeprefix(self.prefix)
        plain = plain_name(name)
        return plain if short not in known and plain in known else short

    def close(self) -> None:
        """Close all files; the checkpoint cannot be read any more."""
        for file in self.files:
            file.close()

    def __repr__(self) -> str:
        return (
            f"Checkpoint({str(self.path)!r}, {self.format}, {counted(len(self.infos), 'tensors')})"
        )

    def _adopt(self, file: WeightFile, weight_map: Mapping[str, str] | None) -> Shard:
        """Take in the tensors of one file; one that several hold is where the index says."""
        assigned = weight_map or {}
        names = [
            name for name in file.infos if assigned.get(name, file.path.name) == file.path.name
        ]
        names = [name for name in names if name not in self._home]
        self._home.update(dict.fromkeys(names, file))
        return Shard(file.path.name, tuple(names), file.metadata)

    def _again(self, file: WeightFile) -> dict[str, int]:
        """Return tensors of a file that are read from another one, with their bytes."""
        return {
            name: info.nbytes for name, info in file.infos.items() if self._home[name] is not file
        }

    def _notes(self, place: Place, files: Sequence[WeightFile]) -> Iterator[str]:
        yield from place.notes
        for file in files:
            yield from file.notes
        if place.weight_map is not None and len(self.infos) > len(place.weight_map):
            extra = counted(len(self.infos) - len(place.weight_map), "tensors")
            yield f"{place.index_file}: {extra} of the shards not in the index; kept"
        if self.prefix:
            yield f"{self.path.name}: every tensor name starts with {self.prefix!r}; names are kept"


def _say_again(file: str, named: Mapping[str, int]) -> str:
    # Loaders differ: transformers takes what the last shard holds, whatever the index says.
    return (
        f"{file}: {counted(len(named), 'tensors', 'were')} not read here, as another shard holds "
        f"{'it' if len(named) == 1 else 'them'} too ({shortlist(named, 3)})"
    )


WRAPPERS = frozenset(("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"))
"""Parts that data parallel, compiled, checkpointed and sharded modules put into names."""

_WRAPPERS = ("module.", "_orig_mod.")


def plain_name(name: str) -> str:
    """Return a name without the parts that wrappers put into it.

    Examples
    --------
    >>> plain_name("module.layers.0._orig_mod.fc1.weight")
    'layers.0.fc1.weight'
    """
    parts = name.split(".")
    kept = [part for part in parts[:-1] if part not in WRAPPERS]
    return ".".join((*kept, parts[-1]))


def wrapper_prefix(names: Mapping[str, object] | Sequence[str]) -> str:
    """Return what wrappers (data parallel, compiled modules) put before every name, or ``""``.

    Examples
    --------
    >>> wrapper_prefix(["module.conv.weight", "module.fc.bias"])
    'module.'
    >>> wrapper_prefix(["module.conv.weight", "fc.bias"])
    ''
    """
    prefix = ""
    while names:
        longer = [prefix + wrapper for wrapper in _WRAPPERS]
        found = next((one for one in longer if all(name.startswith(one) for name in names)), None)
        if found is None:
            break
        prefix = found
    return prefix
