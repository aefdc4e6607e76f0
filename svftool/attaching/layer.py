"""The state of attached layers: frozen singular vectors and the trainable singular values.

`AttachedLayer` is one decomposed tensor of the file. `AttachedWeight` is one parameter of the live
model, made of one such tensor or, where a library packs weights, of several.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn

from svftool.attaching.functions import ComposeWeight
from svftool.attaching.parametrisation import Band, Parametrisation
from svftool.checkpoints.views import View
from svftool.factors import LayerFactors, add_delta

PREFIX = "svf_"
"""A parameter ``weight`` has its `AttachedWeight` beside it as submodule ``svf_weight``."""

Mode = Literal["auto", "factored", "composed", "residual"]


@dataclass(frozen=True)
class Region:
    """Where a tensor of the file lies in a live parameter, as a strided view of it.

    Attributes
    ----------
    offset : int
        Elements before the first.
    shape : tuple of int or None
        Of the view, which is the file's tensor; None for the whole parameter as it stands.
    stride : tuple of int
        Elements from one index to the next, in each dimension.
    """

    offset: int = 0
    shape: tuple[int, ...] | None = None
    stride: tuple[int, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether the live parameter is the file's tensor as it stands."""
        return self.shape is None

    def of(self, live: Tensor) -> Tensor:
        """Return the region in the file's layout: a view, if `live` is contiguous."""
        if self.shape is None:
            return live
        dense = live.contiguous()
        return dense.as_strided(self.shape, self.stride, dense.storage_offset() + self.offset)


WHOLE = Region()
"""All of a live parameter, as it stands."""


def is_own(name: str) -> bool:
    """Whether a parameter name is the model's own, not one of svftool's."""
    return f".{PREFIX}" not in f".{name}"


class KeepsDtype(nn.Module):
    """A module without entries in state dictionaries, some of whose parameters keep their dtype."""

    exempt: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {name: self._parameters[name] for name in self.exempt}
        before = {name: value.detach() for name, value in kept.items() if value is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in before.items():
            parameter = self._parameters[name]
            if parameter is not None and parameter.dtype != value.dtype:
                parameter.data = value.to(parameter.device)
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass


class AttachedLayer(KeepsDtype):
    """One decomposed tensor with trainable singular values.

    Parameters
    ----------
    name : str
        Tensor name as in the file.
    factors : LayerFactors
        U (..., m, k), S (..., k) and Vh (..., k, n).
    shape : tuple of int
        Shape of the tensor in the file.
    view : {"matrix", "batch"}
        How the tensor is seen as matrices.
    dtype : torch.dtype
        Of the live weight; the frozen vectors take it.
    exact : bool
        Whether the factors may replace the weight.
    parametrisation : {"scale", "shift", "absolute"}
        How `theta` becomes singular values.
    band : Band
        Which singular values are trained.
    nonnegative : bool
        Whether singular values are kept from going below zero.

    Attributes
    ----------
    theta : (..., b) Parameter
        What is trained, float32; zero at the base (the singular values themselves, if absolute).
    U : (..., m, k) Parameter
        Frozen.
    Vh : (..., k, n) Parameter
        Frozen; for the matrix view with the tensor's own trailing dimensions in place of n.
    S_base : (..., k) Parameter
        Frozen, float32, or float64 in a float64 model.
    """

    exempt = ("theta", "S_base", "offset")

    def __init__(
        self,
        name: str,
        factors: LayerFactors,
        *,
        shape: tuple[int, ...],
        view: View,
        dtype: torch.dtype,
        exact: bool,
        parametrisation: Parametrisation = "scale",
        band: Band | None = None,
        nonnegative: bool = False,
    ) -> None:
        super().__init__()
        self.name = name
        self.shape = shape
        self.view: View = view
        self.exact = exact
        self.parametrisation: Parametrisation = parametrisation
        self.nonnegative = nonnegative
        self.band = (band or Band()).of(factors.S.shape[-1])
        rest = shape[1:] if view == "matrix" else factors.Vh.shape[-1:]
        S = factors.S.to(torch.float64 if dtype == torch.float64 else torch.float32)
        self.U = _frozen(factors.U.to(dtype).contiguous())
        self.Vh = _frozen(factors.Vh.to(dtype).reshape(*factors.Vh.shape[:-1], *rest).contiguous())
        self.S_base = _frozen(S.clone())
        self.offset = _frozen(torch.zeros_like(S))
        self._beside = False
        start = S[..., self.band]
        self.theta = nn.Parameter(
            start.clone() if parametrisation == "absolute" else torch.zeros_like(start)
        )

    def extra_repr(self) -> str:
        """Describe the layer in the model's repr."""
        return f"{self.name}, rank={self.rank}, {self.parametrisation}"

    def delta(self) -> Tensor:
        """Return ``S - S_base``, (..., k), differentiable in `theta`; zero where untouched."""
        base = self.S_base if self._all else self.S_base[..., self.band]
        if self.parametrisation == "scale":
            change = self.theta * base
        else:
            change = self.theta if self.parametrisation == "shift" else self.theta - base
        if not self._all:
            change = nn.functional.pad(change, (self.band.start, self.rank - self.band.stop))
        if self._beside:
            change = change + self.offset
        if self.nonnegative:
            # Clamped in value, not in gradient, so that a value at zero can come back.
            change = torch.maximum(change, -self.S_base).detach() + (change - change.detach())
        return change

    def values(self) -> Tensor:
        """Return the singular values, shape (..., k), differentiable in `theta`."""
        return self.S_base + self.delta()

    @property
    def rank(self) -> int:
        """Number of singular values of the matrix, or of each, k."""
        return int(self.S_base.shape[-1])

    @property
    def _all(self) -> bool:
        return self.theta.shape == self.S_base.shape

    @torch.no_grad()
    def set_delta(self, delta: Tensor) -> None:
        """Set ``S - S_base``; what `theta` cannot express is kept beside it, untrained."""
        delta = delta.to(self.S_base)
        inside = delta[..., self.band]
        base = self.S_base[..., self.band]
        if self.parametrisation == "scale":
            theta = torch.where(base > 0, inside / base, torch.zeros_like(base))
        else:
            theta = inside if self.parametrisation == "shift" else base + inside
        self._beside = False
        self.theta.copy_(theta)
        self.offset.copy_(delta - self.delta())
        self._beside = bool(self.offset.any())

    def factors(self) -> LayerFactors:
        """Return the factors as matrices, with the base's singular values."""
        Vh = self.Vh.detach()
        flat = Vh.reshape(Vh.shape[0], -1) if self.view == "matrix" else Vh
        return LayerFactors(self.U.detach(), self.S_base.detach(), flat)

    def change(self, delta: Tensor) -> Tensor:
        """Return ``U diag(delta) Vh`` in the shape of the file's tensor and the vectors' dtype."""
        matrices = self.factors()
        scaled = matrices.U * delta.to(matrices.U.dtype).unsqueeze(-2)
        return (scaled @ matrices.Vh).reshape(self.shape)

    def project(self, gradient: Tensor) -> Tensor:
        """Return ``diag(U' G V)`` for a tensor `gradient` of the file's shape, like `S_base`."""
        matrices = self.factors()
        rows = gradient.reshape(*matrices.U.shape[:-1], matrices.Vh.shape[-1]).to(matrices.U.dtype)
        inner = matrices.U.mT @ rows
        return (inner * matrices.Vh).sum(-1, dtype=self.S_base.dtype)


class AttachedWeight(KeepsDtype):
    """One parameter of the live model whose value follows trainable singular values.

    Attributes
    ----------
    parts : ModuleList of AttachedLayer
        The file's tensors that lie in the parameter.
    regions : tuple of Region
        Where each of them lies.
    mode : {"auto", "factored", "composed", "residual"}
        The way that was asked for.
    """

    def __init__(
        self, parts: Sequence[AttachedLayer], regions: Sequence[Region], mode: Mode
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.regions = tuple(regions)
        self.mode: Mode = mode
        self._dense: tuple[object, Tensor] | None = None
        self._merged: tuple[object, weakref.ref[Tensor]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_dense": None, "_merged": None}

    def layers(self) -> list[tuple[AttachedLayer, Region]]:
        """Return each part with the region it lies in."""
        return [(cast(AttachedLayer, p), r) for p, r in zip(self.parts, self.regions, strict=True)]

    def copy_of(self, base: Tensor) -> Tensor:
        """Copy the base's weight into a layout in which every region is a view."""
        whole = all(region.whole for region in self.regions)
        layout = torch.preserve_format if whole else torch.contiguous_format
        return base.detach().clone(memory_format=layout)

    @property
    def single(self) -> AttachedLayer | None:
        """The one layer that is the whole parameter, where there is one."""
        layer, region = self.layers()[0]
        alone = len(self.parts) == 1 and region.whole and layer.view == "matrix"
        return layer if alone else None

    @property
    def trains(self) -> bool:
        """Whether any singular value of the parameter requires a gradient."""
        return any(layer.theta.requires_grad for layer, _ in self.layers())

    def compose(self, base: Tensor) -> Tensor:
        """Return the weight of the present singular values, differentiable in them."""
        deltas = [layer.delta() for layer, _ in self.layers()]
        composed: Tensor = ComposeWeight.apply(self, base.detach(), *deltas)
        return composed

    @torch.no_grad()
    def dense(self, base: Tensor) -> Tensor:
        """Return the weight of the present singular values, a constant kept until they change."""
        key = self._key(base)
        if self._dense is None or self._dense[0] != key:
            # An inference tensor would be of no use to a later pass that records gradients.
            with torch.inference_mode(False):
                self._dense = (key, self.compose(base) if self._touched() else base.detach())
        return self._dense[1]

    def forget(self) -> None:
        """Drop what `dense` keeps."""
        self._dense = None

    @torch.no_grad()
    def merged(self, base: Tensor) -> Tensor:
        """Return the weight as merging writes it: the delta added in float64, rounded once.

        The same tensor is returned as long as the caller keeps the last one, so that tied
        parameters stay one tensor in a state dictionary.
        """
        if not self._touched():
            return base.detach()
        key = self._key(base)
        kept = self._merged[1]() if self._merged is not None and self._merged[0] == key else None
        if kept is not None:
            return kept
        merged = self.copy_of(base)
        for layer, region in self.layers():
            view = region.of(merged)
            # As a tuned file says it: singular values in float32, their difference in float64.
            base_values = layer.S_base.float().double()
            delta = layer.values().float().double() - base_values
            view.copy_(add_delta(view, layer.factors(), delta, view=layer.view).weight)
        self._merged = (key, weakref.ref(merged))
        return merged

    @torch.no_grad()
    def absorb(self, base: Tensor, weight: Tensor) -> float:
        """Set the singular values to those of a merged `weight`, if it is one.

        Returns
        -------
        float
            What singular values do not explain of the difference from `base`, relative to what
            rounding explains. Above 1 the weight is no merge of these factors; nothing is set.
        """
        change = (weight.to(base.device, torch.float64) - base.detach().double()).contiguous()
        rounding = torch.finfo(base.dtype).eps * float(base.detach().double().norm())
        allowed = 4 * rounding + 1e-3 * float(change.norm())
        deltas = []
        for layer, region in self.layers():
            part = region.of(change)
            deltas.append(layer.project(part))
            part.sub_(layer.change(deltas[-1]))
        share = float(change.norm()) / allowed if allowed > 0.0 else 0.0
        if share <= 1.0:
            for (layer, _), delta in zip(self.layers(), deltas, strict=True):
                layer.set_delta(delta)
        return share

    def _touched(self) -> bool:
        return any(bool(layer.delta().any()) for layer, _ in self.layers())

    def _key(self, base: Tensor) -> tuple[object, ...]:
        versions = [
            (x.data_ptr(), x._version)
            for layer, _ in self.layers()
            for x in (layer.theta, layer.offset)
        ]
        return (base.data_ptr(), base._version, base.dtype, *versions)


def _frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)
