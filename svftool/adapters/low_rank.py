"""A change of one tensor as the product of two thin matrices: how it is found, rounded, resized."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from svftool.choices.adapters import AdapterRank
from svftool.numerics import Slack, ThreadPool, svd

# Entries that are brought to float64 at a time, to stay in a core's cache; another device wants
# them large.
_ROWS, _ROWS_OF_A_DEVICE = 1 << 17, 1 << 22

_CONDITION = 1e4
"""Condition of a matrix up to which its squares say enough of it."""

_EXCESS = 1e-6
"""By how much the error of a truncation may exceed the least one, relative to it."""

_ROUNDED = 0.125
"""Share of the norm that storing two factors takes, over the dtype's eps: half of what it does."""


@dataclass(frozen=True)
class LowRank:
    """``scale B A``, the change of one tensor seen as a matrix.

    Attributes
    ----------
    name : str
        The tensor that is changed.
    B : (m, r) Tensor
    A : (r, n) Tensor
    scale : float
    """

    name: str
    B: Tensor
    A: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Columns of B."""
        return int(self.B.shape[1])

    def change(self) -> Tensor:
        """Multiply the two out, in float64."""
        product: Tensor = self.B.double() @ self.A.double()
        return product * self.scale

    def padded(self, rank: int) -> LowRank:
        """Return the same change at a higher rank, by columns and rows of zeros."""
        more = rank - self.rank
        if more <= 0:
            return self
        B = torch.cat([self.B, self.B.new_zeros(self.B.shape[0], more)], dim=1)
        A = torch.cat([self.A, self.A.new_zeros(more, self.A.shape[1])])
        return replace(self, B=B, A=A)


def common_rank(spectra: Sequence[Tensor], energy: float) -> tuple[int, float]:
    """Find the least rank, one for all matrices, that keeps a share of the squares of all.

    Parameters
    ----------
    spectra : sequence of (k,) Tensor
        Singular values, non-increasing.
    energy : float
        The share, up to 1.

    Returns
    -------
    rank : int
        0 where all values are 0.
    kept : float
        Sum of squares that it keeps.

    Examples
    --------
    >>> common_rank([torch.tensor([3.0, 1.0, 1.0]), torch.tensor([2.0])], 0.9)
    (2, 14.0)
    """
    squares = torch.zeros(max(map(len, spectra), default=0), dtype=torch.float64)
    for S in spectra:
        squares[: len(S)] += S.double().square()
    kept = squares.cumsum(0)
    if not len(kept) or float(kept[-1]) == 0.0:
        return 0, 0.0
    rank = int((kept >= energy * kept[-1] * (1 - 1e-12)).int().argmax()) + 1
    return rank, float(kept[rank - 1])


@dataclass(frozen=True)
class Truncated:
    """The best change of low rank.

    Attributes
    ----------
    layer : LowRank or None
        As it is stored; None where nothing of the change is above rounding.
    total, rest : float
        Norms of the change, and of what the stored matrices miss of it.
    floored : bool
        Whether the rank ends where rounding begins.
    """

    layer: LowRank | None
    total: float
    rest: float
    floored: bool = False

    @property
    def error(self) -> float:
        """``||D - BA||_F / ||D||_F``."""
        return self.rest / self.total if self.total > 0 else 0.0


def truncate(
    name: str,
    change: Tensor,
    rank: AdapterRank,
    *,
    dtype: torch.dtype,
    floor: float = 0.0,
    pool: ThreadPool | None = None,
) -> Truncated:
    """Find the best change of low rank, balanced and rounded as it will be stored.

    Parameters
    ----------
    name : str
    change : (m, n) Tensor
        Finite.
    rank : AdapterRank
    dtype : torch.dtype
        What the matrices are stored in.
    floor : float
        Singular values up to it are rounding of the weights: no rank is spent on them.
    pool : ThreadPool, optional

    Returns
    -------
    Truncated
        ``B = U sqrt(S)``, ``A = sqrt(S) Vh``: the two carry the same weight, so that a narrow dtype
        holds both.
    """
    total = _norm(change, pool)
    if total == 0.0:
        return Truncated(None, 0.0, 0.0)
    found = _try(name, change, total, rank, dtype, floor, pool)
    rounding = found.rest**2 - found.cut**2
    if rank.kind == "error" and found.rest > rank.value * total and rounding > 0:
        # What rounding takes is not there for truncation.
        allowed = (rank.value * total) ** 2 - 1.05 * rounding
        if allowed > 0:
            finer = replace(rank, value=math.sqrt(allowed) / total)
            found = _try(name, change, total, finer, dtype, floor, pool)
    return Truncated(found.layer, total, found.rest, found.floored)


@dataclass(frozen=True)
class _Try:
    layer: LowRank | None
    rest: float
    cut: float
    floored: bool


def _try(
    name: str,
    change: Tensor,
    total: float,
    rank: AdapterRank,
    dtype: torch.dtype,
    floor: float,
    pool: ThreadPool | None,
) -> _Try:
    limit = rank.limit(*change.shape)
    slack = Slack(_EXCESS, floor=floor, rounding=_ROUNDED * torch.finfo(dtype).eps)
    wanted = limit if rank.kind == "count" else rank.of_spectrum
    result = svd(change, rank=wanted, slack=slack, pool=pool)
    S = result.S.double()
    kept = int((floor < S).sum())
    floored = kept < len(S)
    if not kept:
        return _Try(None, total, total, True)
    root = S[:kept].sqrt()
    layer = LowRank(
        name,
        B=(result.U[:, :kept].double() * root).to(dtype),
        A=(root[:, None] * result.Vh[:kept].double()).to(dtype),
    )
    cut = max(total**2 - float(S[:kept].square().sum()), 0.0)
    return _Try(layer, residual(change, layer, pool), math.sqrt(cut), floored)


def residual(change: Tensor, layer: LowRank, pool: ThreadPool | None = None) -> float:
    """Return ``||D - scale B A||_F``, a few rows at a time.

    Parameters
    ----------
    change : (m, n) Tensor
    layer : LowRank
    pool : ThreadPool, optional
        Their number does not change the result.
    """
    A = layer.A.double() * layer.scale

    def left(rows: slice) -> Tensor:
        return torch.addmm(change[rows].double(), layer.B[rows].double(), A, alpha=-1.0)

    return _norm_of(change, left, pool)


def _norm(values: Tensor, pool: ThreadPool | None = None) -> float:
    return _norm_of(values, lambda rows: values[rows].double(), pool)


def _norm_of(
    values: Tensor, part: Callable[[slice], Tensor], pool: ThreadPool | None = None
) -> float:
    """Return the norm of what `part` makes of a few rows at a time."""
    few = _ROWS if values.device.type == "cpu" else _ROWS_OF_A_DEVICE
    step = max(1, few // max(1, values.shape[1]))
    slices = [slice(at, at + step) for at in range(0, len(values), step)]
    norms = values.new_zeros(len(slices), dtype=torch.float64)

    def one(index: int, rows: slice) -> None:
        norms[index] = torch.linalg.vector_norm(part(rows))

    work = [partial(one, index, rows) for index, rows in enumerate(slices)]
    if pool is not None:
        pool.share(work)
    else:
        for each in work:
            each()
    return float(torch.linalg.vector_norm(norms))


def resized(layer: LowRank, rank: AdapterRank, *, dtype: torch.dtype) -> Truncated:
    """Cut an adapter's layer to another rank: exact, without its product being formed.

    ``B = Q R`` and ``A' = P T`` with orthonormal Q and P, so the singular values of ``B A`` are
    those of the small ``R T'``, and its singular vectors follow from ``B A v / s`` and
    ``u' B A / s`` without Q and P.

    Returns
    -------
    Truncated
        The layer is balanced, of scale 1; the error has what rounding to `dtype` does.
    """
    B, A = layer.B.double(), layer.A.double()
    R, T = _core(B) * layer.scale, _core(A.mT)
    U, S, Vh = torch.linalg.svd(R @ T.mT)
    total = float(S.norm())
    noise = torch.finfo(S.dtype).eps * max(B.shape[0], A.shape[1]) * float(S[0])
    kept = min(rank.of_spectrum(S), max(1, int((noise < S).sum())))
    if total == 0.0:
        return Truncated(replace(layer, B=layer.B[:, :kept], A=layer.A[:kept]), 0.0, 0.0)
    root = S[:kept].sqrt()
    thin = LowRank(
        layer.name,
        B=B @ (T.mT @ Vh[:kept].mT / root) * layer.scale,
        A=(U[:, :kept].mT @ R / root[:, None]) @ A,
    )
    small = replace(thin, B=thin.B.to(dtype), A=thin.A.to(dtype))
    return Truncated(small, total, math.hypot(float(S[kept:].norm()), _rounding(thin, small)))


def _core(tall: Tensor) -> Tensor:
    """Return a small R with ``R' R = X' X``: what is left of a tall X without its orthogonal part.

    The Cholesky factor of ``X' X`` comes several times sooner than a QR. It squares the condition
    of X, which costs 1e-8 at most where it is used.
    """
    R: Tensor
    R, fault = torch.linalg.cholesky_ex(tall.mT @ tall, upper=True)
    if not int(fault):
        back = torch.linalg.solve_triangular(R, torch.eye(len(R), dtype=R.dtype), upper=True)
        if float(R.norm()) * float(back.norm()) < _CONDITION:
            return R
    R = torch.linalg.qr(tall, mode="r").R
    return R


def stored(layer: LowRank, *, dtype: torch.dtype, scaled: bool) -> Truncated:
    """Return a layer as it will be stored at its own rank.

    Parameters
    ----------
    layer : LowRank
    dtype : torch.dtype
        Of the matrices.
    scaled : bool
        Whether the layout stores a scale; else it goes into B.
    """
    small = layer
    if not scaled and layer.scale != 1.0:
        small = replace(layer, B=layer.B.double() * layer.scale, scale=1.0)
    small = replace(small, B=small.B.to(dtype), A=small.A.to(dtype))
    exact = replace(layer, B=layer.B.double() * (layer.scale / small.scale), scale=small.scale)
    exact = replace(exact, A=layer.A.double())
    return Truncated(small, _size(layer), _rounding(exact, small) * abs(small.scale))


def along(
    name: str,
    U: Tensor,
    values: Tensor,
    Vh: Tensor,
    rank: AdapterRank | None,
    *,
    dtype: torch.dtype,
) -> Truncated:
    """Write a change of singular values as two matrices: its largest entries are the best ones.

    Parameters
    ----------
    name : str
    U, Vh : (m, k), (k, n) Tensor
        Of orthonormal columns and rows.
    values : (k,) Tensor
        The change is ``U diag(values) Vh``.
    rank : AdapterRank, optional
        All entries that are not zero without one.
    dtype : torch.dtype
    """
    order = values.abs().argsort(descending=True, stable=True)
    sizes = values.abs()[order].double()
    count = int((sizes > 0).sum())
    if not count:
        return Truncated(None, 0.0, 0.0)
    kept = count if rank is None else min(count, rank.of_spectrum(sizes))
    chosen, root = order[:kept], sizes[:kept].sqrt()
    thin = LowRank(
        name,
        B=U[:, chosen].double() * (root * values[chosen].double().sign()),
        A=root[:, None] * Vh[chosen].double(),
    )
    small = replace(thin, B=thin.B.to(dtype), A=thin.A.to(dtype))
    rest = math.hypot(float(sizes[kept:].norm()), _rounding(thin, small))
    return Truncated(small, float(sizes.norm()), rest)


def _rounding(exact: LowRank, small: LowRank) -> float:
    """Return the norm of what rounding both matrices did to their product, of scale 1.

    ``B'A' - BA = dB A' + B dA`` is summed from small terms, so that nothing cancels.
    """
    dB, dA = small.B.double() - exact.B, small.A.double() - exact.A
    if not bool(dB.any()) and not bool(dA.any()):
        return 0.0
    left = torch.cat([dB, exact.B], dim=1)
    right = torch.cat([small.A.double(), dA])
    square = float(((left.mT @ left) * (right @ right.mT)).sum())
    return math.sqrt(max(square, 0.0))


def _size(layer: LowRank) -> float:
    """Return the norm of a product, from the factors alone."""
    B, A = layer.B.double(), layer.A.double()
    square = float(((B.mT @ B) * (A @ A.mT)).sum())
    return math.sqrt(max(square, 0.0)) * abs(layer.scale)
