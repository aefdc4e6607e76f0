"""Put attached weights on a model's modules, with their hooks, and take them off again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torch import nn

from svftool.attaching.chains import FoldPlan
from svftool.attaching.folding import unfold
from svftool.attaching.hooks import Enter, EnterRoot, Leave, LeaveRoot, LoadMerged, SaveMerged
from svftool.attaching.region import PREFIX
from svftool.attaching.weight import AttachedWeight

_HANDLES = "_svf_handles"


def install(model: nn.Module, weights: Mapping[nn.Parameter, AttachedWeight]) -> None:
    """Register attached weights beside their parameters, with the hooks that use them.

    The forward pass of the model places them all, so that code which reads a submodule's weight
    without calling it (attention, tied heads, fused fast paths) meets them too. The owner and its
    parent do so again, for callers that run a part of the model.

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
            parent = path.rpartition(".")[0]
            for place in {"", parent, path}:
                places[place].append((path[len(place) :].lstrip("."), attribute))
    for path, owner in list(model.named_modules()):
        own = [attribute for place, attribute in places.get(path, []) if not place]
        for attribute in own:
            owner.add_module(PREFIX + attribute, weights[_parameter(owner, attribute)])
    folds = FoldPlan(_alone(model))
    for path, inside in places.items():
        _hook(model.get_submodule(path), inside, folds if not path else None)


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


def _hook(module: nn.Module, places: list[tuple[str, str]], folds: FoldPlan | None) -> None:
    own = [place for place in places if not place[0]]
    enter = Enter(places) if folds is None else EnterRoot(places, folds)
    handles = [
        module.register_forward_pre_hook(enter, with_kwargs=folds is not None),
        module.register_forward_hook(Leave() if folds is None else LeaveRoot(), always_call=True),
    ]
    if own:
        handles += [
            module.register_state_dict_post_hook(SaveMerged(own)),  # type: ignore[no-untyped-call]
            module.register_load_state_dict_pre_hook(LoadMerged(own)),  # type: ignore[no-untyped-call]
        ]
    module.__dict__[_HANDLES] = handles


def uninstall(model: nn.Module) -> None:
    """Remove everything that `install` put on the model."""
    unfold(model)
    for module in list(model.modules()):
        for handle in module.__dict__.pop(_HANDLES, ()):
            handle.remove()
        module.__dict__.pop("_svf_placed", None)
        for name in [name for name in module._modules if name.startswith(PREFIX)]:
            delattr(module, name)
