"""The member of the spectral family that comes nearest to a dense change of a layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from svftool.adapters.low_rank import truncate
from svftool.attaching.extras import band_places, largest_places
from svftool.choices.adapters import AdapterRank
from svftool.choices.regimes import LayerNumbers, Spectral
from svftool.factors import LayerFactors, SpectralChange
from svftool.factors.delta import norm

ROUNDS = 8
"""Rounds of a fit whose parts are found in turn, at most."""

_GAIN = 1e-3
"""Share of the error that a round must take away for another one to follow."""


@dataclass(frozen=True)
class Fit:
    """The nearest change of a regime.

    Attributes
    ----------
    change : SpectralChange
        In float64.
    rest : float
        Norm of what it misses.
    numbers : int
        How many numbers it has.
    """

    change: SpectralChange
    rest: float
    numbers: int


def fit(spectral: Spectral, factors: LayerFactors, change: Tensor) -> Fit:
    """Find the nearest change that a regime can make.

    Values and entries are entries of ``U' D V``, the largest ones: exact, because the ``u_i v_j``
    are orthonormal. Scales, and a remainder beside values, are found in turn with the values by
    least squares; every round comes nearer.

    Parameters
    ----------
    spectral : Spectral
        What can change; scales without entries and without a remainder.
    factors : LayerFactors
        Of the base.
    change : (..., m, n) Tensor
        ``W' - W``, float64.
    """
    wide = LayerFactors(*(one.double() for one in (factors.U, factors.S, factors.Vh)))
    if spectral.plain:
        delta = torch.einsum("...mk,...mk->...k", wide.U, change @ wide.Vh.mT)
        rest = norm(change - wide.U * delta.unsqueeze(-2) @ wide.Vh)
        return Fit(SpectralChange(delta), rest, delta.numel())
    if change.ndim == 2:
        return _fit(spectral, wide, change)
    parts = [
        _fit(spectral, LayerFactors(wide.U[e], wide.S[e], wide.Vh[e]), change[e])
        for e in range(len(change))
    ]
    return Fit(
        _stacked([one.change for one in parts]),
        math.hypot(*(one.rest for one in parts)),
        sum(one.numbers for one in parts),
    )


def _stacked(changes: list[SpectralChange]) -> SpectralChange:
    """Put the changes of a stack's matrices together; shorter lists of entries end in zeros."""
    found: dict[str, Any] = {}
    for name in ("delta", "row", "col", "B", "A"):
        values = [getattr(one, name) for one in changes]
        found[name] = None if values[0] is None else torch.stack(values)
    counts = [0 if one.index is None else len(one.index) for one in changes]
    if max(counts):
        index = torch.ones(len(changes), max(counts), dtype=torch.int64)
        value = torch.zeros(len(changes), max(counts), dtype=torch.float64)
        for e, one in enumerate(changes):
            if one.index is not None and one.value is not None:
                index[e, : counts[e]], value[e, : counts[e]] = one.index, one.value
        found |= {"index": index, "value": value}
    return SpectralChange(**found)


def _fit(spectral: Spectral, factors: LayerFactors, change: Tensor) -> Fit:
    m, n, k = *change.shape, len(factors.S)
    numbers = spectral.of(m, n, k)
    if numbers.rows or numbers.columns:
        found = _scaled(numbers, factors, change)
    elif numbers.entries:
        found = _entries(spectral, numbers, factors, change)
    else:
        found = _values(factors, change)
        if numbers.remainder:
            found = _with_remainder(numbers.remainder, factors, change, found)
    return Fit(found, _rest(found, factors, change), numbers.count)


def _rest(found: SpectralChange, factors: LayerFactors, change: Tensor) -> float:
    left, right = found.product(factors.U, factors.S, factors.Vh)
    return norm(change - left @ right)


def _values(factors: LayerFactors, change: Tensor) -> SpectralChange:
    delta = torch.einsum("mk,mk->k", factors.U, change @ factors.Vh.mT)
    return SpectralChange(delta)


def _entries(
    spectral: Spectral, numbers: LayerNumbers, factors: LayerFactors, change: Tensor
) -> SpectralChange:
    k = len(factors.S)
    inner = factors.U.mT @ change @ factors.Vh.mT
    if spectral.core is not None:
        side = torch.arange(numbers.side)
        chosen = (side[:, None] * k + side).flatten()
    elif spectral.choice == "band":
        chosen = band_places(k, numbers.entries)
    else:
        chosen = largest_places(inner.abs(), numbers.entries)
    chosen = chosen.sort().values
    on = chosen % (k + 1) == 0
    delta = torch.zeros(k, dtype=torch.float64)
    flat = inner.flatten()
    delta[chosen[on] // k] = flat[chosen[on]]
    beside = chosen[~on]
    if not len(beside):
        return SpectralChange(delta)
    return SpectralChange(delta, index=beside, value=flat[beside])


def _with_remainder(
    rank: int, factors: LayerFactors, change: Tensor, found: SpectralChange
) -> SpectralChange:
    """Find values and a remainder in turn: each is the best one beside the other."""
    best = found
    before = _rest(best, factors, change)
    for _ in range(ROUNDS):
        rest = change - (factors.U * found.delta) @ factors.Vh
        cut = truncate("", rest, AdapterRank("count", rank), dtype=torch.float64).layer
        if cut is None:
            return best
        delta = _values(factors, change - cut.B @ cut.A).delta
        found = SpectralChange(delta, B=cut.B, A=cut.A)
        after = _rest(found, factors, change)
        if after < before:
            best = found
        if after > (1.0 - _GAIN) * before:
            break
        before = after
    return best


def _scaled(numbers: LayerNumbers, factors: LayerFactors, change: Tensor) -> SpectralChange:
    """Find values and scales in turn, each by least squares."""
    m, n = change.shape
    U, S, Vh = factors.U, factors.S, factors.Vh
    target = (U * S) @ Vh + change
    delta = _values(factors, change).delta if numbers.values else torch.zeros_like(S)
    row, col = target.new_zeros(m), target.new_zeros(n)
    found = SpectralChange(delta, row=row if numbers.rows else None,
                           col=col if numbers.columns else None)  # fmt: skip
    before = _rest(found, factors, change)
    for _ in range(ROUNDS):
        plain = (U * (S + found.delta)) @ Vh
        if numbers.rows:
            row = _ratio(target, plain * (1.0 + col), dim=1) - 1.0
        if numbers.columns:
            col = _ratio(target, plain * (1.0 + row)[:, None], dim=0) - 1.0
        found = replace(
            found, row=row if numbers.rows else None, col=col if numbers.columns else None
        )
        if numbers.values:
            found = replace(found, delta=_best_values(factors, target, row, col) - S)
        after = _rest(found, factors, change)
        if after > (1.0 - _GAIN) * before:
            break
        before = after
    return found


def _ratio(target: Tensor, plain: Tensor, dim: int) -> Tensor:
    """Return the scales of rows or columns that bring one matrix nearest to another."""
    squares = plain.square().sum(dim)
    inner = (target * plain).sum(dim)
    return torch.where(squares > 0, inner / squares.clamp(min=1e-300), torch.ones_like(inner))


def _best_values(factors: LayerFactors, target: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """Return the values that bring ``diag(row) U diag(s) Vh diag(col)`` nearest to a matrix."""
    U, Vh = factors.U * (1.0 + row)[:, None], factors.Vh * (1.0 + col)
    normal = (U.mT @ U) * (Vh @ Vh.mT)
    inner = ((U.mT @ target) * Vh).sum(1)
    found: Tensor = torch.linalg.lstsq(normal, inner[:, None], driver="gelsd").solution[:, 0]
    return found
