"""Measures of how good factors are, cheap enough to be taken of every result.

Neither ``A - U diag(S) V'`` nor ``U'U - I`` is formed, which would cost as much as a good part of
the decomposition. Both are multiplied with a few standard normal vectors z instead: the length of
``(A - U diag(S) V') z`` gives the Frobenius norm, and the entries of ``(U'U - I) z`` have the norms
of that matrix's rows as their standard deviations, none of which is below the row's largest entry.
Only columns that this bound does not clear are looked at one by one.
"""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import Tensor

from svftool.numerics.tall import Tall, Thin, cuts
from svftool.numerics.threads import ThreadPool

# The estimate of an error of rank 8 or more has a standard deviation of a quarter with this many.
PROBES = 8
_SEED = 0x5BD

# A column whose probed image is this short has no entry near the bound of 1e-5; the others are
# looked at entry by entry, so many at a time that the products stay in cache.
_CLEAR = 2e-6
_SUSPECTS = 128
_ROWS = 256


@cache
def _drawn(rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randn(rows, PROBES, generator=generator, dtype=torch.float32).double()


def probes(rows: int, *, device: torch.device) -> Tensor:
    """Return the (rows, PROBES) matrix of standard normal numbers that all checks share."""
    return _drawn(1 << (rows - 1).bit_length())[:rows].to(device)


def measure(A: Tall, factors: Thin, pool: ThreadPool) -> tuple[float, float]:
    """Measure the errors of thin factors.

    Returns
    -------
    reconstruction : float
        Estimate of ``||A - U diag(S) V'||_F / ||A||_F`` for factors of full rank, of
        ``||A V - U diag(S)||_F / ||A||_F`` for truncated ones. Its standard deviation is less than
        a quarter of it where the error has rank 8 or more; rounding has full rank.
    orthogonality : float
        In all likelihood not below the largest entry of ``|U'U - I|`` and ``|V'V - I|``.
    """
    U, S, V = factors.U, factors.S, factors.V.double()
    k = len(S)
    u = probes(k, device=S.device).mT
    z = u if k == A.n else u @ V
    sides = torch.cat((S * (z @ V.mT), u))
    slices = A.slices()
    squares = S.new_zeros(len(slices))
    images = S.new_zeros(len(slices), PROBES, k)

    def block(index: int, rows: slice) -> None:
        for inner in cuts(rows.stop - rows.start, _ROWS if A.on_cpu else rows.stop):
            part = slice(rows.start + inner.start, rows.start + inner.stop)
            left = U[part].double()
            products = sides @ left.mT
            missed = z @ A.double(part).mT - products[:PROBES]
            squares[index] += missed.square().sum()
            images[index].addmm_(products[PROBES:], left)

    pool.share([partial(block, i, rows) for i, rows in enumerate(slices)])
    reconstruction = float((squares.sum() / PROBES / factors.squares).sqrt())
    of_u = _departure(U, images.sum(0) - u, pool)
    of_v = _departure(factors.V.mT, u @ V @ V.mT - u, pool)
    return reconstruction, max(of_u, of_v)


def _departure(basis: Tensor, probed: Tensor, pool: ThreadPool) -> float:
    """Bound the largest entry of ``|basis' basis - I|``, of which `probed` is the probed image."""
    if basis.shape[1] <= _SUSPECTS:
        products = basis.mT @ basis
        products.diagonal().sub_(1.0)
        return float(products.abs().max())
    norms = probed.square().mean(dim=0).sqrt()
    suspects = (norms > _CLEAR).nonzero().flatten()
    groups = cuts(len(suspects), _SUSPECTS)
    worst = norms.new_zeros(len(groups))

    def look(index: int, group: slice) -> None:
        columns = suspects[group]
        products = basis.mT @ basis[:, columns]
        products[columns, torch.arange(len(columns), device=products.device)] -= 1.0
        worst[index] = products.abs().max()

    pool.share([partial(look, i, group) for i, group in enumerate(groups)])
    cleared = norms[norms <= _CLEAR]
    return max(float(each.max()) for each in (worst, cleared) if len(each))
