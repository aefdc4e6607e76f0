"""Fold frozen batch norm into the layer before it, where tracing proves that nothing lies between.

A batch norm in evaluation mode with frozen affine is a scale and a shift of channels. Folded into
the left singular vectors and the bias it costs nothing, and its input need not be kept for the
backward pass. The proof is a symbolic trace: the layer's output has one user, the norm. Where the
model cannot be traced, or is called in another way than it was traced, nothing is folded.
"""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from svftool.attaching.region import PREFIX

logger = logging.getLogger(__name__)

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_DONE, _KEPT = "_svf_folded", "_svf_affine"


@dataclass(frozen=True)
class Affine:
    """What a frozen batch norm does to each channel: ``scale * y + shift``."""

    norm: nn.Module
    scale: Tensor
    shift: Tensor

    def bias(self, bias: Tensor | None) -> Tensor:
        """Return the bias of the layer with the norm folded in."""
        return self.shift if bias is None else torch.addcmul(self.shift, self.scale, bias)

    def rows(self, left: Tensor) -> Tensor:
        """Scale the output channels of a kernel whose first dimension they are."""
        return left * self.scale.view(-1, *[1] * (left.ndim - 1))

    def mark(self, output: Tensor) -> Tensor:
        """Mark an output in which the norm is folded already."""
        output.__dict__[_DONE] = self.norm
        return output


def affine_in(norm: nn.Module | None, dtype: torch.dtype) -> Affine | None:
    """Return what a batch norm does, in a dtype, or None where it is no frozen affine map."""
    if not isinstance(norm, _NORMS) or norm.training:
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


class FoldPlan:
    """Which layers of a model have a norm folded in, for each way the model is called.

    Parameters
    ----------
    candidates : sequence of str
        Paths of modules whose weight is attached, and attached to no other module.
    """

    def __init__(self, candidates: Sequence[str]) -> None:
        self.candidates = tuple(candidates)
        self._traced: dict[bool, list[tuple[str, str]]] = {}

    def pairs(
        self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[tuple[nn.Module, nn.Module]]:
        """Return each layer and the norm that may be folded into it in this call of `root`.

        Parameters
        ----------
        root : nn.Module
            The model that is about to run.
        args, kwargs
            What it is called with; only its required arguments are covered by the trace.
        """
        if not self.candidates or not _as_traced(root, args, kwargs):
            return []
        if root.training not in self._traced:
            self._traced[root.training] = _trace_pairs(root, set(self.candidates))
        found = []
        for path, norm_path in self._traced[root.training]:
            layer, norm = root.get_submodule(path), root.get_submodule(norm_path)
            # Somebody else's hook would see what is between the two.
            if len(layer._forward_hooks) == 1 and not norm._forward_pre_hooks:
                found.append((layer, norm))
        return found


def _as_traced(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    try:
        given = inspect.signature(root.forward).bind(*args, **kwargs).arguments
    except TypeError:
        return False
    return set(given) <= set(_required(root))


def _required(root: nn.Module) -> list[str]:
    parameters = inspect.signature(root.forward).parameters.values()
    return [
        p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]


class _Tracer(fx.Tracer):
    """Stops at modules without children, and runs no hooks: parameters are no tensors here."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        children = [name for name in m._modules if not name.startswith(PREFIX)]
        return not children or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        return super().call_module(m, m.forward, args, kwargs)


def _trace_pairs(root: nn.Module, candidates: set[str]) -> list[tuple[str, str]]:
    if not any(isinstance(module, _NORMS) for module in root.modules()):
        return []
    optional = {
        p.name: p.default
        for p in inspect.signature(root.forward).parameters.values()
        if p.default is not p.empty
    }
    try:
        graph = _Tracer().trace(root, concrete_args=optional)
    except Exception as error:  # noqa: BLE001 (a traced model may raise anything)
        logger.debug("no norm is folded, tracing failed: %s", error)
        return []
    calls = [node for node in graph.nodes if node.op == "call_module"]
    modules = dict(root.named_modules())
    counts = Counter(id(modules[node.target]) for node in calls)
    found = []
    for node in calls:
        layer = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        norm = modules[node.target]
        if not isinstance(layer, fx.Node) or layer.op != "call_module":
            continue
        once = counts[id(norm)] == counts[id(modules[layer.target])] == 1
        if type(norm) in _NORMS and once and len(layer.users) == 1 and layer.target in candidates:
            found.append((layer.target, node.target))
    for _, path in found:
        norm = root.get_submodule(path)
        if "forward" not in norm.__dict__:
            norm.__dict__["forward"] = PassFolded(norm)
    return found


def unfold(model: nn.Module) -> None:
    """Give every norm its own forward back."""
    for module in model.modules():
        module.__dict__.pop(_KEPT, None)
        if isinstance(module.__dict__.get("forward"), PassFolded):
            del module.__dict__["forward"]
