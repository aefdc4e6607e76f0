"""Measures of how good factors are, cheap enough to be taken of every result.

Neither ``A - U diag(S) V'`` nor ``U'U - I`` is formed, which would cost as much as a good part of
the decomposition. Both are multiplied with a few standard normal vectors z instead: the length of
``(A - U diag(S) V') z`` gives the Frobenius norm, and the entries of ``(U'U - I) z`` have the norms
of that matrix's rows as their standard deviations, none of which is below the row's largest entry.
Only columns that this bound does not clear are looked at one by one.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from svftool.numerics.tall import Tall, Thin, cuts
from svftool.numerics.threads import Pool

PROBES = 8
_SEED = 0x5BD
_CLEAR = 2e-6
_ROWS = 256
_SUSPECTS = 128


def probes(rows: int, *, device: torch.device) -> Tensor:
    """Return the (rows, PROBES) matrix of standard normal numbers that all checks share."""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randn(rows, PROBES, generator=generator, dtype=torch.float64).to(device)


def measure(A: Tall, factors: Thin, pool: Pool) -> tuple[float, float]:
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
    u = probes(len(S), device=S.device)
    z = u if len(S) == A.n else V.mT @ u
    row_probes = torch.cat((S * (V @ z).mT, u.mT))
    slices = A.slices()
    squares = S.new_zeros(len(slices))
    defects = S.new_zeros(len(slices), PROBES, len(S))

    def block(index: int, rows: slice) -> None:
        for inner in cuts(rows.stop - rows.start, _ROWS):
            part = slice(rows.start + inner.start, rows.start + inner.stop)
            left = U[part].double()
            images = row_probes @ left.mT
            missed = z.mT @ A.double(part).mT - images[:PROBES]
            squares[index] += missed.square().sum()
            defects[index].addmm_(images[PROBES:], left)

    pool.share([partial(block, i, rows) for i, rows in enumerate(slices)])
    of_u = _largest(defects.sum(0) - u.mT, U, pool)
    of_v = _largest((u.mT @ V) @ V.mT - u.mT, factors.V.mT, pool)
    return float((squares.sum() / PROBES / factors.squares).sqrt()), max(of_u, of_v)


def _largest(defect: Tensor, basis: Tensor, pool: Pool) -> float:
    """Bound the largest entry of ``|basis' basis - I|`` of which `defect` is the probed image."""
    norms = defect.square().mean(dim=0).sqrt()
    if len(norms) <= _SUSPECTS:
        norms.fill_(torch.inf)
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
