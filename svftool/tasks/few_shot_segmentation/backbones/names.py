"""Which modules of a backbone give its features: known families, timm's, or a user's list."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from svftool.errors import ModelError, UsageError
from svftool.tasks.few_shot_segmentation.backbones.trace import watch


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
        return FeatureNames(("features.23", "features.33"), "features.42", "features.13")
    by_stride = _timm_features(model) or _last_of_stride(model)
    if {8, 16} <= set(by_stride):
        high = by_stride.get(32, by_stride[16])
        return FeatureNames((by_stride[8], by_stride[16]), high, by_stride.get(4))
    raise ModelError(
        f"{type(model).__name__}: no known features, expected layer2 and layer3 or blocks of "
        "stride 8 and 16. Name modules with --features MIDDLE,MIDDLE[,HIGH]."
    )


def is_vgg16(model: nn.Module) -> bool:
    """Tell whether this is VGG-16 with batch norm, torchvision's or alike."""
    features = getattr(model, "features", None)
    if not isinstance(features, nn.Sequential) or len(features) not in {43, 44}:
        return False
    pools = [i for i, layer in enumerate(features) if isinstance(layer, nn.MaxPool2d)]
    return pools in ([6, 13, 23, 33], [6, 13, 23, 33, 43])


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
