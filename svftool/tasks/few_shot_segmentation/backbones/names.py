"""Which modules of a backbone give its features: known families, timm's, or a user's list."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from svftool.errors import ModelError, UsageError
from svftool.tasks.few_shot_segmentation.backbones.trace import watch

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
        raise UsageError(f"--features {text!r}: {len(names)} names, expected two or three")
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
