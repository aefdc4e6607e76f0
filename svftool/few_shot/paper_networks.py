"""The papers' backbones, under the names that their weight files use.

Factories for ``--model svftool.tasks.few_shot_segmentation.networks:NAME``:

=========================  ======================================================================
``resnet50_deep``          semseg's ResNet-50 with a stem of three convolutions, which PFENet, BAM
                           and SVF start from (``resnet50_v2.pth``)
``resnet101_deep``         the same with 101 layers
``pspnet_resnet50_pascal`` BAM's base network of a fold of Pascal-5i: backbone and base learner
``pspnet_resnet50_coco``   of COCO-20i
``pspnet_vgg16_pascal``    with VGG-16
``pspnet_vgg16_coco``
=========================  ======================================================================

torchvision's networks go by ``torchvision:resnet50``, ``torchvision:vgg16_bn``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from svftool.errors import MissingDependencyError, UsageError
from svftool.few_shot.backbones import is_vgg16, resized
from svftool.few_shot.hosts import BaseLearner

PASCAL_BASE, COCO_BASE = 15, 60
VGG_CHANNELS = 512
_DEPTHS: dict[tuple[int, ...], str] = {(3, 4, 6, 3): "ResNet-50", (3, 4, 23, 3): "ResNet-101"}


class DeepStemResNet(nn.Module):
    """A ResNet of bottlenecks whose stem is three 3 x 3 convolutions.

    Parameters
    ----------
    depths : tuple of int
        Blocks of each stage.
    """

    def __init__(self, depths: tuple[int, int, int, int]) -> None:
        super().__init__()
        resnet = _torchvision().models.resnet

        class Body(resnet.ResNet):  # type: ignore[misc,name-defined]
            """torchvision's stages, but the first one takes 128 channels."""

            def __init__(self) -> None:
                super().__init__(resnet.Bottleneck, list(depths))
                self.inplanes = 128
                self.layer1 = self._make_layer(resnet.Bottleneck, 64, depths[0])

        body = Body()
        self.conv1, self.bn1 = _conv(3, 64, stride=2), nn.BatchNorm2d(64)
        self.conv2, self.bn2 = _conv(64, 64), nn.BatchNorm2d(64)
        self.conv3, self.bn3 = _conv(64, 128), nn.BatchNorm2d(128)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1, self.layer2 = body.layer1, body.layer2
        self.layer3, self.layer4 = body.layer3, body.layer4
        self.fc = nn.Linear(2048, 1000)

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, H, W) images to (B, 1000) logits."""
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.maxpool(self.relu(self.bn3(self.conv3(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class PspNet(nn.Module):
    """BAM's base network: stages ``layer0`` to ``layer4`` and the base learner on top.

    A ResNet here is dilated as its weights were trained: every 3 x 3 convolution of layer3 by 2
    and of layer4 by 4, the first block's too. ImageNet's weights were trained with strides, and
    their networks keep what the first block computes
    (`svftool.few_shot.backbones.dilate`).

    Parameters
    ----------
    stages : sequence of nn.Module
        The five stages.
    channels : int
        Of the last one.
    classes : int
        Base classes, background not counted.
    """

    def __init__(self, stages: list[nn.Module], channels: int, classes: int) -> None:
        super().__init__()
        self.channels, self.classes = channels, classes
        self.layer0, self.layer1, self.layer2, self.layer3, self.layer4 = stages
        # The file holds the stages a second time under this name.
        self.encoder = nn.Sequential(*stages)
        learner = BaseLearner(channels, classes)
        self.ppm, self.cls = learner.ppm, learner.cls

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, H, W) images to (B, classes + 1, H, W) logits."""
        x = self.layer3(self.layer2(self.layer1(self.layer0(images))))
        return resized(self.cls(self.ppm(self.layer4(x))), images.shape[-2:])


def own_base_learner(model: nn.Module) -> BaseLearner | None:
    """Take the base learner out of a base network; None for any other network."""
    if not isinstance(model, PspNet):
        return None
    learner = BaseLearner(model.channels, model.classes)
    learner.ppm, learner.cls = model.ppm, model.cls
    return learner


def require_one_fold(folds: Sequence[int], inner: int | None) -> None:
    """Refuse to test a base network on classes that it was trained on.

    Parameters
    ----------
    folds : sequence of int
        Folds that its weights are to be used for.
    inner : int or None
        A fold whose classes stand in for the novel ones.

    Raises
    ------
    UsageError
        If there are several folds, or an inner one.
    """
    if len(folds) > 1:
        raise UsageError(
            f"--fold {','.join(map(str, folds))}: a base network was trained on the base classes "
            "of one fold, which are novel in the others, expected one fold a checkpoint. Run "
            "--fold N with the weights of that fold, one fold after the other"
        )
    if inner is not None:
        raise UsageError(
            f"--inner-fold {inner}: a base network was trained on the classes of every fold but "
            "its own, expected none of them to stand in for novel ones. Leave --inner-fold out, or "
            "take a backbone that saw none of the folds, such as resnet50_deep"
        )


def backbone_name(model: nn.Module) -> str | None:
    """Name a backbone as the papers' tables do; None for one that is not in them."""
    if is_vgg16(model):
        return "VGG-16"
    stages = [getattr(model, f"layer{i}", None) for i in range(1, 5)]
    if not all(isinstance(stage, nn.Sequential) for stage in stages):
        return None
    blocks = [list(stage.children()) for stage in stages if stage is not None]
    plain = all(
        _is_bottleneck(block, width)
        for stage, width in zip(blocks, (64, 128, 256, 512), strict=True)
        for block in stage
    )
    return _DEPTHS.get(tuple(map(len, blocks))) if plain else None


def _is_bottleneck(block: nn.Module, width: int) -> bool:
    """Tell whether a block is ResNet's own: no groups, other widths, attention or pools."""
    layers = {name: layer for name, layer in block.named_modules() if not any(layer.children())}
    convs = {
        name: (layer.out_channels, layer.kernel_size[0], layer.groups)
        for name, layer in layers.items()
        if isinstance(layer, nn.Conv2d)
    }
    shortcut = {"downsample.0": (4 * width, 1, 1)} if "downsample.0" in convs else {}
    expected = {"conv1": (width, 1, 1), "conv2": (width, 3, 1), "conv3": (4 * width, 1, 1)}
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Identity)
    return convs == expected | shortcut and all(isinstance(x, kinds) for x in layers.values())


def resnet50_deep() -> nn.Module:
    """Make the ResNet-50 of the papers."""
    return DeepStemResNet((3, 4, 6, 3))


def resnet101_deep() -> nn.Module:
    """Make the ResNet-101 of the papers."""
    return DeepStemResNet((3, 4, 23, 3))


def pspnet_resnet50_pascal() -> nn.Module:
    """Make BAM's base network for Pascal-5i on ResNet-50."""
    return _resnet_pspnet(PASCAL_BASE)


def pspnet_resnet50_coco() -> nn.Module:
    """Make BAM's base network for COCO-20i on ResNet-50."""
    return _resnet_pspnet(COCO_BASE)


def pspnet_vgg16_pascal() -> nn.Module:
    """Make BAM's base network for Pascal-5i on VGG-16."""
    return _vgg_pspnet(PASCAL_BASE)


def pspnet_vgg16_coco() -> nn.Module:
    """Make BAM's base network for COCO-20i on VGG-16."""
    return _vgg_pspnet(COCO_BASE)


def _resnet_pspnet(classes: int) -> PspNet:
    net = DeepStemResNet((3, 4, 6, 3))
    stem: list[nn.Module] = []
    for conv, norm in ((net.conv1, net.bn1), (net.conv2, net.bn2), (net.conv3, net.bn3)):
        stem += [conv, norm, nn.ReLU()]
    stages = [nn.Sequential(*stem, net.maxpool), net.layer1, net.layer2, net.layer3, net.layer4]
    for stage, dilation in ((net.layer3, 2), (net.layer4, 4)):
        for layer in stage.modules():
            if isinstance(layer, nn.Conv2d):
                layer.stride = (1, 1)
                if layer.kernel_size == (3, 3):
                    layer.dilation = layer.padding = (dilation, dilation)
    return PspNet(stages, 2048, classes)


def _vgg_pspnet(classes: int) -> PspNet:
    layers = list(_torchvision().models.vgg16_bn().features)
    for layer in layers:
        if isinstance(layer, nn.MaxPool2d):
            layer.ceil_mode = True
    cuts = (0, 7, 14, 24, 34, 43)
    stages: list[nn.Module] = [nn.Sequential(*layers[start:end]) for start, end in pairwise(cuts)]
    return PspNet(stages, VGG_CHANNELS, classes)


def _conv(inputs: int, outputs: int, *, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


def _torchvision() -> Any:
    try:
        import torchvision
    except ImportError:
        raise MissingDependencyError(
            "torchvision", extra="vision", purpose="the papers' backbones"
        ) from None
    return torchvision
