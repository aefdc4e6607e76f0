"""Logits for every pixel: a segmentation model's own, or a head on a backbone's feature map."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from svftool.checkpoints import TensorInfo, output_heads
from svftool.errors import MissingDependencyError, ModelError
from svftool.models import find_head
from svftool.tasks.heads import class_means, logits_of, resized, set_head

HeadType = Literal["linear", "fcn", "deeplab"]

PIXELS_PER_CLASS = 512
_GROUPS = 32


def dense_logits(output: Any) -> Tensor:
    """Find the logits of pixels in what a model returns: (N, C, h, w).

    Torchvision's models give a dictionary with ``out``, transformers' an object with ``.logits``.

    Raises
    ------
    ModelError
        If there are none.
    """
    out = output.get("out") if isinstance(output, Mapping) else None
    logits = out if isinstance(out, Tensor) else logits_of(output)
    if logits.ndim != 4:
        raise ModelError(
            f"the model returns {tuple(logits.shape)}, expected logits of pixels: (images, "
            "classes, height, width)"
        )
    return logits


def enlarge(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize logits to the pixels of an image, bilinearly, in float32."""
    same = tuple(logits.shape[-2:]) == tuple(size)
    return logits.float() if same else interpolate(logits.float(), size, mode="bilinear")


class WithDenseHead(nn.Module):
    """A backbone, and a head on one of its feature maps.

    Parameters
    ----------
    backbone : nn.Module
        Any network; what it does behind the feature map is not used.
    features : str
        Name of the module that gives the feature map; empty for the backbone's own output.
    head : nn.Module
        Takes the map.
    """

    def __init__(self, backbone: nn.Module, features: str, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.features = features
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """Logits, (N, classes, h, w)."""
        caught: list[Tensor] = []
        module = self.backbone.get_submodule(self.features)
        handle = module.register_forward_hook(lambda _module, _in, out: caught.append(out))
        try:
            self.backbone(images)
        finally:
            handle.remove()
        logits: Tensor = self.head(caught[-1])
        return logits


def dense_heads(model: nn.Module, classes: int) -> list[str]:
    """Return the modules that give a segmentation model's logits; auxiliary ones are left out.

    Parameters
    ----------
    model : nn.Module
    classes : int
        Channels of its logits.
    """
    infos = [
        TensorInfo(name, parameter.dtype, tuple(parameter.shape), "")
        for name, parameter in model.named_parameters(remove_duplicate=False)
    ]
    names = [name.removesuffix(".weight") for name in sorted(output_heads(infos))]
    return [
        name
        for name in names
        if not any(part.startswith("aux") for part in name.split("."))
        and getattr(model.get_submodule(name), "out_channels", None) == classes
    ]


def common_module(names: list[str]) -> str:
    """Return the innermost module that holds all of these.

    Examples
    --------
    >>> common_module(["classifier.low", "classifier.high"]), common_module(["head.4"])
    ('classifier', 'head.4')
    """
    if len(names) == 1:
        return names[0]
    shared = []
    for parts in zip(*(name.split(".") for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def replace_heads(model: nn.Module, names: list[str], classes: int) -> None:
    """Put untrained layers with as many outputs as there are classes in the places of these.

    Raises
    ------
    ModelError
        If one is no pointwise convolution.
    """
    for name in names:
        parent, _, last = name.rpartition(".")
        layer = resized(model.get_submodule(name), name, classes)
        setattr(model.get_submodule(parent), last, layer)


def find_features(model: nn.Module, images: Tensor, *, only: str | None = None) -> tuple[str, int]:
    """Find the last module that gives a feature map, before a classifier where there is one.

    Parameters
    ----------
    model : nn.Module
    images : (N, 3, height, width) Tensor
        Some to run it on.
    only : str or None
        The one module to look at.

    Returns
    -------
    tuple of str and int
        The module's name, and the channels of its map.

    Raises
    ------
    ModelError
        If no module gives a map.
    """
    head = find_head(model)
    found: list[tuple[str, int]] = []
    done: list[str] = []

    def look(name: str, output: Any) -> None:
        if name == head and only is None:
            done.append(name)
        is_map = isinstance(output, Tensor) and output.ndim == 4 and min(output.shape[-2:]) > 1
        if is_map and not done:
            found.append((name, output.shape[1]))

    handles = [
        module.register_forward_hook(lambda _m, _i, out, name=name: look(name, out))
        for name, module in model.named_modules()
        if only in (None, name)
    ]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise ModelError(
            f"{'the model' if only is None else only} gives no feature map (images, channels, "
            "height, width), "
            "expected a segmentation model or a convolutional backbone. Name a model that "
            "returns logits of pixels with --model FILE.py:FACTORY"
        )
    return found[-1]


def make_head(kind: HeadType, channels: int, classes: int, like: Tensor) -> nn.Module:
    """Make an untrained head for a feature map.

    Parameters
    ----------
    kind : {"linear", "fcn", "deeplab"}
        A pointwise convolution, or torchvision's heads of FCN and DeepLabv3; their batch norms
        become group norms, because batch norms in training stand still and a new one has no
        statistics to stand on.
    channels, classes : int
        Sizes of the head.
    like : Tensor
        Gives device and dtype.

    Raises
    ------
    ModelError
        If the map is too thin for the kind.
    """
    if kind == "linear":
        return nn.Conv2d(channels, classes, 1).to(like)
    try:
        from torchvision.models.segmentation import deeplabv3, fcn
    except ImportError:
        purpose = f"the head {kind}"
        raise MissingDependencyError("torchvision", extra="vision", purpose=purpose) from None
    if kind == "fcn" and channels < 4:
        raise ModelError(f"the feature map has {channels} channels, expected 4 or more for fcn")
    made = fcn.FCNHead if kind == "fcn" else deeplabv3.DeepLabHead
    head: nn.Module = made(channels, classes)
    for module in list(head.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                features = child.num_features
                setattr(module, name, nn.GroupNorm(math.gcd(_GROUPS, features), features))
    return head.to(like)


def last_layer(head: nn.Module) -> nn.Module:
    """Return the layer of a head that gives the logits."""
    layers = [module for module in head.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    return layers[-1]


@torch.inference_mode()
def start_from_means(
    model: nn.Module, layer: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, ignore: int
) -> None:
    """Start a new last layer from the mean direction of each class's pixels.

    Classes that no pixel shows start from zero.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode.
    layer : nn.Module
        A pointwise convolution in it; changed in place.
    batches : iterable of images and labels
        (N, 3, height, width) and (N, H, W).
    ignore : int
        Label of pixels without a class.
    """
    caught: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _module, inputs: caught.append(inputs[0]))
    features, labels = [], []
    try:
        for images, maps in batches:
            caught.clear()
            model(images)
            found = caught[-1].float()
            small = interpolate(maps[:, None].float(), found.shape[-2:], mode="nearest")
            features.append(found.movedim(1, -1).flatten(0, 2))
            labels.append(small.to(torch.int64).flatten())
    finally:
        handle.remove()
    pixels, classes = torch.cat(features), torch.cat(labels)
    count = next(layer.parameters()).shape[0]
    chosen = _some_of_each(classes, ignore)
    present = torch.bincount(classes[chosen]).nonzero().flatten()
    numbers = torch.searchsorted(present, classes[chosen])
    means = class_means(pixels[chosen], numbers, len(present))
    weights = means.new_zeros(count, means.shape[1])
    weights[present] = means
    set_head(layer, weights)


def _some_of_each(labels: Tensor, ignore: int) -> Tensor:
    """Positions of at most `PIXELS_PER_CLASS` pixels a class, evenly spread."""
    parts = []
    for label, count in enumerate(torch.bincount(labels).tolist()):
        if count and label != ignore:
            where = (labels == label).nonzero().flatten()
            parts.append(where[:: math.ceil(len(where) / PIXELS_PER_CLASS)])
    return torch.cat(parts) if parts else labels.new_zeros(0)
