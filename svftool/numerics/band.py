"""A large symmetric matrix is brought to a band, and the band to tridiagonal form.

LAPACK's own reduction reads the whole matrix once a column, which is as fast as memory is. Here
reflectors are gathered into blocks as wide as the band, so that all is large products, spread over
a pool; the band that is left is small enough for rotations. It pays where eigenvalues alone are
wanted: eigenvectors would have to be turned back twice.

References
----------
Bischof, Lang and Sun, A framework for symmetric band reduction, ACM TOMS 26, 2000.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from svftool.numerics import lapack
from svftool.numerics.reflectors import block_reflector
from svftool.numerics.tall import cuts
from svftool.numerics.threads import Pool

WIDTH = 48
_BAND_TILE = 512


def banded_tridiagonal(G: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
    """Reduce a symmetric matrix to tridiagonal form, without the rotation that leads to it.

    Parameters
    ----------
    G : (n, n) Tensor
        float64, upper triangle; overwritten.
    pool : Pool

    Returns
    -------
    d : (n,) Tensor
        Diagonal.
    e : (n - 1,) Tensor
        Off-diagonal.

    Raises
    ------
    svftool.numerics.lapack.NotConverged
        If LAPACK says so.
    """
    n = len(G)
    for tile in cuts(n, _BAND_TILE):
        block = G[tile, tile].triu()
        G[tile, tile] = block + block.triu(1).mT
    for start in range(WIDTH, n - 1, WIDTH):
        _reduce(G, start, pool)
    return lapack.band_to_tridiagonal(_band(G))


def _reduce(G: Tensor, start: int, pool: Pool) -> None:
    """Make the block row that ends before `start` end with the band, by a similarity.

    The tiles keep their places in G, and those on the diagonal are whole.
    """
    row = G[start - WIDTH : start, start:]
    packed, tau = torch.geqrf(row.mT)
    count = len(tau)
    row[:, :count] = packed[:count].triu().mT
    Y, Tt = block_reflector(packed.mT[:count], tau)
    parts = [
        slice(max(tile.start, start), tile.stop)
        for tile in cuts(len(G), _BAND_TILE)
        if tile.stop > start
    ]
    V = Y.mT.contiguous()
    TV = V @ Tt.mT
    X = torch.empty_like(V)

    def multiply(part: slice) -> None:
        own = X[part.start - start : part.stop - start]
        torch.mm(G[part, part.start :], TV[part.start - start :], out=own)
        if part.start > start:
            own.addmm_(G[start : part.start, part].mT, TV[: part.start - start])

    pool.share([partial(multiply, part) for part in parts])
    X -= 0.5 * V @ (Tt @ (Y @ X))
    both, turned = torch.cat((V, X), dim=1), torch.cat((X, V), dim=1)

    def update(part: slice) -> None:
        inner = slice(part.start - start, part.stop - start)
        G[part, part.start :].addmm_(both[inner], turned[inner.start :].mT, alpha=-1.0)

    pool.share([partial(update, part) for part in parts])


def _band(G: Tensor) -> Tensor:
    """Return ``G[i, i + j]`` at [i, j], zero beyond the matrix."""
    n = len(G)
    width = min(WIDTH, n - 1)
    band = G.new_zeros(n, width + 1)
    for j in range(width + 1):
        band[: n - j, j] = G.diagonal(j)
    return band
