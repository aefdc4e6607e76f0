"""Singular values that other tools trained: Transformer-squared's z files, SVDiff's shifts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from svftool.checkpoints import Checkpoint, TensorInfo
from svftool.errors import CheckpointError, FactorsError, NumericalError, counted, shortlist
from svftool.factors.store import FactorStore

_SHIFT = ".delta"
_NUMBERED = "learnable_params_module_list."


@dataclass(frozen=True)
class Values:
    """What such a file makes of a base.

    Attributes
    ----------
    kind : {"z file", "spectral shifts"}
    S : mapping of str to Tensor
        Singular values by layer, float64.
    whole : mapping of str to Tensor
        Vectors, which SVDiff scales as matrices of one row.
    notes : tuple of str
        Sentences for the user.
    """

    kind: str
    S: Mapping[str, Tensor]
    whole: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()


def is_shifts(infos: Mapping[str, TensorInfo]) -> bool:
    """Tell whether a file can hold vectors for singular values: nothing but vectors of numbers."""
    vectors = all(len(info.shape) == 1 and info.dtype.is_floating_point for info in infos.values())
    named = all(name.endswith((_SHIFT, ".weight")) or name.startswith(_NUMBERED) for name in infos)
    return bool(infos) and vectors and named


def tuned_values(file: Checkpoint, store: FactorStore) -> Values:
    """Read trained singular values of a z file or of spectral shifts.

    A z file scales: ``S z sum(S) / sum(S z)`` with ``z = sigmoid(p)`` (2501.06252; the factor that
    z may have cancels). Shifts add: ``relu(S + delta)`` (2303.11305).

    Parameters
    ----------
    file : Checkpoint
    store : FactorStore
        The base's factors, of full rank in these layers.

    Raises
    ------
    CheckpointError
        If vectors are numbered instead of named.
    FactorsError
        If a layer is not in the factors, or has another number of singular values.
    NumericalError
        If a vector is not finite.
    """
    numbered = [name for name in file.infos if name.startswith(_NUMBERED)]
    if numbered:
        raise CheckpointError(
            f"{file.path}: vectors by number ({shortlist(numbered, 2)}), expected names of weights "
            "as learnable_params.pt has them. Give that file."
        )
    shifts = all(name.endswith(_SHIFT) for name in file.infos)
    homes = {name: f"{name.removesuffix(_SHIFT)}.weight" if shifts else name for name in file.infos}
    _check(file, store, homes)
    S, whole = {}, {}
    for name, home in homes.items():
        vector = file.read(name).detach().double()
        if not bool(vector.isfinite().all()):
            raise NumericalError(
                f"{file.path}: {name!r} holds NaN or infinity, expected finite numbers. Train "
                "again."
            )
        if home in store.layers:
            base = store.read_S(home).double()
            S[home] = torch.relu(base + vector) if shifts else _scaled(base, vector)
        else:
            whole[home] = _lengthened(store.read_whole(home), vector)
    return Values("spectral shifts" if shifts else "z file", S, whole)


def _scaled(S: Tensor, p: Tensor) -> Tensor:
    moved = S * torch.sigmoid(p)
    total = moved.sum()
    return torch.mul(moved, S.sum() / total) if float(total) > 0 else moved


def _lengthened(vector: Tensor, shift: Tensor) -> Tensor:
    """Return a vector whose norm, its only singular value, is shifted."""
    norm = vector.double().norm()
    if float(norm) == 0.0:
        return vector
    longer = torch.mul(vector.double(), torch.relu(norm + shift[0]) / norm)
    return longer.to(vector.dtype)


def _check(file: Checkpoint, store: FactorStore, homes: Mapping[str, str]) -> None:
    wrong = list(_misfits(file, store, homes))
    if wrong:
        raise FactorsError(
            f"{file.path}: {counted(len(wrong), 'vectors', 'do', of=len(homes))} not fit the "
            f"factors in {store.path}: {shortlist(wrong, 3)}. Decompose the base that they were "
            "trained on at full rank."
        )


def _misfits(file: Checkpoint, store: FactorStore, homes: Mapping[str, str]) -> Iterable[str]:
    vectors: Collection[str] = store.whole
    for name, home in homes.items():
        count = file.infos[name].shape[0]
        layer = store.layers.get(home)
        if layer is None:
            is_vector = home in vectors and len(store.info(home).shape) == 1
            if not (is_vector and count == 1 and name.endswith(_SHIFT)):
                yield f"{home} (not decomposed)"
        elif (count,) != (layer.rank,) or len(layer.matrix) > 2:
            yield f"{home} ({counted(count, 'values')}, expected {layer.rank})"
