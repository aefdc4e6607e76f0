"""Build the attached layers of one live parameter and check that they are the parameter's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svftool.attaching.extras import build_extras
from svftool.attaching.layer import EXACT, AttachedLayer, Region, belongs, rounding_of
from svftool.attaching.weight import AttachedWeight, Mode
from svftool.choices.regimes import Spectral
from svftool.choices.singular_values import Band, Parametrisation
from svftool.factors import FactorStore, LayerFactors, LayerRecord


@dataclass(frozen=True)
class BuildOptions:
    """How layers are attached; see `svftool.attach`."""

    parametrisation: Parametrisation = "scale"
    mode: Mode = "auto"
    band: Band = Band()  # noqa: RUF009
    nonnegative: bool = False
    spectral: Spectral = Spectral()  # noqa: RUF009
    seed: int = 0


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
    gradient: Tensor | None = None,
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
    gradient : Tensor or None
        Of the loss over the support set in the parameter.
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
        factors = store.read(name)
        slope = None if gradient is None else region.of(gradient)
        layer = _build_layer(live, record, factors, options, slope)
        if not _same_weight(live, record, factors):
            faults.append(f"{name} (other weights)")
        regions.append(region)
        layers.append(layer)
        named[name] = layer
    weight = AttachedWeight(layers, regions, options.mode) if layers else None
    return Built(weight, named, tuple(faults))


def _build_layer(
    live: Tensor,
    record: LayerRecord,
    factors: LayerFactors,
    options: BuildOptions,
    gradient: Tensor | None,
) -> AttachedLayer:
    extras = build_extras(
        record.name,
        factors,
        options.spectral,
        parametrisation=options.parametrisation,
        seed=options.seed,
        gradient=gradient,
        dtype=torch.float64 if live.dtype == torch.float64 else torch.float32,
    )
    layer = AttachedLayer(
        record.name,
        factors,
        shape=record.shape,
        view=record.view,
        dtype=live.dtype,
        exact=_exact(record) and factors.U.dtype.itemsize >= 4,
        parametrisation=options.parametrisation,
        band=options.band,
        nonnegative=options.nonnegative,
        extras=extras,
        values=options.spectral.values,
    )
    if live.ndim == 4 and live.is_contiguous(memory_format=torch.channels_last):
        # The convolution would rearrange the kernel in every pass.
        layer.to(memory_format=torch.channels_last)
    return layer.to(live.device)


def agrees(live: Tensor, record: LayerRecord, store: FactorStore) -> bool:
    """Whether a live weight of the layer's shape is the one that the factors were computed from."""
    return _same_weight(live, record, store.read(record.name))


def _exact(record: LayerRecord) -> bool:
    """Whether factors may replace the weight."""
    return record.reconstruction_error <= EXACT


def _same_weight(live: Tensor, record: LayerRecord, factors: LayerFactors) -> bool:
    stored = getattr(torch, record.dtype, None)
    return belongs(live, factors, rounding_of(live.dtype, stored))
