"""What can be inspected: dense checkpoints and factor checkpoints, one weight at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from svftool.checkpoints import (
    TensorInfo,
    View,
    dtype_named,
    fingerprint_checkpoint,
    open_checkpoint,
)
from svftool.factors import FactorStore, is_factors, open_factors, rebuild
from svftool.progress import Progress


@dataclass(frozen=True)
class Source:
    """A checkpoint opened for inspection, whatever its form; a context manager.

    Attributes
    ----------
    path : Path
        What was named.
    kind : {"checkpoint", "factors"}
        Its form.
    infos : mapping of str to TensorInfo
        Its tensors in file order.
    views : mapping of str to {"matrix", "batch"}
        Views that a factor checkpoint recorded.
    notes : tuple of str
        What the user should be told.
    config : mapping or None
        ``config.json`` beside the weights.
    read : callable
        Gives a dense tensor by name.
    fingerprint : callable
        Gives the fingerprint of the checkpoint, or of the base that was decomposed.
    """

    path: Path
    kind: str
    infos: Mapping[str, TensorInfo]
    views: Mapping[str, View]
    notes: tuple[str, ...]
    config: Mapping[str, Any] | None
    read: Callable[[str], Tensor]
    fingerprint: Callable[[Progress], str]
    file: AbstractContextManager[object]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.file.__exit__(kind, error, trace)


def open_source(path: str | os.PathLike[str]) -> Source:
    """Open a dense checkpoint or a factor checkpoint for inspection.

    Raises
    ------
    CheckpointError, FactorsError
        If it cannot be read.
    """
    if is_factors(path):
        return _from_factors(open_factors(path))
    file = open_checkpoint(path)
    notes, config = file.notes, file.config

    def fingerprint(progress: Progress) -> str:
        return fingerprint_checkpoint(file, progress=progress)

    return Source(
        file.path, "checkpoint", file.infos, {}, notes, config, file.read, fingerprint, file
    )


def _from_factors(store: FactorStore) -> Source:

    def read(name: str) -> Tensor:
        layer = store.layers.get(name)
        if layer is None:
            return store.read_whole(name)
        factors = store.read(name)
        dtype = dtype_named(layer.dtype)
        return rebuild(factors, factors.S, shape=layer.shape, dtype=dtype, view=layer.view)

    truncated = sum(not layer.full_rank for layer in store.layers.values())
    return Source(
        path=store.path,
        kind="factors",
        infos={name: store.info(name) for name in (*store.layers, *store.whole)},
        views={layer.name: layer.view for layer in store.layers.values()},
        notes=(f"{store.path.name}: {truncated} layers are truncated",) if truncated else (),
        config=None,
        read=read,
        fingerprint=lambda progress: store.base_fingerprint,
        file=store,
    )
