"""A matrix before and after, screened at the speed of reading: no decomposition of the base.

One pass over blocks of rows gives norms, inner product, rounding noise and products with a few
random vectors. From these: how far the change is from one of singular values, whether it may be of
low rank, whether it may be a rearrangement. What may be is looked at again, and proven or not said.

With the base's own vectors, ``W' = U S' V'``, both ``D W'`` and ``W'D`` are symmetric, and for
singular values that differ the converse holds. Random vectors estimate how far they are from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from svftool.auditing.evidence import (
    EDGE_MARGIN,
    RESOLVED,
    Evidence,
    Noise,
    Quantised,
    Screened,
    may_be_rearranged,
    quantisation_noise,
    with_rank,
)
from svftool.auditing.pair import MatrixPair, norm_ratio
from svftool.auditing.rearranging import proven_rearrangement
from svftool.numerics.rounding import coarser, moved_within, precision_of, spacing

PROBES = 16
"""Random vectors on either side that symmetry is measured with."""

SKETCH = 24
"""Columns of the first sketch of the change; those beyond `PROBES` are for its rank alone."""

WIDE = 136
"""Columns of the second one, for changes whose energy lies in some tens of directions."""

SPARE = 8
"""Columns of a sketch beyond the rank that it may prove."""

EXACT_SIDE = 128
"""Short side up to which the change is decomposed whole, which takes no longer than reading it."""

NOT_SPECTRAL = 0.3
"""Asymmetry, as a share of the change, from which it is certainly not one of singular values."""

SPECTRAL = 0.05
"""And up to which it is, as `SVF_SHARE` has it."""

_BLOCK = 1 << 18
_SAMPLED = 1 << 20
_STRIDE = 5
_CLIPPED_STEPS = 4.0


@dataclass
class _Sums:
    """What one pass adds up; noise is that of rounding to `noise_dtype`."""

    base: float = 0.0
    tuned: float = 0.0
    change: float = 0.0
    inner: float = 0.0
    noise: float = 0.0
    longest: float = 0.0
    columns: Tensor | None = None
    DR: Tensor | None = None
    WR: Tensor | None = None
    DL: Tensor | None = None
    WL: Tensor | None = None


@dataclass(frozen=True)
class Sides:
    """A base and what it became, whose blocks of rows are converted once for all that is asked.

    Attributes
    ----------
    base : (m, n) Tensor
    tuned, change : (m, n) Tensor or None
        One of the two.
    dtype : torch.dtype
        What blocks are computed in.
    """

    base: Tensor
    tuned: Tensor | None
    change: Tensor | None
    dtype: torch.dtype

    @property
    def stored(self) -> bool:
        """Whether the tuned side is a weight that was rounded when it was stored."""
        return self.change is None and self.tuned is not None

    def blocks(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Yield rows with their base, tuned and change, in memory that is used again."""
        m, n = self.base.shape
        step = max(1, min(m, _BLOCK // max(1, n)))
        held = torch.empty(3, step, n, dtype=self.dtype, device=self.base.device)
        for start in range(0, m, step):
            rows = slice(start, min(m, start + step))
            W, T, D = held[:, : rows.stop - start]
            W.copy_(self.base[rows])
            if self.change is None:
                assert self.tuned is not None
                T.copy_(self.tuned[rows])
                torch.sub(T, W, out=D)
            else:
                D.copy_(self.change[rows])
                torch.add(W, D, out=T)
            yield rows, W, T, D

    def changes(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows with their change alone."""
        for rows, _, _, D in self.blocks():
            yield rows, D


@lru_cache(maxsize=8)
def _vectors(n: int, count: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Return seeded normal vectors, (n, count)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, count, generator=generator, dtype=torch.float32).to(dtype)


def _random(n: int, count: int, seed: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    return _vectors(n, count, seed, dtype).to(like.device)


def screen(
    base: Tensor,
    tuned: Tensor | None,
    change: Tensor | None = None,
    *,
    quantised: tuple[Quantised, ...] = (),
    exact_side: int = EXACT_SIDE,
) -> Evidence:
    """Collect what can be told of a matrix without decomposing it.

    Parameters
    ----------
    base : (m, n) Tensor
        Finite, any floating dtype.
    tuned, change : (m, n) Tensor or None
        One of the two, finite.
    quantised : tuple of Quantised
        Of the sides that are stored as codes.
    exact_side : int
        Short side up to which the change itself is decomposed.

    Returns
    -------
    Evidence
        With `screened` saying what was proven.
    """
    m, n = base.shape
    if tuned is not None and tuned.dtype == base.dtype and torch.equal(base, tuned):
        energy = _energy(base)
        return Evidence(
            m, n, identical=True, base_energy=energy, tuned_energy=energy, inner=energy,
            screened=Screened(),
        )  # fmt: skip
    wide = any(one is not None and one.dtype == torch.float64 for one in (base, tuned, change))
    sides = Sides(base, tuned, change, torch.float64 if wide else torch.float32)
    precisions = (precision_of(base), precision_of(tuned)) if tuned is not None else ()
    dtype = coarser(*precisions) if precisions and not quantised else None
    sums = _sweep(sides, dtype)
    if not wide and _beyond_singles(sums, m * n):
        sides = replace(sides, dtype=torch.float64)
        sums = _sweep(sides, dtype)
    found = Evidence(
        m, n,
        base_energy=sums.base, tuned_energy=sums.tuned,
        change_energy=sums.change, inner=sums.inner,
        identical=sums.change == 0.0 and not any(bool(D.any()) for _, D in sides.changes()),
        screened=Screened(),
    )  # fmt: skip
    if found.identical or sums.change == 0.0 or not math.isfinite(sums.change):
        return found
    found = _with_noise(found, sides, sums, precisions, quantised)
    found = _with_rearrangement(found, sides)
    found = replace(found, screened=_spectral(found, sides, sums, exact_side))
    return _with_rank(found, sides, sums, exact_side)


def _energy(values: Tensor) -> float:
    flat = values.reshape(-1)
    parts = torch.split(flat, _BLOCK)
    return sum(float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2 for part in parts)


def _beyond_singles(sums: _Sums, count: int) -> bool:
    """Tell whether squares left the range of single precision, or may have."""
    known = (sums.base, sums.tuned, sums.change)
    return not all(math.isfinite(one) and 1e-24 * count < one < 1e36 for one in known)


def _sweep(sides: Sides, noise: torch.dtype | None) -> _Sums:
    """Go over all rows once."""
    m, n = sides.base.shape
    like, dtype = sides.base, sides.dtype
    R, L = _random(n, SKETCH, 1, like, dtype), _random(m, PROBES, 2, like, dtype)
    right = R[:, :PROBES].contiguous()
    sums = _Sums(
        DR=torch.empty(m, SKETCH, dtype=dtype, device=like.device),
        WR=torch.empty(m, PROBES, dtype=dtype, device=like.device),
        DL=torch.zeros(n, PROBES, dtype=dtype, device=like.device),
        WL=torch.zeros(n, PROBES, dtype=dtype, device=like.device),
        columns=None if noise is None else torch.zeros(n, dtype=dtype, device=like.device),
    )
    assert sums.DR is not None
    assert sums.WR is not None
    assert sums.DL is not None
    assert sums.WL is not None
    for rows, W, T, D in sides.blocks():
        w, t, d = (X.view(-1) for X in (W, T, D))
        sums.base += float(torch.dot(w, w))
        sums.tuned += float(torch.dot(t, t))
        sums.change += float(torch.dot(d, d))
        # Not from the three others: where one side is far the longer, nothing of it would be left.
        sums.inner += float(torch.dot(w, t))
        torch.mm(D, R, out=sums.DR[rows])
        torch.mm(W, right, out=sums.WR[rows])
        sums.DL.addmm_(D.mT, L[rows])
        sums.WL.addmm_(W.mT, L[rows])
        if noise is not None:
            _add_noise(sums, T, noise, sampled=m * n > _SAMPLED)
    return sums


def _add_noise(sums: _Sums, T: Tensor, dtype: torch.dtype, *, sampled: bool) -> None:
    """Add the squares of the steps of a dtype, of every fifth row where there are many."""
    assert sums.columns is not None
    stride = _STRIDE if sampled else 1
    squares = spacing(T[::stride], dtype).to(T.dtype).square_().div_(12.0)
    rows = squares.sum(dim=1)
    scale = len(T) / len(squares)
    sums.columns += squares.sum(dim=0) * scale
    sums.noise += float(rows.sum(dtype=torch.float64)) * scale
    sums.longest = max(sums.longest, float(rows.max()))


# Rounding and codes.


def _with_noise(
    found: Evidence,
    sides: Sides,
    sums: _Sums,
    precisions: tuple[torch.dtype, ...],
    quantised: tuple[Quantised, ...],
) -> Evidence:
    base, tuned = sides.base, sides.tuned
    if tuned is None or sums.columns is None:
        if quantised and tuned is not None:
            return replace(found, noise=quantisation_noise(base, tuned, quantised))
        return found
    dtype = coarser(*precisions)
    edge = math.sqrt(sums.longest) + math.sqrt(float(sums.columns.max()))
    steps = _steps(found, base, tuned, dtype)
    noise = Noise(dtype, sums.noise, edge, steps)
    finer = None
    if precisions[1] != dtype:
        other = _Sums(columns=torch.zeros_like(sums.columns))
        for _, _, T, _ in sides.blocks():
            _add_noise(other, T, precisions[1], sampled=found.m * found.n > _SAMPLED)
        assert other.columns is not None
        edge = math.sqrt(other.longest) + math.sqrt(float(other.columns.max()))
        finer = Noise(precisions[1], other.noise, edge, _steps(found, base, tuned, precisions[1]))
    return replace(found, noise=noise, tuned_noise=finer)


def _steps(found: Evidence, base: Tensor, tuned: Tensor, dtype: torch.dtype) -> float | None:
    if found.weight_drift > 4.0 * torch.finfo(dtype).eps:
        return None
    return moved_within(base, tuned, dtype, most=_CLIPPED_STEPS)


# Moved and flipped entries.


def _with_rearrangement(found: Evidence, sides: Sides) -> Evidence:
    """Say how entries were rearranged, where that can be shown; else whether they may be."""
    # Spectra lie no nearer to each other than norms do.
    gap = abs(math.sqrt(found.tuned_energy) - math.sqrt(found.base_energy))
    slack = 2e-6  # of sums in single precision
    least = max(0.0, norm_ratio(gap * gap, found.base_energy) - slack)
    if not may_be_rearranged(replace(found, relative_drift=least)):
        return found
    way = "" if sides.tuned is None else proven_rearrangement(sides.base, sides.tuned)
    assert found.screened is not None
    if way:
        return replace(found, rearranged=way)
    return replace(found, screened=replace(found.screened, may_be_rotated=True))


# Singular values alone.


def _spectral(found: Evidence, sides: Sides, sums: _Sums, exact_side: int) -> Screened:
    """Measure how far ``D W'`` and ``W'D`` are from symmetric, as shares of the change."""
    assert sums.DR is not None
    assert sums.WR is not None
    assert sums.DL is not None
    assert sums.WL is not None
    assert found.screened is not None
    noise = found.tuned_noise or found.noise
    noisy = min(1.0, (0.0 if noise is None else noise.energy) / found.change_energy)
    if noisy > 0.5 or found.base_energy == 0.0:
        return found.screened
    both = (
        (sums.DL.double().mT @ sums.WL.double(), found.n),
        (sums.DR[:, :PROBES].double().mT @ sums.WR.double(), found.m),
    )
    worst = 0.0
    for products, length in both:
        for share in _shares(products, found, length, noisy):
            worst = max(worst, (share - noisy) / (1.0 - noisy))
    error = 0.4 * noisy
    exact = found.side <= exact_side and found.m * found.n <= _SAMPLED
    power = _exact_power(sides.base) if exact else _power(sums, found)
    limit = min(SPECTRAL - 2.0 * error, max(SPECTRAL * power, error))
    known = True if power > 0.0 and worst <= limit else (False if worst >= NOT_SPECTRAL else None)
    return replace(found.screened, spectral=known, asymmetry=max(0.0, worst))


def _shares(products: Tensor, found: Evidence, length: int, noisy: float) -> tuple[float, float]:
    """Return the asymmetric part against the whole change, and against what the probes see of it.

    A change that has nothing to do with the base has ``||D W'||^2 = ||D||^2 ||W||^2 / length`` and
    half of that twice over in the part that is not symmetric.
    """
    i, j = torch.triu_indices(len(products), len(products), 1)
    uneven = float((products[i, j] - products[j, i]).square().mean()) / 2.0
    seen = float((products[i, j].square() + products[j, i].square()).mean()) / 2.0
    expected = found.change_energy * found.base_energy / length
    # Noise is not seen as the change is; its part of what is seen is taken off as it was expected.
    inside = max(0.0, uneven - noisy * expected) / seen if seen > 0.0 else 0.0
    return uneven / expected, inside * (1.0 - noisy) + noisy


def _exact_power(base: Tensor) -> float:
    W = base.double()
    W = W / torch.linalg.vector_norm(W)
    G = W @ W.mT if W.shape[0] <= W.shape[1] else W.mT @ W
    return max(0.0, 1.0 - 1.0 / (len(G) * float(G.square().sum())))


def _power(sums: _Sums, found: Evidence) -> float:
    """Return how well symmetry tells directions apart: little where singular values are alike.

    It is ``1 - (sum s^2)^2 / (k sum s^4)``, less the doubt in its estimate. The Gram matrix G of
    the short side is ``c`` times the identity and a rest; what the rest adds to ``(x'Gy)^2`` is
    averaged over the probes, so that little is told from nothing.
    """
    W, length = (sums.WL, found.m) if found.m <= found.n else (sums.WR, found.n)
    assert W is not None
    probes = (
        _random(length, PROBES, 2, W, W.dtype)
        if found.m <= found.n
        else (_random(length, SKETCH, 1, W, W.dtype)[:, :PROBES])
    )
    i, j = torch.triu_indices(PROBES, PROBES, 1)
    level = found.base_energy / length
    seen = (W.double().mT @ W.double())[i, j].square()
    plain = (probes.double().mT @ probes.double())[i, j].square() * level**2
    rest = seen - plain
    least = float(rest.mean() - 2.0 * rest.std() / math.sqrt(len(rest)))
    whole = level**2 * length + float(rest.mean())
    return max(0.0, least / whole) if whole > 0.0 else 0.0


# Rank.


def _with_rank(found: Evidence, sides: Sides, sums: _Sums, exact_side: int) -> Evidence:
    if found.side <= exact_side:
        pair = MatrixPair(sides.base, sides.tuned, change=sides.change)
        return with_rank(found, pair)
    assert sums.DR is not None
    noise = found.tuned_noise or found.noise
    width = _width(sums.DR.double(), found, 0.0 if noise is None else noise.energy)
    if not width:
        return found
    R = _random(found.n, width, 1 if width == SKETCH else 3, sides.base, sides.dtype)
    Y = sums.DR if width == SKETCH else _product(sides, R)
    values, rest = _leading(sides, Y)
    edge = 0.0 if noise is None else EDGE_MARGIN * noise.edge
    limit = max(edge, RESOLVED * float(values[0]))
    near = (values > 0.9 * limit) & (values < 1.1 * limit)
    rank = int((values > limit).sum())
    if bool(near.any()) or rank > width - SPARE:
        return found
    tail = rest + float(values[rank:].square().sum())
    return replace(found, rank=rank, tail=tail, participation=float(rank))


def _width(Y: Tensor, found: Evidence, noise: float) -> int:
    """Choose how wide a sketch the change is worth; none where its energy is spread too wide."""
    test, sketch = Y[:, -SPARE:], Y[:, :-SPARE]
    Q = torch.linalg.qr(sketch).Q
    rest = float((test - Q @ (Q.mT @ test)).square().sum()) / SPARE
    # What a sketch of half the rank leaves is still a good part of a low-rank change.
    if rest <= 4.0 * noise + 1e-6 * found.change_energy:
        return SKETCH
    inner = Y.mT @ Y
    i, j = torch.triu_indices(len(inner), len(inner), 1)
    spread = max(found.change_energy - noise, 0.0) ** 2 / max(
        float(inner[i, j].square().mean()), 1e-300
    )
    return min(WIDE, found.side) if spread < 0.75 * (WIDE - SPARE) else 0


def _product(sides: Sides, R: Tensor) -> Tensor:
    return torch.cat([D @ R for _, D in sides.changes()])


def _leading(sides: Sides, Y: Tensor) -> tuple[Tensor, float]:
    """Return the leading singular values of the change and the energy that they leave, measured.

    One step of subspace iteration: with ``P`` an orthonormal basis of ``D'Q``, the values are those
    of ``D P``, and what is left is ``D - D P P'``, block by block.

    References
    ----------
    N. Halko, P. G. Martinsson, J. A. Tropp, Finding structure with randomness, SIAM Review 53,
    2011, algorithm 4.4.
    """
    Q = torch.linalg.qr(Y.double()).Q.to(Y.dtype)
    Z = torch.zeros(sides.base.shape[1], Q.shape[1], dtype=Y.dtype, device=Y.device)
    for rows, D in sides.changes():
        Z.addmm_(D.mT, Q[rows])
    P = torch.linalg.qr(Z.double()).Q.to(Y.dtype)
    parts, rest = [], 0.0
    for _, D in sides.changes():
        DP = D @ P
        parts.append(DP.double())
        left = torch.addmm(D, DP, P.mT, alpha=-1.0).view(-1)
        rest += float(torch.dot(left, left))
    return torch.linalg.svdvals(torch.cat(parts)), rest
