"""What a tuned file that holds more than singular values changes in the weights of its base."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from svftool.auditing.adapters import Change
from svftool.auditing.compare import Tuned
from svftool.auditing.sources import AuditSource
from svftool.checkpoints import to_matrix
from svftool.checkpoints.views import View
from svftool.errors import FactorsError
from svftool.factors import (
    FactorStore,
    LayerFactors,
    SpectralChange,
    TunedFile,
    add_change,
    check_tuned,
)
from svftool.factors.tuned import PROBE_TOLERANCE, in_signs_of, movement, probe
from svftool.numerics import svd


def spectral_changes(base: AuditSource, tuned: TunedFile) -> dict[str, Change]:
    """Return what forms the change of each layer that has entries, scales or a remainder.

    The factors are the base's own where it is a factor checkpoint. Else the layer is decomposed
    again, as ``svftool decompose`` does it.

    Raises
    ------
    FactorsError
        If the file does not belong to the factors.
    """
    store = base.file if isinstance(base.file, FactorStore) else None
    if tuned.parts and store is not None:
        tuned = check_tuned(tuned, store)
    return {name: partial(_formed, store, tuned, name) for name in tuned.parts}


def _formed(store: FactorStore | None, tuned: TunedFile, name: str, weight: Tensor) -> Tuned:
    view: View = "batch" if tuned.S[name].ndim > 1 else "matrix"
    if store is None:
        factors, change = _found(tuned, name, weight, view)
    else:
        factors, change = store.read(name), tuned.change(name)
    zero = torch.zeros(weight.shape, dtype=torch.float64)
    return Tuned(change=add_change(zero, factors, [(1.0, change)], view=view).weight)


def _found(
    tuned: TunedFile, name: str, weight: Tensor, view: View
) -> tuple[LayerFactors, SpectralChange]:
    """Decompose a layer, and read the file's change in the signs of what was found.

    Raises
    ------
    FactorsError
        If the singular vectors that were trained are not found again: some values are equal.
    """
    found = svd(to_matrix(weight.cpu(), view), rank=tuned.S[name].shape[-1])
    mine = probe(name, found.U, found.Vh)
    if tuned.probes[name].mismatch(mine, movement(tuned, name)) > PROBE_TOLERANCE:
        raise FactorsError(
            f"{tuned.path}: the singular vectors of {name!r} are not found again in the base, "
            "expected those that were trained. Inspect it with its factors as the base."
        )
    parts = tuned.parts[name]
    if "index" in parts:
        parts = in_signs_of(tuned, name, mine)
    change = SpectralChange.of_parts(tuned.delta(name), parts)
    # What scales multiply is what was there when they were trained.
    return LayerFactors(found.U, tuned.S_base[name], found.Vh), change
