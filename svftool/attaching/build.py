"""Build the attached layers of one live parameter and check that they are the parameter's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svftool.attaching.layer import AttachedLayer, AttachedWeight, Mode, Region
from svftool.attaching.parametrisation import Band, Parametrisation
from svftool.factors import FactorStore, LayerRecord

EXACT = 1e-5
"""Largest reconstruction error, relative to the weight, of factors that may replace the weight."""

_SINGLE, _HALF = 1e-3, 5e-2
"""How far a projection of the live weight may be from the factors': rounding, no other weight."""


@dataclass(frozen=True)
class BuildOptions:
    """How layers are attached; see `svftool.attach`."""

    parametrisation: Parametrisation = "scale"
    mode: Mode = "auto"
    band: Band = Band()  # noqa: RUF009
    nonnegative: bool = False


@dataclass(frozen=True)
class Built:
    """What `build_weight` made.

    Attributes
    ----------
    weight : AttachedWeight or None
        None where nothing fits.
    layers : mapping of str to AttachedLayer
        By tensor name; names of the same region share a layer.
    faults : tuple of str
        Each layer that does not fit, with the reason.
    """

    weight: AttachedWeight | None
    layers: dict[str, AttachedLayer]
    faults: tuple[str, ...]


def build_weight(
    parameter: Tensor,
    parts: Sequence[tuple[str, Region]],
    store: FactorStore,
    options: BuildOptions,
) -> Built:
    """Build the attached weight of one live parameter.

    Parameters
    ----------
    parameter : Tensor
        The live parameter.
    parts : sequence of (str, Region)
        The tensors of the file that lie in it.
    store : FactorStore
        Where their factors are.
    options : BuildOptions
        How they are attached.
    """
    regions: list[Region] = []
    layers: list[AttachedLayer] = []
    named: dict[str, AttachedLayer] = {}
    faults = []
    for name, region in parts:
        if region in regions:
            named[name] = layers[regions.index(region)]
            continue
        live, record = region.of(parameter.detach()), store.layers[name]
        if tuple(live.shape) != record.shape:
            faults.append(f"{name} (shape {tuple(live.shape)}, expected {record.shape})")
            continue
        layer = _build_layer(live, record, store, options)
        if not _agrees(live, layer):
            faults.append(f"{name} (other weights)")
        regions.append(region)
        layers.append(layer)
        named[name] = layer
    weight = AttachedWeight(layers, regions, options.mode) if layers else None
    return Built(weight, named, tuple(faults))


def _build_layer(
    live: Tensor, record: LayerRecord, store: FactorStore, options: BuildOptions
) -> AttachedLayer:
    factors = store.read(record.name)
    exact = record.reconstruction_error <= EXACT and factors.U.dtype.itemsize >= 4
    layer = AttachedLayer(
        record.name,
        factors,
        shape=record.shape,
        view=record.view,
        dtype=live.dtype,
        exact=exact,
        parametrisation=options.parametrisation,
        band=options.band,
        nonnegative=options.nonnegative,
    )
    return layer.to(live.device)


def _agrees(live: Tensor, layer: AttachedLayer) -> bool:
    """Compare ``U' W h`` with ``S Vh h`` for a fixed random vector h: equal at any rank."""
    factors = layer.factors()
    U, Vh = factors.U.float(), factors.Vh.float()
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(Vh.shape[-1], 1, generator=generator).to(live.device)
    matrix = live.reshape(*U.shape[:-1], Vh.shape[-1]).float()
    found = (U.mT @ (matrix @ h)).squeeze(-1)
    expected = factors.S.float() * (Vh @ h).squeeze(-1)
    scale = factors.S.float().norm(dim=-1)
    rounded = live.dtype.itemsize < 4 or not layer.exact
    tolerance = (_HALF if rounded else _SINGLE) * scale
    return bool(((found - expected).norm(dim=-1) <= tolerance).all())
