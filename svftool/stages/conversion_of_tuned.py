"""What converting a tuned file writes: singular values as products of two matrices."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from svftool.adapters.low_rank import LowRank, Truncated, along, resized
from svftool.adapters.parts import BaseModel
from svftool.adapters.writers import Entries, LayoutWriter, layout_writer
from svftool.checkpoints import TensorInfo
from svftool.checkpoints.dtypes import dtype_named
from svftool.choices.adapters import AdapterRank
from svftool.errors import CheckpointError, UsageError
from svftool.factors import (
    FactorStore,
    LayerFactors,
    SpectralChange,
    TunedFile,
    is_factors,
    open_factors,
)
from svftool.progress import Progress
from svftool.stages.adapter_names import names_for
from svftool.stages.conversion import ConvertOptions, Layer, Work, plain_ranks, sides_of
from svftool.stages.extract_lora import LeftOut


def factors_of(source: str | os.PathLike[str], options: ConvertOptions) -> FactorStore:
    """Open the factors that were given as the base.

    Raises
    ------
    UsageError
        If none were given.
    """
    if options.base is None or not is_factors(options.base):
        found = "no --base" if options.base is None else f"--base {options.base}"
        raise UsageError(
            f"{source}: {found}, expected the factors that its singular values belong to. Give the "
            "folder of 'svftool decompose' with --base."
        )
    return open_factors(options.base)


def of_tuned(
    tuned: TunedFile,
    store: FactorStore,
    options: ConvertOptions,
    rank: AdapterRank | None,
    progress: Progress,
) -> Work:
    """Say what an adapter of a tuned file holds.

    Raises
    ------
    CheckpointError
        If the tuned file changes nothing.
    """
    layout = options.layout or "peft"
    model = _model_of(tuned, store)
    changed = [name for name in tuned.S if tuned.change(name).moves()] + list(tuned.whole)
    renamed = names_for(layout, model.infos, None, store.path, changed, progress)
    writer = layout_writer(layout)(replace(model, renamed=renamed), changed)
    dtype = dtype_named(options.dtype or "float32")
    dropped = {name: reason for name in writer.fates if (reason := _why_not(tuned, writer, name))}
    kept = {
        kind: [n for n, f in writer.fates.items() if f.kind == kind]
        for kind in ("low rank", "whole")
    }
    layers = [
        Layer(name, sides_of(model.infos[name].shape), _count(tuned, store, name), _nothing, name)
        for name in kept["low rank"]
        if name not in dropped
    ]
    whole = tuple(name for name in kept["whole"] if name not in dropped)
    if not layers and not whole:
        raise CheckpointError(
            f"{tuned.path}: nothing differs from the base that the {layout} layout can hold, "
            "expected a change. Name another tuned file, or choose another --layout."
        )

    def cut(name: str) -> Truncated:
        factors, change = store.read(name), tuned.change(name)
        if change.plain:
            return along(name, factors.U, change.delta, factors.Vh, rank, dtype=dtype)
        full = AdapterRank("count", _count(tuned, store, name))
        return resized(_product(name, change, factors), rank or full, dtype=dtype)

    def rest() -> Iterator[Entries]:
        for name in (*whole, *writer.companions):
            yield writer.whole(name, *_before_and_after(tuned, store, name, layout), dtype)

    return Work(
        kind="tuned file",
        layout=layout,
        is_folder=writer.is_folder,
        layers=layers,
        scaled=lambda name: writer.has_scale,
        entries=writer.entries,
        rest=rest,
        metadata=lambda made, about: writer.metadata(plain_ranks(made), about),
        config=lambda made: writer.config(plain_ranks(made)),
        weights_file=writer.weights_file if writer.is_folder else None,
        dtype=dtype,
        whole=whole,
        dropped=[LeftOut(n, reason, model.infos[n].nbytes) for n, reason in dropped.items()],
        lost=sum(_square(tuned, store, name) for name in dropped if name in tuned.S),
        cut=cut,
    )


def _model_of(tuned: TunedFile, store: FactorStore) -> BaseModel:
    infos = {name: store.info(name) for name in (*store.layers, *store.whole)}
    for name, value in tuned.whole.items():
        infos[name] = TensorInfo(name, value.dtype, tuple(value.shape), "")
    return BaseModel(infos, {}, store.config.base.place)


def _why_not(tuned: TunedFile, writer: LayoutWriter, name: str) -> str:
    """Say why a layout holds nothing of a tensor; empty where it does."""
    fate = writer.fates[name]
    if fate.kind == "dropped":
        return fate.reason
    if fate.kind == "whole" and name in tuned.S:
        return f"no layer of the {writer.name} layout"
    if fate.kind == "low rank" and name not in tuned.S:
        return "a matrix that is stored whole"
    return "a stack of matrices" if name in tuned.S and tuned.S[name].ndim > 1 else ""


def _count(tuned: TunedFile, store: FactorStore, name: str) -> int:
    """Return the rank that a layer's change has at most."""
    change = tuned.change(name)
    if change.plain:
        return int((change.delta != 0).sum())
    m, n = store.layers[name].matrix[-2:]
    k = change.delta.shape[-1]
    most = min(m, n)
    if change.linear:
        touched = change.delta != 0
        if change.index is not None:
            touched = touched.scatter(-1, change.index // k, True)
        most = int(touched.sum())
    beside = 0 if change.B is None else change.B.shape[-1]
    return min(m, n, most + beside)


def _product(name: str, change: SpectralChange, factors: LayerFactors) -> LowRank:
    """Return a layer's change as two thin matrices, in float64."""
    U, S, Vh = (one.double() for one in (factors.U, factors.S, factors.Vh))
    return LowRank(name, *change.to(U).product(U, S, Vh))


def _square(tuned: TunedFile, store: FactorStore, name: str) -> float:
    """Return the square of the norm of a layer's change."""
    change, factors = tuned.change(name), store.read(name)
    if change.plain:
        return float(change.delta.norm()) ** 2
    thin = _product(name, change, factors)
    return float(torch.linalg.matrix_norm(thin.B @ thin.A).square().sum())


def _before_and_after(
    tuned: TunedFile, store: FactorStore, name: str, layout: str
) -> tuple[Tensor, Tensor]:
    """Return what is stored whole, before and after training."""
    value = tuned.whole.get(name)
    start = store.read_whole(name) if name in store.whole else None
    comparable = start is not None and (value is None or start.shape == value.shape)
    if layout != "peft" and not comparable:
        raise CheckpointError(
            f"{tuned.path}: {name!r}: the {layout} layout holds differences, and the base has no "
            "such tensor of this shape, expected it. Use --layout peft."
        )
    after = start if value is None else value
    assert after is not None
    return (after if start is None else start), after


def _nothing() -> LowRank:
    """Stand for a layer of a tuned file, which is cut by its singular values."""
    return LowRank("", torch.empty(0, 0), torch.empty(0, 0))
