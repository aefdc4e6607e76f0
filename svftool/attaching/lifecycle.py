"""Attach trainable singular values to a live model, and take them off again."""

from __future__ import annotations

import gc
import logging
import math
import os
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from svftool.attaching.attachment import KEY, LIVE, Attachment, require_attachment
from svftool.attaching.build import BuildOptions, build_weight
from svftool.attaching.fusion import FusionPlan, unfuse
from svftool.attaching.hooks import Enter, EnterRoot, Leave, LeaveRoot, LoadMerged, SaveMerged
from svftool.attaching.layer import PREFIX, Region
from svftool.attaching.matching import match_by_value
from svftool.attaching.names import NameMap, map_names, own_names
from svftool.attaching.weight import AttachedWeight, Mode, runs_without_base
from svftool.checkpoints import matches, write_errors
from svftool.choices.acting import check_acting
from svftool.choices.regimes import Regime, check_sizes, parse_regime
from svftool.choices.singular_values import (
    Parametrisation,
    check_band,
    check_parametrisation,
    parse_band,
)
from svftool.errors import (
    FactorsError,
    ModelError,
    ResourceError,
    UsageError,
    counted,
    no_such,
    shortlist,
)
from svftool.factors import FactorStore, open_factors
from svftool.files.names import real

# Frozen weights wait in a file instead of in memory: nothing reads them while factors do the work.


@torch.no_grad()
def offload(parameter: nn.Parameter) -> None:
    """Move a parameter's values into a file that the system reads back when they are used.

    The parameter stays what it is for all who use it. The file is in the folder for temporary
    files, has no name any more, and goes when the parameter does. Parameters that are not on the
    CPU stay where they are.

    Parameters
    ----------
    parameter : Parameter
        Of a floating dtype that numpy has; changed in place.

    Raises
    ------
    ResourceError
        If the folder for temporary files has no room.
    """
    if parameter.device.type != "cpu" or not parameter.numel():
        return
    values = parameter.detach()
    layout = _dense_order(values)
    stored = values.permute(layout).contiguous()
    handle, name = tempfile.mkstemp(prefix="svftool-")
    try:
        with write_errors(Path(name)), os.fdopen(handle, "wb") as file:
            stored.numpy().tofile(file)
        mapped = torch.from_file(name, size=stored.numel(), dtype=stored.dtype)
    finally:
        Path(name).unlink()
    back = tuple(layout.index(dim) for dim in range(values.ndim))
    parameter.data = mapped.reshape(stored.shape).permute(back)


def _dense_order(values: torch.Tensor) -> tuple[int, ...]:
    """Return the dimensions from the outermost in memory to the innermost."""
    strides = values.stride()
    return tuple(sorted(range(values.ndim), key=lambda dim: -strides[dim]))


# Put attached weights on a model's modules, with their hooks, and take them off again.


_HANDLES = "_svf_handles"


def install(model: nn.Module, weights: Mapping[nn.Parameter, AttachedWeight]) -> None:
    """Register attached weights beside their parameters, with the hooks that use them.

    The forward pass of the model places them all, so that code which reads a submodule's weight
    without calling it (attention, tied heads, fused fast paths) meets them too. Every module that
    holds the owner does so again, for callers that run a part of the model, and for checkpoints
    that run it again during the backward pass.

    Parameters
    ----------
    model : nn.Module
        The root.
    weights : mapping of Parameter to AttachedWeight
        By the live parameter, whatever modules own it.
    """
    places: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for path, owner in model.named_modules():
        for attribute, parameter in owner._parameters.items():
            if parameter is None or parameter not in weights:
                continue
            parts = path.split(".") if path else []
            for end in range(len(parts) + 1):
                places[".".join(parts[:end])].append((".".join(parts[end:]), attribute))
    for path, owner in list(model.named_modules()):
        own = [attribute for place, attribute in places.get(path, []) if not place]
        for attribute in own:
            owner.add_module(PREFIX + attribute, weights[_parameter(owner, attribute)])
    plan = FusionPlan(_alone(model))
    for path, inside in places.items():
        _hook(model.get_submodule(path), inside, plan if not path else None)


def _parameter(owner: nn.Module, attribute: str) -> nn.Parameter:
    parameter = owner._parameters[attribute]
    if parameter is None:
        raise RuntimeError(f"parameter {attribute} was removed")
    return parameter


def _alone(model: nn.Module) -> list[str]:
    """Return the paths of modules whose attached weight belongs to no other module."""
    owners: dict[int, list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        attached = module._modules.get(f"{PREFIX}weight")
        if attached is not None:
            owners[id(attached)].append(path)
    return [paths[0] for paths in owners.values() if len(paths) == 1]


def _hook(module: nn.Module, places: list[tuple[str, str]], plan: FusionPlan | None) -> None:
    own = [place for place in places if not place[0]]
    enter = Enter(places) if plan is None else EnterRoot(places, plan)
    handles = [
        module.register_forward_pre_hook(enter, with_kwargs=plan is not None),
        module.register_forward_hook(Leave() if plan is None else LeaveRoot(), always_call=True),
    ]
    if own:
        handles += [
            module.register_state_dict_post_hook(SaveMerged(own)),  # type: ignore[no-untyped-call]
            module.register_load_state_dict_pre_hook(LoadMerged(own)),  # type: ignore[no-untyped-call]
        ]
    module.__dict__[_HANDLES] = handles


def uninstall(model: nn.Module) -> None:
    """Remove everything that `install` put on the model."""
    unfuse(model)
    for module in list(model.modules()):
        for handle in module.__dict__.pop(_HANDLES, ()):
            handle.remove()
        module.__dict__.pop("_svf_placed", None)
        for name in [name for name in module._modules if name.startswith(PREFIX)]:
            delattr(module, name)


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
    regime: str | Regime = "svf",
    seed: int = 0,
    gradients: Mapping[str, Tensor] | None = None,
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
        How layers run, see `svftool.attaching.weight`; all give the same gradients.
    train_rank : str or int, optional
        Train only a band of singular values, such as ``"top:64"``. Layers that have none of them
        keep those of the base.
    nonnegative : bool
        Keep singular values from going below zero.
    offload_base : bool
        Keep those weights of the base that factors stand in for in a temporary file until they are
        needed (evaluation, merging) instead of in memory, if there is room for it. For models on
        the CPU.
    regime : str or Regime
        What is trained in the singular basis: ``"svf"``, ``"svf+scale"``, ``"entries:4x:band"``,
        ``"core:8"``, ``"salt:4"`` or ``"rows"``; see `svftool.choices.regimes.Spectral`.
    seed : int
        Chooses random entries, and where a low-rank remainder starts.
    gradients : mapping of str to Tensor, optional
        Of the loss over the support set, by the model's parameter names: entries are chosen by it.
        See `svftool.attaching.weight_gradients`.

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
        If an option has no such value or acts on nothing that the regime trains, the regime or
        `train_rank` asks for more numbers than any layer has, or entries are chosen by gradient and
        none is given.
    """
    check_parametrisation(parametrisation)
    if mode not in get_args(Mode):
        raise UsageError(no_such("mode", mode, get_args(Mode)))
    given = parse_regime(regime) if isinstance(regime, str) else regime
    spectral = given.spectral
    if spectral is None or given.parts & {"bias", "norm"}:
        raise UsageError(
            f"regime {given.name!r} is not of the singular basis alone, expected one such as "
            "'svf+scale'. Set other parameters free yourself, or use apply_regime."
        )
    check_acting(
        [given],
        {
            "parametrisation": parametrisation,
            "train_rank": train_rank,
            "nonnegative": nonnegative,
        },
    )
    if spectral.entries is not None and spectral.choice == "gradient":
        _check_gradients(given, gradients or {})
    options = BuildOptions(
        parametrisation, mode, parse_band(train_rank), nonnegative, spectral, seed
    )
    _refuse_attached(model)
    opened = factors if isinstance(factors, FactorStore) else open_factors(factors)
    try:
        chosen = choose_layers(opened, include, exclude, skip)
        check_sizes(given, matrices_of(opened, chosen))
        check_band(train_rank, [opened.layers[name].rank for name in chosen])
        attachment = _attach(model, opened, chosen, options, gradients or {})
    finally:
        if opened is not factors:
            opened.close()
    if offload_base:
        _offload(attachment)
    return attachment


def _check_gradients(regime: Regime, gradients: Mapping[str, Tensor]) -> None:
    """Refuse to choose entries by a gradient that says nothing."""
    sound = all(bool(one.isfinite().all()) for one in gradients.values())
    if sound and any(bool(one.any()) for one in gradients.values()):
        return
    found = "no gradient of the support set" if not gradients else "a gradient that is zero"
    if not sound:
        found = "a gradient that is not finite"
    stem = regime.name.removesuffix(":gradient")
    raise UsageError(
        f"regime {regime.name}: entries are chosen by gradient, and there is {found}, expected one "
        f"that tells entries apart. Choose others: {stem}:random or {stem}:band."
    )


def _offload(attachment: Attachment) -> None:
    for live, weight in attachment.weights.items():
        if runs_without_base(weight):
            try:
                offload(attachment.model.get_parameter(live))
            except ResourceError as error:
                logger.info("the base's weights stay in memory: %s", error)
                break
    _accept(attachment)


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


def matrices_of(factors: FactorStore, layers: Sequence[str]) -> list[tuple[int, int, int, int]]:
    """Return how many, m, n and k of the matrices of each layer."""
    found = [factors.layers[name] for name in layers]
    return [(math.prod(one.matrix[:-2]), *one.matrix[-2:], one.rank) for one in found]  # type: ignore[misc]


def _attach(
    model: nn.Module,
    store: FactorStore,
    chosen: list[str],
    options: BuildOptions,
    gradients: Mapping[str, Tensor],
) -> Attachment:
    names = map_names(model, [*store.layers, *store.config.left_whole])
    if not names.places(chosen):
        names = match_by_value(model, store, names)
    homeless = [name for name in chosen if name not in names.placements]
    if homeless:
        raise FactorsError(
            f"{store.path}: {counted(len(homeless), 'layers', 'have', of=len(chosen))} no place in "
            f"the model ({shortlist(homeless)}); the model has "
            f"{shortlist(sorted(own_names(model)), 3)}. Check the model, or leave them out with "
            "--exclude."
        )
    chosen = _without_buffers(model, store, names, chosen)
    built = {
        live: build_weight(model.get_parameter(live), parts, store, options, gradients.get(live))
        for live, parts in _by_parameter(model, names, chosen).items()
    }
    faults = [fault for item in built.values() for fault in item.faults]
    if faults:
        raise FactorsError(
            f"{store.path}: {counted(len(faults), 'layers', 'are')} not those of the model: "
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
        factors=real(store.path),
    )
    model.requires_grad_(False)
    install(model, {model.get_parameter(live): weight for live, weight in weights.items()})
    model.__dict__[KEY] = attachment
    _accept(attachment)
    return attachment


def _accept(attachment: Attachment) -> None:
    for live, weight in attachment.weights.items():
        weight.accept(attachment.model.get_parameter(live))


def _refuse_attached(model: nn.Module) -> None:
    """Refuse a model of which any part is attached to, as a whole, a part or under another name.

    Raises
    ------
    ModelError
        If it is; the part is named.
    """
    for path, module in model.named_modules():
        root = isinstance(module.__dict__.get(KEY), Attachment)
        if root or any(isinstance(one, AttachedWeight) for one in module._modules.values()):
            part = f"its part {path}" if path else "the model"
            raise ModelError(f"{part} has attached singular values already. Call detach first.")
    mine = {_storage(p): name for name, p in model.named_parameters() if p.numel()}
    if any(storage in mine for storage, _ in _attached_storages()):
        gc.collect()  # of a model that nobody has any more
    for storage, name in _attached_storages():
        if storage in mine:
            raise ModelError(
                f"{mine[storage]} is the same tensor as {name} of another model, which has "
                "attached singular values already. Call detach on that one first, or copy the "
                "tensor."
            )


def _attached_storages() -> Iterator[tuple[int, str]]:
    for attachment in list(LIVE):
        if attachment.model.__dict__.get(KEY) is attachment:
            for live in attachment.weights:
                path, _, attribute = live.rpartition(".")
                parameter = attachment.model.get_submodule(path)._parameters.get(attribute)
                if parameter is not None:
                    yield _storage(parameter), live


def _storage(parameter: torch.Tensor) -> int:
    return parameter.untyped_storage().data_ptr()


def _without_buffers(
    model: nn.Module, store: FactorStore, names: NameMap, chosen: Sequence[str]
) -> list[str]:
    """Leave out decomposed tensors that are buffers of the model, which nothing trains."""
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    held = [name for name in chosen if names.placements[name].live in buffers]
    if not held:
        return list(chosen)
    left = [name for name in chosen if name not in held]
    if not left:
        raise ModelError(
            f"{store.path}: all {len(held)} layers are buffers of the model ({shortlist(held)}), "
            "expected a parameter to train. Widen --include, or decompose with --exclude "
            f"{held[0]}."
        )
    logger.warning(
        "%d decomposed tensors are buffers of the model, not parameters. They stay whole, and do "
        "not train: %s",
        len(held),
        shortlist(held, 5),
    )
    return left


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
                weight.take_back(parameter)
                parameter.copy_(weight.merged(parameter))
    uninstall(attachment.model)
    del attachment.model.__dict__[KEY]
    for name, parameter in attachment.model.named_parameters():
        parameter.requires_grad_(attachment.was_trainable(name, parameter.requires_grad))
