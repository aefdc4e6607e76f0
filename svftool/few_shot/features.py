"""Middle and high features of any backbone, by the names of its modules.

A backbone is seen as a stem and a chain of stages, each fed by the one before it; the chain is
found by watching one image go through, so that no network needs code of its own. From the chain
follow: stopping after the last feature, running the last stages again on a masked feature map
(PFENet's prior), and starting again from the output of the last frozen stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svftool.errors import ModelError, UsageError, counted, shortlist
from svftool.few_shot.trace import (
    Seen,
    is_channels_last,
    watch,
)

# Which modules of a backbone give its features: known families, timm's, or a user's list.


VGG_POOLS, VGG_LAST = [6, 13, 23, 33], 42
"""Places of the pools between the blocks of VGG-16 with batch norm, and of its last ReLU."""


@dataclass(frozen=True)
class FeatureNames:
    """Modules whose outputs a host sees.

    Attributes
    ----------
    middle : tuple of str
        Their outputs, brought to the resolution of the last one, are compared with the prototype.
    high : str
        Its output gives the prior; the last middle feature where the backbone goes no further.
    after : str or None
        The last module that stays frozen unless a user says otherwise; None for whatever comes
        before the first middle feature's own module.
    """

    middle: tuple[str, ...]
    high: str
    after: str | None = None

    @property
    def all(self) -> tuple[str, ...]:
        """Every name once."""
        return tuple(dict.fromkeys((*self.middle, self.high)))


def parse_names(text: str) -> FeatureNames:
    """Read ``--features``: ``NAME,NAME`` or ``NAME,NAME,HIGH``.

    Raises
    ------
    UsageError
        If there are not two or three names.
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if len(names) not in {2, 3}:
        raise UsageError(
            f"--features {text!r}: {counted(len(names), 'names')}, expected two or three"
        )
    return FeatureNames(names[:2], names[-1])


def default_names(model: nn.Module) -> FeatureNames:
    """Name the features of a known family of networks.

    A ResNet gives layer2, layer3 and, where it exists, layer4; VGG-16 with batch norm the third
    and fourth block with their pools and the fifth without, as PFENet cuts it; a timm model its
    features of stride 8, 16 and 32; a stack of blocks called ``features`` the last of each stride.

    Raises
    ------
    ModelError
        If the network is of none of these families.
    """
    modules = dict(model.named_modules())
    if {"layer2", "layer3"} <= set(modules):
        high = "layer4" if "layer4" in modules else "layer3"
        return FeatureNames(("layer2", "layer3"), high, "layer1")
    if is_vgg16(model):
        after, *middle, high = (_layers(model)[i][0] for i in (*VGG_POOLS[1:], VGG_LAST))
        return FeatureNames(tuple(middle), high, after)
    by_stride = _timm_features(model) or _last_of_stride(model)
    if {8, 16} <= set(by_stride):
        high = by_stride.get(32, by_stride[16])
        return FeatureNames((by_stride[8], by_stride[16]), high, by_stride.get(4))
    raise ModelError(
        f"{type(model).__name__}: no known features, expected layer2 and layer3 or blocks of "
        "stride 8 and 16. Name modules with --features MIDDLE,MIDDLE[,HIGH]."
    )


def is_vgg16(model: nn.Module) -> bool:
    """Tell whether this begins with the layers of VGG-16 with batch norm, however it is cut."""
    layers = [layer for _, layer in _layers(model)][: VGG_LAST + 1]
    pools = [i for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
    return pools == VGG_POOLS and isinstance(layers[VGG_LAST], nn.ReLU)


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """List the modules that have no modules inside them, in the order of their definition."""
    return [(n, layer) for n, layer in model.named_modules() if not any(layer.children())]


def _timm_features(model: nn.Module) -> dict[int, str]:
    """Read the names that timm gives to the features of each stride."""
    described = getattr(model, "feature_info", None)
    if described is None:
        return {}
    names = {name for name, _ in model.named_modules()}
    found = {}
    for info in getattr(described, "info", described):
        module = info["module"]
        flat = module.replace(".", "_")
        if module in names or flat in names:
            found[int(info["reduction"])] = module if module in names else flat
    return found


def _last_of_stride(model: nn.Module) -> dict[int, str]:
    """Take the last block of each stride from a stack of blocks called ``features``."""
    if not isinstance(getattr(model, "features", None), nn.Sequential):
        return {}
    names = [f"features.{name}" for name, _ in model.features.named_children()]  # type: ignore[union-attr]
    trace = watch(model, names[-1:])
    return {
        trace.stride(name): name
        for name in names
        if name in trace.outputs and trace.outputs[name].ndim == 4
    }


STEM = ""
"""The stage before the chain: whatever the model does up to the first stage's input."""

State = dict[str, Tensor]
"""Outputs by stage name: of the last stage that ran, and of those that are features."""


@dataclass(frozen=True)
class FeaturePlan:
    """How a backbone is run to get its features; plain data, no module.

    Attributes
    ----------
    names : FeatureNames
        The outputs that count.
    stages : tuple of str
        `STEM`, then the chain of modules up to the last feature. `STEM` alone means that the
        modules are no chain: the model runs as a whole.
    stem : tuple of str
        Modules that run before the chain.
    channels, strides : mapping
        Of each feature, by name.
    channels_last : bool
        The modules give (batch, height, width, channels), as Swin's do.
    """

    names: FeatureNames
    stages: tuple[str, ...]
    stem: tuple[str, ...]
    channels: Mapping[str, int]
    strides: Mapping[str, int]
    channels_last: bool = False

    @property
    def middle_channels(self) -> int:
        """Channels of the middle features together."""
        return sum(self.channels[name] for name in self.names.middle)

    @property
    def trained(self) -> tuple[str, ...]:
        """Stages whose layers are trained unless a user says otherwise: the paper's layer2 on."""
        if self.names.after in self.stages[1:]:
            return self.stages[self.stages.index(self.names.after) + 1 :]
        first = self.names.middle[0]
        return self.stages[self.stages.index(first) :] if first in self.stages else ()

    @property
    def repeats_high(self) -> bool:
        """Whether the stages after the middle features can be run again on a masked map."""
        return self.names.middle[-1] in self.stages


@dataclass(frozen=True)
class Features:
    """Features of a batch of images.

    Attributes
    ----------
    middle : (B, C, h, w) Tensor
        Middle features side by side, the deepest first.
    high : (B, D, h', w') Tensor
        High features.
    low : (B, C', h'', w'') Tensor
        The first of the middle features alone.
    deep : (B, C'', h, w) Tensor
        The last of the middle features alone; the stages up to the high one start from it.
    """

    middle: Tensor
    high: Tensor
    low: Tensor
    deep: Tensor

    def split(self, count: int) -> tuple[Features, Features]:
        """Split the batch into the first `count` images and the rest."""
        parts = (self.middle, self.high, self.low, self.deep)
        first = Features(*(value[:count] for value in parts))
        return first, Features(*(value[count:] for value in parts))


def plan_features(model: nn.Module, names: FeatureNames) -> FeaturePlan:
    """Watch one image go through the model and find its chain of stages.

    Parameters
    ----------
    model : nn.Module
        The backbone; left as it was.
    names : FeatureNames
        Modules of it.

    Returns
    -------
    FeaturePlan

    Raises
    ------
    ModelError
        If a module does not exist, or its output is no feature map.
    """
    modules = dict(model.named_modules())
    missing = [name for name in names.all if name not in modules]
    if missing:
        close = [name for name in modules if name and name.count(".") <= 1]
        raise ModelError(
            f"{type(model).__name__} has no module {shortlist(missing)}, expected some of: "
            f"{shortlist(close, limit=12)}"
        )
    trace = watch(model, names.all)
    for name in names.all:
        _require_map(name, trace.outputs[name])
    chain = trace.chain(names.all)
    before = trace.order[: trace.order.index(chain[0])] if chain else trace.order
    last = is_channels_last(trace.outputs[names.middle[-1]])
    return FeaturePlan(
        names,
        (STEM, *chain),
        tuple(before),
        {name: trace.outputs[name].shape[3 if last else 1] for name in names.all},
        {name: trace.stride(name) for name in names.all},
        last,
    )


def frozen_stages(model: nn.Module, plan: FeaturePlan) -> int:
    """Count the leading stages of the plan that no trained parameter is in."""
    modules = dict(model.named_modules())
    if _trains(modules[name] for name in plan.stem):
        return 0
    for count, name in enumerate(plan.stages[1:], start=1):
        if _trains([modules[name]]):
            return count
    return len(plan.stages)


def run_stages(
    model: nn.Module, plan: FeaturePlan, start: Tensor | State, *, first: int = 0, last: int
) -> State:
    """Run a stretch of the stages.

    Parameters
    ----------
    model : nn.Module
        The backbone.
    plan : FeaturePlan
        Its plan.
    start : Tensor or dict
        Images where `first` is 0, else the state after stage ``first - 1``.
    first, last : int
        The stretch ``plan.stages[first:last]``.

    Returns
    -------
    dict
        The state after stage ``last - 1``.
    """
    modules = dict(model.named_modules())
    if isinstance(start, Tensor):
        if len(plan.stages) == 1:
            return _capture(model, modules, plan.names.all, start)
        value, kept = _input_of(model, modules[plan.stages[1]], start), dict[str, Tensor]()
        first = 1
    else:
        value, kept = start[plan.stages[first - 1]], dict(start)
    for name in plan.stages[first:last]:
        value = modules[name](value)
        if name in plan.names.all:
            kept[name] = value
    kept = {name: tensor for name, tensor in kept.items() if name in plan.names.all}
    if len(plan.stages) > 1:
        kept[plan.stages[last - 1]] = value
    return kept


def features_of(state: State, plan: FeaturePlan) -> Features:
    """Assemble the features from the state after the last stage."""
    if plan.channels_last:
        state = {name: value.permute(0, 3, 1, 2) for name, value in state.items()}
    *others, deep = (state[name] for name in plan.names.middle)
    sized = [resized(other, deep.shape[-2:]) for other in reversed(others)]
    return Features(
        torch.cat([deep, *sized], dim=1),
        state[plan.names.high],
        state[plan.names.middle[0]],
        deep,
    )


def high_of(model: nn.Module, plan: FeaturePlan, deep: Tensor) -> Tensor:
    """Run the stages after the middle features on a feature map of one's own."""
    modules = dict(model.named_modules())
    start = plan.stages.index(plan.names.middle[-1]) + 1
    value = deep.permute(0, 2, 3, 1) if plan.channels_last else deep
    for name in plan.stages[start : plan.stages.index(plan.names.high) + 1]:
        value = modules[name](value)
    return value.permute(0, 3, 1, 2) if plan.channels_last else value


def resized(value: Tensor, size: Iterable[int]) -> Tensor:
    """Bring maps to a height and width, bilinearly, corner pixels on corner pixels."""
    wanted = tuple(size)
    if tuple(value.shape[-2:]) == wanted:
        return value
    return F.interpolate(value, size=wanted, mode="bilinear", align_corners=True)


def _input_of(model: nn.Module, module: nn.Module, images: Tensor) -> Tensor:
    """Run the model until `module` is reached, and give what it would get."""
    found: list[Tensor] = []

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0])
        raise Seen

    handle = module.register_forward_pre_hook(hook)
    try:
        model(images)
    except Seen:
        pass
    finally:
        handle.remove()
    return found[0]


def _capture(
    model: nn.Module, modules: Mapping[str, nn.Module], wanted: Iterable[str], images: Tensor
) -> State:
    """Run the model until all wanted modules have run, and give their outputs."""
    state: State = {}
    names = tuple(wanted)

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            state[name] = output
            if len(state) == len(names):
                raise Seen

        return hook

    handles = [modules[name].register_forward_hook(keep(name)) for name in names]
    try:
        model(images)
    except Seen:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return state


def _trains(modules: Iterable[nn.Module]) -> bool:
    return any(p.requires_grad for module in modules for p in module.parameters())


def _require_map(name: str, output: Any) -> None:
    shape = tuple(getattr(output, "shape", ()))
    if len(shape) != 4 or shape[2] not in {shape[1], shape[3]}:
        raise ModelError(
            f"{name} gives {shape or type(output).__name__}, expected a feature map (batch, "
            "channels, height, width)"
        )
