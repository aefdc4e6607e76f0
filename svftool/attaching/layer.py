"""One decomposed tensor of the file: frozen singular vectors and trainable singular values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svftool.attaching.extras import Extras
from svftool.attaching.functions import kept_apart, region
from svftool.attaching.keeping import KeepsDtype
from svftool.checkpoints import View
from svftool.choices.singular_values import Band, Parametrisation
from svftool.factors import LayerFactors, SpectralChange


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
    extras : Extras or None
        What is trained beside singular values, or in place of them.
    values : bool
        Whether `theta` is trained.

    Attributes
    ----------
    theta : (..., b) Parameter
        What is trained, float32; zero at the base (the singular values themselves, if absolute).
    extras : Extras
        What the layer has beside its singular values, trained or taken from a tuned file.
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
        extras: Extras | None = None,
        values: bool = True,
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
        self._given: tuple[tuple[Tensor, ...], SpectralChange] | None = None
        start = S[..., self.band]
        self._values = values and start.shape[-1] > 0
        self.theta = nn.Parameter(
            start.clone() if parametrisation == "absolute" else torch.zeros_like(start),
            requires_grad=self._values,
        )
        self.extras = Extras() if extras is None else extras

    def extra_repr(self) -> str:
        """Describe the layer in the model's repr."""
        return f"{self.name}, rank={self.rank}, {self.parametrisation}"

    def delta(self) -> Tensor:
        """Return ``S - S_base``, (..., k), differentiable in `theta` alone; zero if untouched."""
        if torch.is_grad_enabled() and region() is not None:
            with kept_apart():
                return self._delta()
        return self._delta()

    def _delta(self) -> Tensor:
        # Detached, so that no ``requires_grad_(True)`` on the whole model trains what is frozen.
        frozen = self.S_base.detach()
        base = frozen if self._all else frozen[..., self.band]
        if self.parametrisation == "scale":
            change = self.theta * base
        else:
            change = self.theta if self.parametrisation == "shift" else self.theta - base
        if not self._all:
            change = nn.functional.pad(change, (self.band.start, self.rank - self.band.stop))
        if self._beside:
            change = change + self.offset.detach()
        diagonal = self.extras.diagonal(self.rank)
        if diagonal is not None:
            change = change + diagonal
        if self.nonnegative:
            # Clamped in value, not in gradient, so that a value at zero can come back.
            change = torch.maximum(change, -frozen).detach() + (change - change.detach())
        return change

    def values(self) -> Tensor:
        """Return the singular values, shape (..., k), differentiable in `theta` alone."""
        return self.S_base.detach() + self.delta()

    @property
    def plain(self) -> bool:
        """Whether the layer has singular values alone."""
        return self.extras.empty

    def present(self) -> SpectralChange:
        """Return what changes now, differentiable in what is trained."""
        return self.extras.present(self.delta())

    @property
    def tells(self) -> bool:
        """Whether a merged weight tells what it is made of: no scales and no remainder hide it."""
        now = self.present()
        return now.linear and now.B is None

    def moving(self) -> tuple[Tensor, ...]:
        """Return the small tensors that the weight follows."""
        theta = self.theta.detach()
        found = (theta, self.offset.detach()) if self._beside else (theta,)
        return found if self.plain else (*found, *self.extras.moving())

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return what is trained, by what it is: ``S``, ``row``, ``entry`` ..."""
        values = {"S": self.theta} if self._values else {}
        return values | self.extras.trainable()

    def frozen(self) -> tuple[nn.Parameter, ...]:
        """Return what is never trained."""
        theta = () if self._values else (self.theta,)
        return (self.U, self.Vh, self.S_base, self.offset, *theta, *self.extras.frozen())

    @property
    def rank(self) -> int:
        """Number of singular values of the matrix, or of each, k."""
        return int(self.S_base.shape[-1])

    @property
    def _all(self) -> bool:
        return self.theta.shape == self.S_base.shape

    @torch.no_grad()
    def merging_change(self) -> SpectralChange:
        """Return what a merge adds, in float64.

        Until training changes it, it is what was set, to the last bit. Then it is what a tuned file
        holds: numbers in float32, the difference of singular values in float64.
        """
        if self._given is not None:
            before, change = self._given
            now = self.moving()
            if len(now) == len(before) and all(
                a.shape == b.shape and torch.equal(a.to(b.device), b)
                for a, b in zip(now, before, strict=True)
            ):
                return change.to(now[0].new_empty(0, dtype=torch.float64))
        delta = self.values().float().double() - self.S_base.float().double()
        return SpectralChange.of_parts(delta, self.parts())

    @torch.no_grad()
    def parts(self) -> dict[str, Tensor]:
        """Return what a tuned file holds beside singular values, in float32; on this device."""
        if self.plain:
            return {}
        found = self.present().parts()
        return {name: one if name == "index" else one.float() for name, one in found.items()}

    @torch.no_grad()
    def set_change(self, change: SpectralChange) -> None:
        """Set what changes; what cannot be trained here is kept beside it, untrained."""
        self.extras.set(change, like=self.S_base)
        given = change.to(change.delta.double())
        delta = change.delta.to(self.S_base)
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
        # With non-negative values `delta` may be cut off.
        kept = (self.S_base.double() + given.delta.to(self.S_base.device) >= 0).all()
        exact = not self.nonnegative or bool(kept)
        self._given = (tuple(one.clone() for one in self.moving()), given) if exact else None

    def factors(self) -> LayerFactors:
        """Return the factors as matrices, with the base's singular values."""
        Vh = self.Vh.detach()
        flat = Vh.reshape(Vh.shape[0], -1) if self.view == "matrix" else Vh
        return LayerFactors(self.U.detach(), self.S_base.detach(), flat)

    def change(self, change: SpectralChange) -> Tensor:
        """Return the change of the weight in the file's shape and the vectors' dtype."""
        matrices = self.factors()
        if change.plain:
            left = matrices.U * change.delta.to(matrices.U.dtype).unsqueeze(-2)
            right = matrices.Vh
        else:
            S = matrices.S.to(matrices.U.dtype)
            left, right = change.to(matrices.U).product(matrices.U, S, matrices.Vh)
        with _own_precision(left):
            return (left @ right).reshape(self.shape)

    def pull_back(
        self, change: SpectralChange, gradient: Tensor, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """Return the gradient of each of the change's tensors from that of the weight.

        Parameters
        ----------
        change : SpectralChange
            What the weight was formed with.
        gradient : Tensor
            Of the file's shape.
        wanted : sequence of bool
            Which tensors need one.
        """
        if change.plain:
            return [self.project(gradient) if wanted[0] else None]
        leaves = [
            one.detach().requires_grad_(w) for one, w in zip(change.tensors(), wanted, strict=True)
        ]
        asked = [one for one in leaves if one.requires_grad]
        if not asked:
            return [None] * len(leaves)
        with torch.enable_grad():
            formed = self.change(change.with_tensors(leaves))
        found = iter(torch.autograd.grad(formed, asked, gradient.to(formed.dtype)))
        return [next(found) if one.requires_grad else None for one in leaves]

    @torch.no_grad()
    def explain(self, change: Tensor) -> SpectralChange:
        """Return what of a change of the weight, float64, is this layer's to make."""
        now = self.present()
        if not self.tells:
            return self.merging_change()
        delta, index, value = self.project(change), now.index, now.value
        if index is not None:
            matrices = self.factors()
            rows = change.reshape(*matrices.U.shape[:-1], matrices.Vh.shape[-1])
            inner = matrices.U.double().mT @ rows @ matrices.Vh.double().mT
            value = inner.flatten(-2).gather(-1, index)
        return SpectralChange(delta, index=index, value=value)

    def project(self, gradient: Tensor) -> Tensor:
        """Return ``diag(U' G V)`` for a tensor `gradient` of the file's shape, like `S_base`."""
        matrices = self.factors()
        rows = gradient.reshape(*matrices.U.shape[:-1], matrices.Vh.shape[-1]).to(matrices.U.dtype)
        with _own_precision(rows):
            inner = matrices.U.mT @ rows
        return (inner * matrices.Vh).sum(-1, dtype=self.S_base.dtype)


def _own_precision(like: Tensor) -> AbstractContextManager[None]:
    """Multiply in the dtype of the operands: a dense weight is kept, also beyond an autocast."""
    kind = like.device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def _frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


# Whether a live weight is the one that was decomposed.


EXACT = 1e-5
"""What factors may be off by, relative to the weight, beside the rounding of what stores them."""

_PROBES, _CHUNK = 16, 1 << 22


@torch.no_grad()
def belongs(live: Tensor, factors: LayerFactors, roundoff: float) -> bool:
    """Whether a weight, seen as matrices, is what factors were computed from, up to rounding.

    Compares ``W V z`` with ``U S z``, and ``U' W`` with ``S V'`` likewise, for fixed random vectors
    z. Singular vectors satisfy both at any rank, and those of truncated factors the better one to
    single precision.

    Parameters
    ----------
    live : (..., m, n) Tensor
        The weight, or of the shape of a tensor that is such a matrix.
    factors : LayerFactors
        U (..., m, k), S (..., k) and Vh (..., k, n).
    roundoff : float
        How far the weight's numbers may be rounded, relative to its Frobenius norm.
    """
    U, Vh = (part.to(live.device) for part in (factors.U, factors.Vh))
    matrices = live.detach().reshape(*U.shape[:-1], Vh.shape[-1])
    if matrices.ndim == 2:
        matrices, U, Vh = matrices[None], U[None], Vh[None]
    S = factors.S.to(live.device, torch.float64).reshape(len(U), -1)
    stored = 0.0 if U.dtype.itemsize >= 4 else 2.0 * unit_roundoff(U.dtype)
    every = (
        _one_belongs(*parts, roundoff, EXACT + stored)
        for parts in zip(matrices, U, S, Vh, strict=True)
    )
    return all(every)


def _one_belongs(
    W: Tensor, U: Tensor, S: Tensor, Vh: Tensor, roundoff: float, exact: float
) -> bool:
    k = len(S)
    z = torch.randn(k, _PROBES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = z.to(W.device)
    if k <= _PROBES:
        z = torch.eye(k, dtype=torch.float64, device=W.device) * k**0.5
    # In double precision throughout: what is in float32 may be multiplied in less, where the caller
    # set autocast or TF32. A block at a time, because a wide Vh would fill the memory.
    Sz = S[:, None] * z
    probe, left = (z.new_empty(Vh.shape[1], z.shape[1]) for _ in range(2))
    for part in _blocks(Vh.shape[1], k):
        turned = Vh[:, part].double().mT
        probe[part], left[part] = turned @ z, -(turned @ Sz)
    right, squares = [], 0.0
    for part in _blocks(len(W), W.shape[1]):
        rows, basis = W[part].double(), U[part].double()
        right.append(rows @ probe - basis @ Sz)
        left += rows.mT @ (basis @ z)
        squares += float(rows.square().sum())
    off = min(float(torch.cat(right).norm()), float(left.norm())) / z.shape[1] ** 0.5
    kind = torch.finfo(W.dtype)
    underflow = 0.5 * kind.smallest_normal * kind.eps * W.numel() ** 0.5 if roundoff else 0.0
    return bool(off <= roundoff * squares**0.5 + underflow + exact * float(S.norm()))


def _blocks(total: int, width: int) -> Iterator[slice]:
    """Cut rows of a width into blocks of some megabytes."""
    step = max(1, _CHUNK // max(1, width))
    return (slice(start, start + step) for start in range(0, total, step))


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return the largest relative error of rounding to a dtype."""
    return torch.finfo(dtype).eps / 2


def rounding_of(live: torch.dtype, file: torch.dtype | None) -> float:
    """Return how far a weight of a file's dtype may be rounded in a live one; 0 if it is not.

    Examples
    --------
    >>> rounding_of(torch.bfloat16, torch.float32)
    0.00390625
    >>> rounding_of(torch.float32, torch.bfloat16)
    0.0
    """
    if file is None or not file.is_floating_point:
        return unit_roundoff(live)
    mine, theirs = torch.finfo(live), torch.finfo(file)
    holds = mine.eps <= theirs.eps and mine.smallest_normal <= theirs.smallest_normal
    return 0.0 if holds else unit_roundoff(live)


# Where a tensor of the file lies in a live parameter, and which names are svftool's own.


PREFIX = "svf_"
"""A parameter ``weight`` has its `AttachedWeight` beside it as submodule ``svf_weight``."""


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
