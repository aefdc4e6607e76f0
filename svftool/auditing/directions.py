"""The leading directions of a change, and whether the base was only scaled along them.

``D = W' - W ~ U diag(S) V'``. A direction u of the rows' space is *scaled by c* where
``u'W' = c u'W``: what the weight writes along u is c times what it was. Directional ablation is
c = 0: ``W' = W - r r'W`` has ``D = -r (W'r)'``, of rank one, and ``r'W' = 0``. A direction v of the
columns' space is scaled where ``W'v = c Wv``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from svftool.auditing.compare import Tuned, divided
from svftool.auditing.directional import Leading, Scaling
from svftool.auditing.evidence import Evidence
from svftool.numerics import ThreadPool, svd


def leading_directions(
    base: Tensor, tuned: Tuned, count: int, found: Evidence, pool: ThreadPool
) -> tuple[Leading, ...]:
    """Decompose what a change adds, as far as its leading directions.

    Parameters
    ----------
    base : (m, n) or (E, m, n) Tensor
        Any floating dtype.
    tuned : Tuned
        The other side.
    count : int
        Directions to keep, K; no more than the short side.
    found : Evidence
        What is known of the change, noise included.
    pool : ThreadPool

    Returns
    -------
    tuple of Leading
        One a matrix; empty where nothing changed, or the change is broken.
    """
    if found.identical or found.broken or not 0.0 < found.change_energy < math.inf:
        return ()
    return tuple(_each(base, tuned, count, found, pool))


def _each(
    base: Tensor, tuned: Tuned, count: int, found: Evidence, pool: ThreadPool
) -> Iterator[Leading]:
    noise = found.tuned_noise or found.noise
    for index, weight in enumerate(base if base.ndim == 3 else base.unsqueeze(0)):
        sides = (weight, *tuned.matrix(index))
        W, D = _difference(
            *(None if one is None else divided(one, found.exponent) for one in sides)
        )
        leading = _leading(W, D, count, pool)
        if noise is not None:
            leading = replace(leading, noise=noise.energy / found.count, edge=noise.edge)
        yield replace(leading, exponent=found.exponent)


def _difference(
    weight: Tensor | None, after: Tensor | None, change: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return base and change in one dtype: float64 where a side has it, else float32."""
    assert weight is not None
    sides = [one for one in (weight, after, change) if one is not None]
    wide = any(one.dtype == torch.float64 for one in sides)
    dtype = torch.float64 if wide else torch.float32
    W = weight.to(dtype)
    if change is not None:
        return W, change.to(dtype)
    assert after is not None
    return W, after.to(dtype) - W


def _leading(W: Tensor, D: Tensor, count: int, pool: ThreadPool) -> Leading:
    found = svd(D, rank=min(count, *D.shape), pool=pool)
    S, U, V = found.S.double(), found.U.mT.to(W.dtype), found.Vh.to(W.dtype)
    return Leading(
        values=S.cpu(),
        left=U.float().cpu().contiguous(),
        right=V.float().cpu().contiguous(),
        of_left=_scaling(U @ W, V, S),
        of_right=_scaling(V @ W.mT, U, S),
        energy=float(torch.linalg.vector_norm(D, dtype=torch.float64)) ** 2,
        base_energy=float(torch.linalg.vector_norm(W, dtype=torch.float64)) ** 2,
    )


def _scaling(before: Tensor, others: Tensor, S: Tensor) -> Scaling:
    """Hold the base along each direction, (K, n), against the change along it, ``s_i v_i'``."""
    P, Q = before.double(), S[:, None] * others.double()
    squares = P.square().sum(dim=1)
    moved = (P * Q).sum(dim=1) / squares.clamp_min(1e-300)
    off = torch.linalg.vector_norm(Q - moved[:, None] * P, dim=1) / S.clamp_min(1e-300)
    return Scaling(tuple((1.0 + moved).tolist()), tuple(off.tolist()))
