"""Base factors + a dense fine-tune -> the tuned file that approximates it best."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from svftool.auditing import Source, match_names, open_source
from svftool.auditing.matching import Matching
from svftool.checkpoints import Checkpoint, replace_output, to_matrix
from svftool.errors import CheckpointError
from svftool.factors import (
    FactorStore,
    LayerFactors,
    is_factors,
    open_factors,
    write_tuned,
)
from svftool.progress import SILENT, Progress
from svftool.stages.decompose import decompose


@dataclass(frozen=True)
class LayerExtract:
    """One layer's approximation.

    Attributes
    ----------
    name : str
        Tensor name in the base.
    change : float
        ``||W' - W||_F / ||W||_F``.
    error : float
        ``||W' - W - U diag(S* - S) Vh||_F / ||W' - W||_F``: the share of the change that singular
        values cannot make; 0 where nothing changed.
    """

    name: str
    change: float
    error: float


@dataclass(frozen=True)
class ExtractResult:
    """What `extract` did.

    Attributes
    ----------
    output : Path
        The tuned file.
    layers : tuple of LayerExtract
        In file order.
    error : float
        As `LayerExtract.error`, over all layers together.
    whole : tuple of str
        Tensors that are no layers, changed, and stored whole.
    missing : tuple of str
        Layers that the fine-tune does not have; they stay as the base.
    """

    output: Path
    layers: tuple[LayerExtract, ...]
    error: float
    whole: tuple[str, ...]
    missing: tuple[str, ...]


def extract(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str],
    force: bool = False,
    progress: Progress = SILENT,
) -> ExtractResult:
    """Turn a dense fine-tune into a small tuned file.

    ``S* = diag(U' W' V)`` minimises ``||W' - U diag(S) Vh||_F`` over all singular values, because
    the pairs ``u_i vh_i`` are orthonormal.

    Parameters
    ----------
    base : path-like
        The base, decomposed for the purpose; or its factor checkpoint.
    tuned : path-like
        The dense fine-tune.
    output : path-like
        The tuned file.
    force : bool
        Replace an existing output.
    progress : Progress
        Told how far the work is.

    Returns
    -------
    ExtractResult

    Raises
    ------
    CheckpointError
        If the two have no layer in common.
    """
    target = Path(output)
    with _factors(base, progress) as store, open_source(tuned) as source:
        inputs = [Path(base), Path(tuned)]
        with (
            store.open_base(progress=progress) as checkpoint,
            replace_output(target, force=force, inputs=inputs) as partial,
        ):
            return _extract(store, checkpoint, source, partial, target, progress)


@contextmanager
def _factors(base: str | os.PathLike[str], progress: Progress) -> Iterator[FactorStore]:
    if is_factors(base):
        with open_factors(base) as store:
            yield store
        return
    with tempfile.TemporaryDirectory() as folder:
        decompose(base, Path(folder) / "factors", progress=progress)
        with open_factors(Path(folder) / "factors") as store:
            yield store


def _extract(
    store: FactorStore,
    base: Checkpoint,
    source: Source,
    partial: Path,
    target: Path,
    progress: Progress,
) -> ExtractResult:
    known = {name: store.info(name) for name in (*store.layers, *store.whole)}
    matching = match_names(known, source.infos)
    counterpart = {pair.base: pair.tuned for pair in matching.pairs}
    if not counterpart.keys() & store.layers.keys():
        raise CheckpointError(
            f"{source.path}: no layer in common with {store.path}, expected a fine-tune of its "
            "base. Name the base that it was tuned from."
        )
    S, rows, squares = {}, [], [0.0, 0.0]
    with progress.task("extracting", len(store.layers), unit="layers") as task:
        for name, layer in store.layers.items():
            if name in counterpart:
                change = source.read(counterpart[name]).double() - base.read(name).double()
                S[name], row, sums = _best(name, store.read(name), to_matrix(change, layer.view))
                rows.append(row)
                squares = [one + two for one, two in zip(squares, sums, strict=True)]
            task.advance(detail=name)
    whole = _changed_whole(store, source, counterpart, matching)
    write_tuned(partial, store=store, S=S, whole=whole, task="extract")
    return ExtractResult(
        output=target,
        layers=tuple(rows),
        error=math.sqrt(squares[1] / squares[0]) if squares[0] > 0 else 0.0,
        whole=tuple(whole),
        missing=tuple(name for name in store.layers if name not in counterpart),
    )


def _best(
    name: str, factors: LayerFactors, change: Tensor
) -> tuple[Tensor, LayerExtract, tuple[float, float]]:
    """Find the best singular values; also the squares of the change and of what is left of it."""
    U, S, Vh = factors.U.double(), factors.S.double(), factors.Vh.double()
    delta = torch.einsum("...mk,...mn,...kn->...k", U, change, Vh)
    total = float(change.square().sum())
    rest = float((change - U * delta.unsqueeze(-2) @ Vh).square().sum())
    norm = float(S.norm())
    row = LayerExtract(
        name,
        change=math.sqrt(total) / norm if norm > 0 else 0.0,
        error=math.sqrt(rest / total) if total > 0 else 0.0,
    )
    return S + delta, row, (total, rest)


def _changed_whole(
    store: FactorStore, source: Source, counterpart: dict[str, str], matching: Matching
) -> dict[str, Tensor]:
    """Take along what changed and is no layer, what has another shape, and what is new."""
    whole = {pair.base: source.read(pair.tuned) for pair in matching.misshapen}
    for name in store.whole:
        if name in counterpart:
            value = source.read(counterpart[name])
            if not torch.equal(value, store.read_whole(name)):
                whole[name] = value
    return whole | {name: source.read(name) for name in matching.tuned_only}
