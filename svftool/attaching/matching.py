"""Place tensors whose names say nothing, by what they hold: the fallback of the name map.

A layer goes where a live parameter of its shape agrees with its factors, a whole tensor where one
holds the same values. Only what is certain is placed: of several equal candidates the one whose
name ends alike, or none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from svftool.attaching.build import agrees
from svftool.attaching.names import NameMap, Placement, own_names
from svftool.factors import FactorStore


def match_by_value(model: nn.Module, store: FactorStore, names: NameMap) -> NameMap:
    """Extend a name map by placements that values decide.

    Parameters
    ----------
    model : nn.Module
        The live model, with the base's weights.
    store : FactorStore
        The factors.
    names : NameMap
        What names decided.
    """
    own = own_names(model)
    live = {
        name: value.detach()
        for name, value in model.state_dict(keep_vars=True).items()
        if name in own
    }
    taken = {placement.live for placement in names.placements.values()}
    free = {name: value for name, value in live.items() if name not in taken}
    placed: dict[str, Placement] = {}
    for name, record in store.layers.items():
        if name not in names.placements:
            fits = [n for n, value in free.items() if tuple(value.shape) == record.shape]
            _place(name, (n for n in fits if agrees(free[n], record, store)), free, placed)
    modules = {_module(name): _module(place.live) for name, place in placed.items()}
    for name in store.whole:
        if name not in names.placements:
            value = store.read_whole(name)
            fits = [n for n, other in free.items() if _equal(other, value)]
            beside = f"{modules.get(_module(name))}.{name.rpartition('.')[2]}"
            _place(name, [beside] if beside in fits else fits, free, placed)
    return replace(names, placements={**names.placements, **placed})


def _place(
    name: str, fits: Iterable[str], free: dict[str, Tensor], placed: dict[str, Placement]
) -> None:
    candidates = list(fits)
    if len(candidates) > 1:
        best = max(_common_end(name, candidate) for candidate in candidates)
        candidates = [c for c in candidates if _common_end(name, c) == best]
    if len(candidates) == 1:
        placed[name] = Placement(candidates[0])
        del free[candidates[0]]


def _common_end(a: str, b: str) -> int:
    pairs = zip(reversed(a), reversed(b), strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _equal(live: Tensor, value: Tensor) -> bool:
    return live.shape == value.shape and torch.equal(live.cpu(), value.to(live.dtype))
