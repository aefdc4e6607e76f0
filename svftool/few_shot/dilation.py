"""Strides of a backbone: where they are, and how they become dilation."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from svftool.errors import ModelError, shortlist
from svftool.few_shot.features import FeatureNames, FeaturePlan, is_vgg16, plan_features
from svftool.few_shot.trace import Trace, watch

# Where a stage loses resolution: its innermost modules that give a smaller map than they get.


def strided_modules(model: nn.Module, stage: str, trace: Trace) -> list[str]:
    """Find the modules that take a stage to its stride.

    A module that pools and is upsampled again inside a block, or the global pool of a channel
    attention, is none of them: its map is smaller than the stage's own.

    Parameters
    ----------
    model : nn.Module
        The backbone.
    stage : str
        A module of it with a larger stride at its output than at its input.
    trace : Trace
        Of an image that went through the model.

    Returns
    -------
    list of str
        Names, in the order of their definition; a module without such parts stands for itself.
    """
    end = trace.stride(stage)
    found = []
    for part in _parts(model.get_submodule(stage), stage, trace):
        came, left = trace.stride_before(part), trace.stride_after(part)
        if came is not None and left is not None and came < left <= end:
            found += strided_modules(model, part, trace)
    return found or [stage]


def _parts(module: nn.Module, name: str, trace: Trace) -> Iterator[str]:
    """Yield the next modules inside one that ran themselves; a list of modules does not."""
    for child, inner in module.named_children():
        part = f"{name}.{child}"
        if part in trace.outputs:
            yield part
        else:
            yield from _parts(inner, part, trace)


# An average pool without its stride.


class DilatedAvgPool2d(nn.Module):
    """Means of the windows of an average pool around every position, not every stride-th.

    The map keeps its size, so that what is added to it still fits: the shortcuts of ResNet-D pool
    where the blocks beside them have a strided convolution. What a window counts at the border is
    what the pool counts there.

    Parameters
    ----------
    pool : nn.AvgPool2d
        Gives the windows, and what they count.

    Attributes
    ----------
    dilation : (int, int)
        Distance of a window's positions; 1 until it is set.
    padding : (int, int)
        Positions between a window's first and its own; a multiple of the dilation.
    """

    def __init__(self, pool: nn.AvgPool2d) -> None:
        super().__init__()
        self.kernel_size = _pair(pool.kernel_size)
        self.padding = _pair(pool.padding)
        self.dilation = (1, 1)
        self.count_include_pad = pool.count_include_pad
        self.divisor_override = pool.divisor_override

    def forward(self, maps: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W) means."""
        before, after = self._margins()
        sums = self._sums(F.pad(maps, _sides(before, after)), maps.shape[-2:])
        if self.divisor_override:
            return sums / self.divisor_override
        ones = maps.new_ones(1, 1, *maps.shape[-2:])
        if self.count_include_pad:
            counted = (min(before[0], after[0]), min(before[1], after[1]))
            ones = F.pad(ones, _sides(before, counted), value=1)
            after = (after[0] - counted[0], after[1] - counted[1])
            before = (0, 0)
        return sums / self._sums(F.pad(ones, _sides(before, after)), maps.shape[-2:])

    def extra_repr(self) -> str:
        """Return windows, dilation and padding as the layers of torch do."""
        return f"{self.kernel_size}, dilation={self.dilation}, padding={self.padding}"

    def _margins(self) -> tuple[tuple[int, int], tuple[int, int]]:
        high, wide = (
            (k - 1) * d - p
            for k, d, p in zip(self.kernel_size, self.dilation, self.padding, strict=True)
        )
        return self.padding, (high, wide)

    def _sums(self, padded: Tensor, size: tuple[int, ...]) -> Tensor:
        (rows, columns), (down, right) = self.kernel_size, self.dilation
        height, width = size
        windows = [
            padded[..., i * down : i * down + height, j * right : j * right + width]
            for i in range(rows)
            for j in range(columns)
        ]
        total = windows[0]
        for window in windows[1:]:
            total = total + window
        return total


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _sides(before: tuple[int, int], after: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the margins in the order of `torch.nn.functional.pad`: the last dimension first."""
    return before[1], after[1], before[0], after[0]


OUTPUT_STRIDE, VGG_STRIDE = 8, 16


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
        Pixels a feature. By default 8, or less where the backbone's features have less; VGG-16
        keeps its 16 and rounds its pools up, as in PFENet.

    Raises
    ------
    ModelError
        If the features cannot be found or the stride cannot be reached.
    """
    usual = OUTPUT_STRIDE
    if is_vgg16(model):
        usual = VGG_STRIDE
        for layer in model.modules():
            if isinstance(layer, nn.MaxPool2d):
                layer.ceil_mode = True
    deepest = max(plan_features(model, names).strides.values())
    if output_stride is not None and output_stride > deepest:
        raise ModelError(
            f"{type(model).__name__}: {shortlist(names.all)} end at stride {deepest}, expected "
            f"at least the output stride of {output_stride}. Use --output-stride {deepest}."
        )
    return dilate(model, names, output_stride or min(usual, deepest))


def dilate(model: nn.Module, names: FeatureNames, output_stride: int) -> FeaturePlan:
    """Trade the strides beyond `output_stride` for dilation, in place.

    In a stage that would go beyond, strided convolutions and average pools get stride 1, and those
    that then see a finer map than before the dilation that restores their field of view: at the
    positions that the network had its outputs are exactly what they were. What a frozen network
    computes must not change. SVF's code dilates ImageNet's ResNets like this; PFENet and BAM dilate
    the strided convolution too, which is another network than the one that was trained. For BAM's
    base networks the same argument points the other way: they were trained with that convolution
    dilated, and so are built with it (`svftool.few_shot.paper_networks.PspNet`).

    Parameters
    ----------
    model : nn.Module
        The backbone.
    names : FeatureNames
        Its features.
    output_stride : int
        8 or 16, say.

    Returns
    -------
    FeaturePlan
        Of the backbone as it is now.

    Raises
    ------
    ModelError
        If the backbone is no chain of stages, one stage passes `output_stride` half-way, a max pool
        or a function loses the resolution, or the stride was not reached.
    """
    plan = plan_features(model, names)
    deepest = max(plan.strides.values())
    if deepest <= output_stride:
        return plan
    if len(plan.stages) == 1:
        raise ModelError(
            f"{type(model).__name__}: {shortlist(names.all)} are no chain of modules, expected one "
            f"to reach an output stride of {output_stride}. Use --output-stride {deepest}."
        )
    before = watch(model, names.all)
    for name in _strided(model, plan, before, output_stride):
        _unstride(model, name)
    try:
        _widen(model, before, watch(model, names.all))
        reached = plan_features(model, names)
    except ModelError as error:
        raise ModelError(
            f"{error}, expected it to once its strides are traded for dilation. "
            f"Use --output-stride {deepest}."
        ) from error
    _require_strides(model, plan, reached, output_stride)
    return reached


def _strided(model: nn.Module, plan: FeaturePlan, trace: Trace, output_stride: int) -> list[str]:
    """Name what is to lose its stride; the deepest obstacle is told first, for its way out."""
    found: list[str] = []
    for stage in reversed(plan.stages[1:]):
        came, stride = trace.stride_before(stage) or 1, trace.stride(stage)
        if stride <= max(came, output_stride):
            continue
        if came < output_stride:
            raise ModelError(
                f"{stage}: goes from stride {came} to {stride}, expected a stage that ends at "
                f"{output_stride}. Use --output-stride {stride}."
            )
        for name in strided_modules(model, stage, trace):
            module = model.get_submodule(name)
            if not isinstance(module, nn.Conv2d | nn.AvgPool2d):
                raise ModelError(
                    f"{name}: {type(module).__name__} goes from stride {came} to {stride}, "
                    "expected a convolution or an average pool there to reach an output stride of "
                    f"{output_stride}. Use --output-stride {stride}."
                )
            found.append(name)
    return found


def _unstride(model: nn.Module, name: str) -> None:
    module = model.get_submodule(name)
    if isinstance(module, nn.AvgPool2d):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, DilatedAvgPool2d(module))
    else:
        module.stride = (1, 1)  # type: ignore[assignment]


def _widen(model: nn.Module, before: Trace, after: Trace) -> None:
    """Dilate what sees a finer map than before by how much finer it is."""
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Conv2d | DilatedAvgPool2d) or max(layer.kernel_size) == 1:
            continue
        came, comes = before.stride_before(name), after.stride_before(name)
        if came is not None and comes is not None and came > comes:
            _dilate_layer(layer, came // comes)


def _dilate_layer(layer: nn.Conv2d | DilatedAvgPool2d, factor: int) -> None:
    layer.dilation = _times(layer.dilation, factor)
    if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
        # Other paddings than zeros are added by hand, from what the constructor noted.
        noted = layer._reversed_padding_repeated_twice
        layer._reversed_padding_repeated_twice = [p * factor for p in noted]
    if not isinstance(layer.padding, str):
        layer.padding = _times(layer.padding, factor)


def _times(sizes: tuple[int, ...], factor: int) -> tuple[int, int]:
    high, wide = sizes
    return high * factor, wide * factor


def _require_strides(
    model: nn.Module, before: FeaturePlan, after: FeaturePlan, output_stride: int
) -> None:
    for name, stride in before.strides.items():
        wanted, found = min(stride, output_stride), after.strides[name]
        if found != wanted:
            way_out = max(after.strides.values())
            raise ModelError(
                f"{type(model).__name__}: {name} has stride {found} after dilation, expected "
                f"{wanted}. Use --output-stride {way_out}."
            )
