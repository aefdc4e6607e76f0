"""Base factors + a dense fine-tune -> the tuned file that approximates it best."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from svftool.auditing import AuditSource, Counterparts, counterparts, open_source
from svftool.checkpoints import replace_output, to_matrix
from svftool.errors import CheckpointError, FactorsError, UsageError
from svftool.factors import (
    FactorStore,
    LayerFactors,
    is_factors,
    is_tuned,
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
        The dense fine-tune, or a PEFT LoRA folder.
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
    UsageError
        If the fine-tune is a tuned file already.
    """
    target = Path(output)
    if is_tuned(tuned):
        raise UsageError(
            f"{tuned}: a tuned file already, expected a dense fine-tune or a LoRA folder"
        )
    with ExitStack() as stack:
        store = stack.enter_context(_factors(base, progress))
        before = stack.enter_context(_weights(base, store, progress))
        after = stack.enter_context(open_source(tuned))
        for warning in dict.fromkeys((*before.warnings, *after.warnings)):
            progress.warn(warning)
        inputs = [Path(base), Path(tuned)]
        with replace_output(target, force=force, inputs=inputs) as partial:
            return _extract(store, before, after, partial, target, progress)


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


def _weights(base: str | os.PathLike[str], store: FactorStore, progress: Progress) -> AuditSource:
    """Open the base's own weights; where they are gone, the factors make them up to rounding."""
    if not is_factors(base):
        return open_source(base)
    try:
        store.open_base(progress=progress).close()
    except (FactorsError, CheckpointError) as error:
        progress.note(f"changes are measured from the factors, not from the base ({error})")
        return open_source(base)
    place = store.config.base
    return open_source(place.place if place.hub else Path(base) / place.place)


def _extract(
    store: FactorStore,
    before: AuditSource,
    after: AuditSource,
    partial: Path,
    target: Path,
    progress: Progress,
) -> ExtractResult:
    side = counterparts(before, after, progress)
    found = [name for name in store.layers if name in side.names]
    if not any(side.holds(name) for name in found):
        raise CheckpointError(
            f"{after.path}: no layer in common with {store.path}, expected a fine-tune of its "
            "base. Name the base that it was tuned from."
        )
    S, rows, squares = {}, [], [0.0, 0.0]
    with progress.task("extracting", len(store.layers), unit="layers") as task:
        for name in found:
            change = _change(before, side, name)
            S[name], row, sums = _best(
                name, store.read(name), to_matrix(change, store.layers[name].view)
            )
            rows.append(row)
            squares = [one + two for one, two in zip(squares, sums, strict=True)]
            task.advance(detail=name)
    whole = _changed_whole(store, before, side)
    write_tuned(partial, store=store, S=S, whole=whole, task="extract")
    return ExtractResult(
        output=target,
        layers=tuple(rows),
        error=math.sqrt(squares[1] / squares[0]) if squares[0] > 0 else 0.0,
        whole=tuple(whole),
        missing=tuple(name for name in store.layers if name not in S),
    )


def _change(before: AuditSource, side: Counterparts, name: str) -> Tensor:
    weight = before.read(name)
    found = side.read(name, weight)
    if found is None:
        return torch.zeros(weight.shape, dtype=torch.float64)
    change = found.whole_change
    if change is not None:
        return change
    assert found.weight is not None
    return torch.sub(found.weight.double(), weight.double())


def _best(
    name: str, factors: LayerFactors, change: Tensor
) -> tuple[Tensor, LayerExtract, tuple[float, float]]:
    """Find the best singular values; also the squares of the change and of what is left of it.

    ``S* = S + diag(U' D V)`` needs the change only, so an equal weight keeps its S to the last bit,
    and truncated factors lose nothing.
    """
    U, S, Vh = factors.U.double(), factors.S.double(), factors.Vh.double()
    delta = torch.einsum("...mk,...mk->...k", U, change @ Vh.mT)
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
    store: FactorStore, before: AuditSource, side: Counterparts
) -> dict[str, Tensor]:
    """Take along what changed and is no layer, what has another shape, and what is new."""
    whole = {name: side.source.read(other) for name, other in side.misshapen.items()}
    for name in side.names:
        if name in store.layers or not side.holds(name):
            continue
        weight = before.read(name)
        found = side.read(name, weight)
        assert found is not None
        value = found.weight
        if value is None:
            change = found.whole_change
            assert change is not None
            value = (weight.double() + change).to(weight.dtype)
        if not torch.equal(value, weight):
            whole[name] = value
    added = {one.name for one in side.tuned_only} & set(side.source.infos)
    added -= set(side.misshapen.values())
    return whole | {name: side.source.read(name) for name in sorted(added)}
