"""Fold a frozen batch norm and a ReLU into the layer before them.

A batch norm in evaluation mode with frozen affine is a scale and a shift of channels. Folded into
the left singular vectors and the bias it costs nothing, and its input need not be kept for the
backward pass. Of a ReLU a byte a value is kept, not its output. That nothing lies between is for
`svftool.attaching.chains` to prove.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svftool.attaching.functions import Rectify

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_DONE, _RECTIFIED, _KEPT = "_svf_folded", "_svf_rectified", "_svf_affine"


@dataclass(frozen=True)
class Affine:
    """What a frozen batch norm does to each channel: ``scale * y + shift``."""

    norm: nn.Module
    scale: Tensor
    shift: Tensor

    def bias(self, bias: Tensor | None) -> Tensor:
        """Return the bias of the layer with the norm folded in."""
        return self.shift if bias is None else torch.addcmul(self.shift, self.scale, bias)

    def rows(self, kernel: Tensor, dim: int = 0) -> Tensor:
        """Scale the output channels of a kernel, its dimension `dim`."""
        shape = [1] * kernel.ndim
        shape[dim] = -1
        return kernel * self.scale.view(shape)

    def mark(self, output: Tensor) -> Tensor:
        """Mark an output in which the norm is folded already."""
        output.__dict__[_DONE] = self.norm
        return output


def mark_rectified(output: Tensor, relu: nn.Module) -> Tensor:
    """Mark an output that has gone through a ReLU already."""
    output.__dict__[_RECTIFIED] = relu
    return output


def affine_in(norm: nn.Module | None, dtype: torch.dtype) -> Affine | None:
    """Return what a batch norm does, in a dtype, or None where it is no frozen affine map."""
    if not isinstance(norm, NORMS) or norm.training:
        return None
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None:
        return None
    parts = [mean, variance, *norm.parameters(recurse=False)]
    if any(part.requires_grad for part in parts):
        return None
    key = (dtype, *[(part.data_ptr(), part._version) for part in parts])
    kept = norm.__dict__.get(_KEPT)
    if kept is None or kept[0] != key:
        kept = norm.__dict__[_KEPT] = (key, _affine(norm, mean, variance, dtype))
    affine: Affine = kept[1]
    return affine


@torch.no_grad()
def _affine(
    norm: nn.modules.batchnorm._BatchNorm, mean: Tensor, variance: Tensor, dtype: torch.dtype
) -> Affine:
    scale = (variance + norm.eps).rsqrt()
    shift = -mean * scale
    if norm.affine:
        scale, shift = scale * norm.weight, shift * norm.weight + norm.bias
    return Affine(norm, scale.to(dtype), shift.to(dtype))


class PassFolded:
    """The forward of a batch norm that lets through what it was folded into."""

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise `x`, unless that is done."""
        if x.__dict__.pop(_DONE, None) is self.norm:
            return x
        result: Tensor = type(self.norm).forward(self.norm, x)
        return result


class PassRectified:
    """The forward of a ReLU that lets through what it was folded into.

    Otherwise it computes the same, and keeps less of it for the backward pass.
    """

    def __init__(self, relu: nn.Module) -> None:
        self.relu = relu

    def __call__(self, x: Tensor) -> Tensor:
        """Clamp `x` at zero, unless that is done."""
        if x.__dict__.pop(_RECTIFIED, None) is self.relu:
            return x
        if not x.requires_grad or not torch.is_grad_enabled() or x._is_view():
            result: Tensor = type(self.relu).forward(self.relu, x)
        else:
            result = Rectify.apply(x, self.relu.inplace)
        return result


def install_passes(modules: Iterable[nn.Module]) -> None:
    """Let norms and ReLUs know an output that they are folded into."""
    for module in modules:
        if "forward" not in module.__dict__:
            kind = PassRectified if type(module) is nn.ReLU else PassFolded
            module.__dict__["forward"] = kind(module)


def unfold(model: nn.Module) -> None:
    """Give every norm and ReLU its own forward back."""
    for module in model.modules():
        module.__dict__.pop(_KEPT, None)
        if isinstance(module.__dict__.get("forward"), (PassFolded, PassRectified)):
            del module.__dict__["forward"]
