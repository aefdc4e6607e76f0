"""Many changes of one tensor into one, and how they get in each other's way.

Arrays in, arrays out: a stack of changes (T, m, n) becomes one change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from svftool.choices.merging import MergeSpec
from svftool.merging.combined import Combined, Known, Triplets
from svftool.merging.elementwise import (
    average,
    breadcrumbs,
    consensus_ta,
    dare_linear,
    dare_ties,
    linear,
    model_stock,
    slerp,
    ties,
)
from svftool.merging.interference import (
    Clash,
    Inputs,
    PairClash,
    clash_of,
    mean_clash,
    mean_pairs,
)
from svftool.merging.spectral import iso_c, iso_cts, knots_ties, svc, tsv
from svftool.numerics import ThreadPool

__all__ = [
    "Clash",
    "Combined",
    "Inputs",
    "Known",
    "PairClash",
    "Triplets",
    "average",
    "breadcrumbs",
    "clash_of",
    "combine_deltas",
    "consensus_ta",
    "dare_linear",
    "dare_ties",
    "iso_c",
    "iso_cts",
    "knots_ties",
    "linear",
    "mean_clash",
    "mean_pairs",
    "model_stock",
    "slerp",
    "svc",
    "ties",
    "tsv",
]

_ENTRIES: Mapping[str, Callable[..., Combined]] = {
    "linear": linear,
    "slerp": slerp,
    "ties": ties,
    "dare-linear": dare_linear,
    "dare-ties": dare_ties,
    "breadcrumbs": breadcrumbs,
    "model-stock": model_stock,
    "consensus-ta": consensus_ta,
}
_MATRICES: Mapping[str, Callable[..., Combined]] = {
    "tsv": tsv,
    "iso-c": iso_c,
    "iso-cts": iso_cts,
    "knots-ties": knots_ties,
    "svc": svc,
}
_NAMES = {"lambda": "threshold"}
_WHOLE = ("seed", "agree")


def combine_deltas(deltas: Tensor, spec: MergeSpec, pool: ThreadPool) -> Combined:
    """Make one change of many by a method, its scale included.

    Parameters
    ----------
    deltas : (T, m, n) Tensor
        Finite, none of them zero, each multiplied by its weight; of any shape for methods that look
        at entries.
    spec : MergeSpec
    pool : ThreadPool
    """
    given: dict[str, Any] = {
        _NAMES.get(name, name): int(value) if name in _WHOLE else value
        for name, value in spec.values.items()
        if name != "scale"
    }
    if spec.name in _MATRICES:
        found = _MATRICES[spec.name](deltas, **given, pool=pool)
    else:
        found = _ENTRIES[spec.name](deltas, **given)
    return found if spec.scale == 1.0 else _scaled(found, spec.scale)


def _scaled(found: Combined, scale: float) -> Combined:
    return Combined(
        found.delta * scale,
        partial(_part, found, scale),
        None if found.share is None else scale * found.share,
        None if found.known is None or scale == 0.0 else found.known.times(scale),
    )


def _part(found: Combined, scale: float, index: int) -> Tensor:
    return found.part(index) * scale
