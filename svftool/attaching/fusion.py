"""Find, by a symbolic trace, what follows each layer and nothing else sees in between.

A norm or a ReLU may be fused into the layer before it where the layer's output has one user,
which is the norm or the ReLU, and no hook looks at what lies between. Where a model cannot be
traced, or is called in another way than it was traced, nothing is fused.
"""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from svftool.attaching.functions import Rectify, recomputing, region
from svftool.attaching.layer import PREFIX

# Fuse a frozen batch norm and a ReLU with the layer before them.


NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_DONE, _RECTIFIED = "_svf_fused", "_svf_rectified"


@dataclass(frozen=True)
class Affine:
    """What a frozen batch norm does to each channel: ``scale * y + shift``."""

    norm: nn.Module
    scale: Tensor
    shift: Tensor

    def bias(self, bias: Tensor | None) -> Tensor:
        """Return the bias of the layer with the norm fused in."""
        return self.shift if bias is None else torch.addcmul(self.shift, self.scale, bias)

    def rows(self, kernel: Tensor, dim: int = 0) -> Tensor:
        """Scale the output channels of a kernel, its dimension `dim`."""
        shape = [1] * kernel.ndim
        shape[dim] = -1
        return kernel * self.scale.view(shape)

    def mark(self, output: Tensor) -> Tensor:
        """Mark an output in which the norm is fused already."""
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
    # Made anew in every pass: statistics may be written to without a trace, by averages say.
    return _affine(norm, mean, variance, dtype)


@torch.no_grad()
def _affine(
    norm: nn.modules.batchnorm._BatchNorm, mean: Tensor, variance: Tensor, dtype: torch.dtype
) -> Affine:
    # As few operations as there can be: on a GPU, launching them takes longer than they do.
    scale = (variance + norm.eps).rsqrt_()
    if norm.affine:
        scale = scale * norm.weight
        shift = torch.addcmul(norm.bias, mean, scale, value=-1.0)
    else:
        shift = -mean * scale
    return Affine(norm, scale.to(dtype), shift.to(dtype))


class Pass:
    """Knows an input in which the module's work was done by the layer before it.

    Where the layer is outside a checkpointed region and the module inside, the region is computed
    again from an input that is just as it was, without its mark.
    """

    mark: str
    crossed = False

    def done(self, x: Tensor, module: nn.Module) -> bool:
        """Whether there is nothing left to do."""
        if x.__dict__.pop(self.mark, None) is module:
            self.crossed = region() is not None
            return True
        if recomputing():
            return self.crossed
        if torch.is_grad_enabled() or region() is not None:
            self.crossed = False
        return False


class PassFused(Pass):
    """The forward of a batch norm that lets through what it was fused into."""

    mark = _DONE

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise `x`, unless that is done."""
        if self.done(x, self.norm):
            return x
        result: Tensor = type(self.norm).forward(self.norm, x)
        return result


class PassRectified(Pass):
    """The forward of a ReLU that lets through what it was fused into.

    Otherwise it computes the same, and keeps less of it for the backward pass.
    """

    mark = _RECTIFIED

    def __init__(self, relu: nn.Module) -> None:
        self.relu = relu

    def __call__(self, x: Tensor) -> Tensor:
        """Clamp `x` at zero, unless that is done."""
        if self.done(x, self.relu):
            return x
        if not x.requires_grad or not torch.is_grad_enabled() or x._is_view():
            result: Tensor = type(self.relu).forward(self.relu, x)
        else:
            result = Rectify.apply(x, self.relu.inplace)
        return result


def install_passes(modules: Iterable[nn.Module]) -> None:
    """Let norms and ReLUs know an output that they are fused into."""
    for module in modules:
        if "forward" not in module.__dict__:
            kind = PassRectified if type(module) is nn.ReLU else PassFused
            module.__dict__["forward"] = kind(module)


def unfuse(model: nn.Module) -> None:
    """Give every norm and ReLU its own forward back."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), (PassFused, PassRectified)):
            del module.__dict__["forward"]


logger = logging.getLogger(__name__)


class OwnHook:
    """A hook of this package, which looks at no activations."""


@dataclass(frozen=True)
class Chain:
    """Modules that follow a layer; each is the only user of what comes before it.

    Attributes
    ----------
    layer : str
        Path of the layer.
    norm, relu : str or None
        Paths of what may be fused into it, in this order.
    to_norm, to_relu : tuple of (str, bool)
        Modules that would see what lies between: path, and whether they see it leave (or enter).
    """

    layer: str
    norm: str | None
    relu: str | None
    to_norm: tuple[tuple[str, bool], ...] = ()
    to_relu: tuple[tuple[str, bool], ...] = ()


@dataclass(frozen=True)
class Fusion:
    """What is fused into a layer in one call of the model."""

    layer: nn.Module
    norm: nn.Module | None
    relu: nn.Module | None


class FusionPlan:
    """What is fused into each layer of a model, for each way the model is called.

    Parameters
    ----------
    candidates : sequence of str
        Paths of modules whose weight is attached, and attached to no other module.
    """

    def __init__(self, candidates: Sequence[str]) -> None:
        self.candidates = tuple(candidates)
        self._traced: dict[bool, list[Chain]] = {}

    def fusions(
        self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[Fusion]:
        """Yield what may be fused into each layer in this call of `root`.

        Parameters
        ----------
        root : nn.Module
            The model that is about to run.
        args, kwargs
            What it is called with; only its required arguments are covered by the trace.
        """
        if not self.candidates or not _as_traced(root, args, kwargs):
            return
        if root.training not in self._traced:
            self._traced[root.training] = _trace_chains(root, set(self.candidates))
        for chain in self._traced[root.training]:
            norm = chain.norm if _unseen(root, chain.to_norm) else None
            whole = norm == chain.norm and chain.relu is not None
            relu = chain.relu if whole and _unseen(root, chain.to_relu) else None
            if norm is not None or relu is not None:
                yield Fusion(
                    _inner(root, chain.layer),
                    None if norm is None else _inner(root, norm),
                    None if relu is None else _inner(root, relu),
                )


def _inner(root: nn.Module, path: str) -> nn.Module:
    """Return a module by its path, for every layer in every pass: ``get_submodule`` checks more."""
    module: Any = root
    for name in path.split("."):
        module = module._modules[name]
    return cast(nn.Module, module)


def _unseen(root: nn.Module, watchers: Sequence[tuple[str, bool]]) -> bool:
    for path, leaves in watchers:
        module = _inner(root, path)
        hooks = module._forward_hooks if leaves else module._forward_pre_hooks
        if module._backward_hooks or module._backward_pre_hooks:
            return False
        if any(not isinstance(hook, OwnHook) for hook in hooks.values()):
            return False
    return True


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


def _trace_chains(root: nn.Module, candidates: set[str]) -> list[Chain]:
    modules = dict(root.named_modules())
    if not any(isinstance(module, (*NORMS, nn.ReLU)) for module in modules.values()):
        return []
    optional = {
        p.name: p.default
        for p in inspect.signature(root.forward).parameters.values()
        if p.default is not p.empty
    }
    try:
        graph = _Tracer().trace(root, concrete_args=optional)
    except Exception as error:  # noqa: BLE001 (a traced model may raise anything)
        logger.debug("nothing is fused, tracing failed: %s", error)
        return []
    calls = [node for node in graph.nodes if node.op == "call_module"]
    counts = Counter(id(modules[node.target]) for node in calls)
    once = {node.target for node in calls if counts[id(modules[node.target])] == 1}
    found = [
        chain
        for node in calls
        if node.target in candidates & once and (chain := _chain_after(node, modules, once))
    ]
    relus = [modules[node.target] for node in calls if type(modules[node.target]) is nn.ReLU]
    install_passes([*(modules[chain.norm] for chain in found if chain.norm), *relus])
    return found


def _chain_after(layer: fx.Node, modules: Mapping[str, nn.Module], once: set[str]) -> Chain | None:
    """Follow the only users of a layer's output to a norm and a ReLU."""
    paths, norm = [str(layer.target)], None
    to_norm: tuple[tuple[str, bool], ...] = ()
    node = _only_user(layer)
    while node is not None:
        path = str(node.target)
        kind = type(modules[path])
        paths.append(path)
        if kind is nn.ReLU:
            return Chain(paths[0], norm, path, to_norm, _watchers(paths))
        if kind in NORMS and norm is None and path in once:
            norm, to_norm = path, _watchers(paths)
        elif kind is not nn.Identity:
            break
        node = _only_user(node)
    return None if norm is None else Chain(paths[0], norm, None, to_norm)


def _only_user(node: fx.Node) -> fx.Node | None:
    """Return the module call that alone uses a node's output, as its only argument."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    alone = user.op == "call_module" and len(user.args) == 1 and not user.kwargs
    return user if alone else None


def _watchers(paths: Sequence[str]) -> tuple[tuple[str, bool], ...]:
    """Return every module that what lies between the first and the last path leaves or enters."""
    leaves = [m for path in paths[:-1] for m in _lineage(path) if m not in _lineage(paths[-1])]
    enters = [m for path in paths[1:] for m in _lineage(path) if m not in _lineage(paths[0])]
    return (*((path, True) for path in leaves), *((path, False) for path in enters))


def _lineage(path: str) -> list[str]:
    """Return a module's path and those of all that contain it, but the root's."""
    names = path.split(".")
    return [".".join(names[: end + 1]) for end in range(len(names))]
