"""Trading strides for dilation."""

from __future__ import annotations

from torch import nn

from svftool.errors import ModelError, shortlist
from svftool.tasks.few_shot_segmentation.backbones.names import FeatureNames, is_vgg16
from svftool.tasks.few_shot_segmentation.backbones.plan import (
    STEM,
    FeaturePlan,
    plan_features,
)
from svftool.tasks.few_shot_segmentation.backbones.trace import watch


def adapt_backbone(
    model: nn.Module, names: FeatureNames, output_stride: int | None = None
) -> FeaturePlan:
    """Bring a backbone to the resolution that the papers use, and plan its features.

    Parameters
    ----------
    model : nn.Module
        Changed in place: strides, dilations and paddings, never weights.
    names : FeatureNames
        Its features.
    output_stride : int, optional
        Pixels a feature. By default 8; VGG-16 keeps its 16 and rounds its pools up, as in PFENet.

    Raises
    ------
    ModelError
        If the features cannot be found or the stride cannot be reached.
    """
    if is_vgg16(model):
        for layer in model.modules():
            if isinstance(layer, nn.MaxPool2d):
                layer.ceil_mode = True
        output_stride = output_stride or 16
    dilate(model, names, output_stride or 8)
    return plan_features(model, names)


def dilate(model: nn.Module, names: FeatureNames, output_stride: int) -> None:
    """Trade the strides beyond `output_stride` for dilation, in place.

    In a stage that would go beyond, strided convolutions get stride 1, and every convolution after
    them the dilation that restores its field of view: at the positions that the network had before
    its outputs are exactly what they were. SVF's code dilates like this; PFENet and BAM dilate the
    strided convolution too, which changes what a frozen network computes.

    Parameters
    ----------
    model : nn.Module
        The backbone.
    names : FeatureNames
        Its features.
    output_stride : int
        8 or 16, say.

    Raises
    ------
    ModelError
        If the backbone is no chain of stages, or one stage passes `output_stride` half-way.
    """
    plan = plan_features(model, names)
    deepest = max(plan.strides.values())
    if deepest <= output_stride:
        return
    if len(plan.stages) == 1:
        raise ModelError(
            f"{type(model).__name__}: {shortlist(names.all)} are no chain of modules, expected one "
            f"to reach an output stride of {output_stride}. Use --output-stride {deepest}."
        )
    trace = watch(model, names.all)
    modules = dict(model.named_modules())
    for before, name in zip(plan.stages, plan.stages[1:], strict=False):
        stride = trace.stride(name)
        if stride <= output_stride:
            continue
        came = trace.stride(before) if before != STEM else 1
        if came < output_stride:
            raise ModelError(
                f"{name}: goes from stride {came} to {stride}, expected a stage that ends at "
                f"{output_stride}. Use --output-stride {stride}."
            )
        _dilate_stage(modules[name], came // output_stride, stride // output_stride)


def _dilate_stage(stage: nn.Module, came: int, factor: int) -> None:
    """Dilate the convolutions up to the strided one by `came`, those after it by `factor`."""
    now = came if came < factor else factor
    for layer in stage.modules():
        if not isinstance(layer, nn.Conv2d):
            continue
        strided = max(layer.stride) > 1
        layer.stride = (1, 1)
        if max(layer.kernel_size) > 1 and not isinstance(layer.padding, str):
            layer.dilation = tuple(d * now for d in layer.dilation)
            layer.padding = tuple(p * now for p in layer.padding)
            if strided:
                now = factor
