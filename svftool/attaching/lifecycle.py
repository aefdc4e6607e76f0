"""Attach trainable singular values to a live model, and take them off again."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Sequence
from typing import get_args

import torch
from torch import nn

from svftool.attaching.attachment import KEY, Attachment, find_attachment, require_attachment
from svftool.attaching.build import BuildOptions, build_weight
from svftool.attaching.install import install, uninstall
from svftool.attaching.matching import match_by_value
from svftool.attaching.names import NameMap, map_names, own_names
from svftool.attaching.offload import offload
from svftool.attaching.parametrisation import Parametrisation, check_parametrisation, parse_band
from svftool.attaching.region import Region
from svftool.attaching.ways import runs_without_base
from svftool.attaching.weight import Mode
from svftool.checkpoints import matches
from svftool.errors import FactorsError, ModelError, ResourceError, UsageError, shortlist
from svftool.factors import FactorStore, open_factors

logger = logging.getLogger(__name__)


def attach(
    model: nn.Module,
    factors: str | os.PathLike[str] | FactorStore,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    skip: Collection[str] = (),
    parametrisation: Parametrisation = "scale",
    mode: Mode = "auto",
    train_rank: str | int | None = None,
    nonnegative: bool = False,
    offload_base: bool = False,
) -> Attachment:
    """Make the singular values of a model's weights trainable and freeze everything else.

    The model keeps its modules, its parameters and the keys of its state dictionary, which holds
    the merged weights. To train something along, a head say, call ``requires_grad_(True)`` on it
    afterwards.

    Parameters
    ----------
    model : nn.Module
        A model that holds the weights the factors were computed from; changed in place.
    factors : path-like or FactorStore
        The factor checkpoint.
    include, exclude : sequence of str
        Globs of tensor names; every decomposed layer by default.
    skip : collection of str
        Tensor names, no globs, that are left out too.
    parametrisation : {"scale", "shift", "absolute"}
        ``S_base (1 + theta)``, ``S_base + theta`` or ``theta``.
    mode : {"auto", "factored", "composed", "residual"}
        How layers run, see `svftool.attaching.ways`; all give the same gradients.
    train_rank : str or int, optional
        Train only a band of singular values, such as ``"top:64"``.
    nonnegative : bool
        Keep singular values from going below zero.
    offload_base : bool
        Keep those weights of the base that factors stand in for in a temporary file until they are
        needed (evaluation, merging) instead of in memory, if there is room for it. For models on
        the CPU.

    Returns
    -------
    Attachment
        Its `parameters` go to an optimiser.

    Raises
    ------
    FactorsError
        If a layer has no place in the model, another shape or other weights; all are named.
    ModelError
        If the model is attached to already, or the globs leave no layer.
    UsageError
        If an option has no such value.
    """
    check_parametrisation(parametrisation)
    if mode not in get_args(Mode):
        raise UsageError(f"mode {mode!r}, expected one of {', '.join(get_args(Mode))}.")
    options = BuildOptions(parametrisation, mode, parse_band(train_rank), nonnegative)
    if find_attachment(model) is not None:
        raise ModelError("the model has attached singular values already. Call detach first.")
    opened = factors if isinstance(factors, FactorStore) else open_factors(factors)
    try:
        chosen = choose_layers(opened, include, exclude, skip)
        attachment = _attach(model, opened, chosen, options)
    finally:
        if opened is not factors:
            opened.close()
    if offload_base:
        _offload(attachment)
    return attachment


def _offload(attachment: Attachment) -> None:
    for live, weight in attachment.weights.items():
        if runs_without_base(weight):
            try:
                offload(attachment.model.get_parameter(live))
            except ResourceError as error:
                logger.info("the base's weights stay in memory: %s", error)
                return


def choose_layers(
    factors: FactorStore,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    skip: Collection[str] = (),
) -> list[str]:
    """Return the decomposed layers that an include glob matches, all without one.

    Those that an exclude glob matches are left out, and those whose very name is in `skip`.

    Raises
    ------
    ModelError
        If none is left.
    """
    chosen = [
        name
        for name in factors.layers
        if (not include or matches(name, include))
        and not matches(name, exclude)
        and name not in skip
    ]
    if not chosen:
        raise ModelError(
            f"{factors.path}: none of {len(factors.layers)} decomposed layers is left to train. "
            "Widen --include or --exclude."
        )
    return chosen


def _attach(
    model: nn.Module, store: FactorStore, chosen: list[str], options: BuildOptions
) -> Attachment:
    names = map_names(model, [*store.layers, *store.config.left_whole])
    if not names.places(chosen):
        names = match_by_value(model, store, names)
    homeless = [name for name in chosen if name not in names.placements]
    if homeless:
        raise FactorsError(
            f"{store.path}: {len(homeless)} of {len(chosen)} layers have no place in the model "
            f"({shortlist(homeless)}); the model has {shortlist(sorted(own_names(model)), 3)}. "
            "Check the model, or leave them out with --exclude."
        )
    built = {
        live: build_weight(model.get_parameter(live), parts, store, options)
        for live, parts in _by_parameter(model, names, chosen).items()
    }
    faults = [fault for item in built.values() for fault in item.faults]
    if faults:
        raise FactorsError(
            f"{store.path}: {len(faults)} layers are not those of the model: "
            f"{shortlist(faults, 5)}. "
            "Load the checkpoint that was decomposed into the model before attaching."
        )
    weights = {live: item.weight for live, item in built.items() if item.weight is not None}
    layers = {name: layer for item in built.values() for name, layer in item.layers.items()}
    attachment = Attachment(
        model,
        layers={name: layers[name] for name in chosen},
        weights=weights,
        names=names,
        factors=store.path.resolve(),
    )
    model.requires_grad_(False)
    install(model, {model.get_parameter(live): weight for live, weight in weights.items()})
    model.__dict__[KEY] = attachment
    return attachment


def _by_parameter(
    model: nn.Module, names: NameMap, chosen: Sequence[str]
) -> dict[str, list[tuple[str, Region]]]:
    """Group tensors of the file by the live parameter that holds them, tied names as one."""
    first: dict[nn.Parameter, str] = {}
    grouped: dict[str, list[tuple[str, Region]]] = {}
    for name in chosen:
        placement = names.placements[name]
        live = first.setdefault(model.get_parameter(placement.live), placement.live)
        grouped.setdefault(live, []).append((name, placement.region))
    return grouped


def detach(model: nn.Module, *, merge: bool = True) -> None:
    """Take the singular values off a model and leave a plain model behind.

    Parameters
    ----------
    model : nn.Module
        A model that was attached to, or a wrapper around one; changed in place.
    merge : bool
        Write the merged weights into the parameters. Otherwise the base's weights stay.

    Raises
    ------
    ModelError
        If nothing is attached.
    """
    attachment = require_attachment(model)
    for live, weight in attachment.weights.items():
        parameter = attachment.model.get_parameter(live)
        if merge:
            with torch.no_grad():
                parameter.copy_(weight.merged(parameter))
    uninstall(attachment.model)
    del attachment.model.__dict__[KEY]
    for name, parameter in attachment.model.named_parameters():
        parameter.requires_grad_(attachment.was_trainable(name, parameter.requires_grad))
