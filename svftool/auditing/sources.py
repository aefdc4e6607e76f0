"""What can be inspected: dense checkpoints, factor checkpoints, tuned files and adapters."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from torch import Tensor

from svftool.adapters.adapter import Adapter
from svftool.adapters.layout_file import AdapterFile, is_adapter_file
from svftool.adapters.peft import is_lora, open_lora
from svftool.auditing.evidence import Quantised
from svftool.checkpoints import (
    TensorInfo,
    View,
    dtype_named,
    fingerprint_checkpoint,
    open_checkpoint,
)
from svftool.errors import FactorsError, counted
from svftool.factors import (
    FactorStore,
    TunedFile,
    is_factors,
    is_tuned,
    open_factors,
    read_tuned,
    rebuild,
)
from svftool.progress import Progress

Kind = Literal["checkpoint", "factors", "tuned", "lora"]


@dataclass(frozen=True)
class AuditSource:
    """A checkpoint opened for inspection, whatever its form; a context manager.

    Attributes
    ----------
    path : Path
        What was named.
    kind : {"checkpoint", "factors", "tuned", "lora"}
        Its form.
    infos : mapping of str to TensorInfo
        The tensors that `read` gives, in file order.
    read : callable
        Gives a dense tensor by name.
    fingerprint : callable
        Gives the fingerprint of the checkpoint, or of the base of factors and tuned files.
    step : callable
        Gives the distance of neighbouring values of a tensor stored as codes, None of others.
    notes : tuple of str
        What the user should be told.
    views : mapping of str to {"matrix", "batch"}
        Views that a factor checkpoint recorded.
    config : mapping or None
        ``config.json`` beside the weights.
    spectra : callable or None
        Gives the singular values of a name without any decomposition, or None: factor checkpoints
        of full rank have them.
    tuned : TunedFile or None
        Of a tuned file: its layers are known by their singular values alone.
    lora : Adapter or None
        Of an adapter: its layers are known by their change alone.
    warnings : tuple of str
        Those of the notes that say what was left out and may be missed.
    passed_over : mapping of str to int
        Entries of pickles that hold tensors and are not read, with their bytes.
    file : context manager
        What is closed at the end.
    """

    path: Path
    kind: Kind
    infos: Mapping[str, TensorInfo]
    read: Callable[[str], Tensor]
    fingerprint: Callable[[Progress], str]
    step: Callable[[str], Tensor | None] = lambda name: None
    notes: tuple[str, ...] = ()
    views: Mapping[str, View] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    spectra: Callable[[str], Tensor | None] | None = None
    tuned: TunedFile | None = None
    lora: Adapter | None = None
    warnings: tuple[str, ...] = ()
    passed_over: Mapping[str, int] = field(default_factory=dict)
    file: AbstractContextManager[object] = field(default_factory=nullcontext)

    def quantised(self, name: str) -> Quantised | None:
        """Return how far the values of a tensor lie apart, where it is stored as codes."""
        info = self.infos[name]
        step = self.step(name) if info.storage else None
        return None if step is None else Quantised(step.expand(info.shape), info.storage)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.file.__exit__(kind, error, trace)


def open_source(path: str | os.PathLike[str]) -> AuditSource:
    """Open whatever can be inspected.

    Parameters
    ----------
    path : path-like
        A checkpoint in any format, a factor checkpoint, a tuned file, or an adapter in any layout.

    Raises
    ------
    CheckpointError, FactorsError
        If it cannot be read.
    """
    if is_factors(path):
        return _from_factors(open_factors(path))
    if is_lora(path):
        return _from_lora(open_lora(path))
    if is_tuned(path):
        return _from_tuned(read_tuned(path))
    file = open_checkpoint(path)
    if is_adapter_file(file.infos):
        try:
            return _from_lora(AdapterFile(file))
        except BaseException:
            file.close()
            raise

    def fingerprint(progress: Progress) -> str:
        return fingerprint_checkpoint(file, progress=progress)

    return AuditSource(
        file.path,
        "checkpoint",
        file.infos,
        file.read,
        fingerprint,
        file.step,
        notes=file.notes,
        warnings=file.warnings,
        passed_over=file.passed_over,
        config=file.config,
        file=file,
    )


def _from_factors(store: FactorStore) -> AuditSource:
    def read(name: str) -> Tensor:
        layer = store.layers.get(name)
        if layer is None:
            return store.read_whole(name)
        factors = store.read(name)
        dtype = dtype_named(layer.dtype)
        return rebuild(factors, factors.S, shape=layer.shape, dtype=dtype, view=layer.view)

    def spectra(name: str) -> Tensor | None:
        layer = store.layers.get(name)
        return store.read_S(name) if layer is not None and layer.full_rank else None

    truncated = sum(not layer.full_rank for layer in store.layers.values())
    cut = counted(truncated, "layers", "are")
    note = f"{store.path.name}: {cut} truncated; what was cut off counts as changed"
    return AuditSource(
        path=store.path,
        kind="factors",
        infos={name: store.info(name) for name in (*store.layers, *store.whole)},
        read=read,
        fingerprint=lambda progress: store.base_fingerprint,
        notes=(note,) if truncated else (),
        views={layer.name: layer.view for layer in store.layers.values()},
        spectra=spectra,
        file=store,
    )


def _from_lora(lora: Adapter) -> AuditSource:
    infos = {name: lora.info(key) for name, key in lora.whole.items()}

    def fingerprint(progress: Progress) -> str:
        raise FactorsError(f"{lora.path}: an adapter does not record the fingerprint of its base")

    return AuditSource(
        path=lora.path,
        kind="lora",
        infos=infos,
        read=lambda name: lora.read(lora.whole[name]),
        fingerprint=fingerprint,
        notes=lora.notes,
        lora=lora,
        file=lora,
    )


def _from_tuned(tuned: TunedFile) -> AuditSource:
    infos = {
        name: TensorInfo(name, value.dtype, tuple(value.shape), tuned.path.name)
        for name, value in tuned.whole.items()
    }
    return AuditSource(
        path=tuned.path,
        kind="tuned",
        infos=infos,
        read=lambda name: tuned.whole[name],
        fingerprint=lambda progress: tuned.base_fingerprint,
        tuned=tuned,
    )
