"""The Gram matrix of the short side and its eigenvectors, in float64."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from svftool.numerics import lapack
from svftool.numerics.band import banded_tridiagonal
from svftool.numerics.reflectors import block_reflector
from svftool.numerics.tall import Choose, Tall, cuts
from svftool.numerics.threads import Pool

_TILE = 1024
_PANEL = 48
_FEW = 3
_SMALL, _LARGE = 160, 2560
_ROWS = 384
_GRAM_ROWS = 512
_BLOCK_ENTRIES = 2**19


def gram(A: Tall, pool: Pool) -> Tensor:
    """Multiply ``A' A`` in float64.

    Returns
    -------
    (n, n) Tensor
        Its upper triangle; what is below the diagonal is not defined.
    """
    n = A.n
    G = lapack.uneven(A.matrix.new_empty(0, dtype=torch.float64), n).zero_()
    columns = cuts(n, _TILE if A.on_cpu else n)
    rows = A.slices(max(_GRAM_ROWS, _BLOCK_ENTRIES // n) if A.on_cpu else None)
    fast = A.on_cpu and lapack.available()

    def tile(i: slice, j: slice) -> None:
        for block in rows:
            X = A.double(block, i)
            if i == j and fast:
                lapack.add_gram(G[i, i], X)
            else:
                G[i, j].addmm_(X.mT, X if i == j else A.double(block, j))

    pool.share([partial(tile, i, j) for a, i in enumerate(columns) for j in columns[a:]])
    return G


def eigenvectors(G: Tensor, choose: Choose, pool: Pool) -> tuple[Tensor, Tensor]:
    """Decompose a symmetric matrix of which the upper triangle is given; it is overwritten.

    Small ones go to LAPACK whole. A larger one it only reduces to ``Q T Q'``, and finds
    ``T = Z diag(values) Z'``: its own way to ``Q Z`` takes the reflectors of Q 32 at a time; in
    blocks of 48 it is all large products, spread over `pool`. (Single precision would be twice as
    fast and rounds the vectors by 7e-7 [measured, n = 768], which uses up the bound on the
    reconstruction.)

    Returns
    -------
    values : (n,) Tensor
        Non-increasing.
    rows : (k, n) Tensor
        Eigenvectors of as many of the largest as `choose` tells from the square roots of all.

    Raises
    ------
    svftool.numerics.lapack.NotConverged
        If LAPACK says so.
    """
    if not _in_parts(G):
        return _dense(G, choose)
    d, e, tau = lapack.tridiagonalise(G)
    panels = [_panel(G, tau, first) for first in range(0, len(G) - 1, _PANEL)]
    del G  # the panels are half of it
    values, rows = _tridiagonal(d, e, choose)
    panels = [(Y, T @ Y) for Y, T in panels]

    def rotate(block: Tensor) -> None:
        for first in range(len(panels) - 1, -1, -1):
            Y, TY = panels[first]
            part = block[:, first * _PANEL + 1 :]
            part.addmm_(part @ Y.mT, TY, alpha=-1.0)

    pool.share([partial(rotate, rows[part]) for part in cuts(len(rows), _ROWS)])
    return values, rows


def _tridiagonal(d: Tensor, e: Tensor, choose: Choose) -> tuple[Tensor, Tensor]:
    """Return all eigenvalues, non-increasing, and the eigenvectors chosen, as rows."""
    if choose.rank is None:
        values, rows = lapack.tridiagonal_vectors(d, e)
        return values.flip(0), _flipped(rows)
    values = lapack.tridiagonal_values(d, e).flip(0)
    count = _count(values, choose)
    if _FEW * count <= len(d):
        return values, _flipped(lapack.largest_vectors(d, e, count))
    return values, _flipped(lapack.tridiagonal_vectors(d, e)[1][len(d) - count :])


def _flipped(rows: Tensor) -> Tensor:
    """Return the rows in the opposite order."""
    result = lapack.uneven(rows, *rows.shape)
    torch.index_select(rows, 0, torch.arange(len(rows) - 1, -1, -1), out=result)
    return result


def eigenvalues(G: Tensor, pool: Pool) -> Tensor:
    """Return the eigenvalues, non-increasing, of a matrix of which the upper triangle is given.

    It is overwritten.

    Raises
    ------
    svftool.numerics.lapack.NotConverged
        If LAPACK says so.
    """
    if not _in_parts(G):
        values: Tensor = torch.linalg.eigvalsh(G, UPLO="U")
        return values.flip(0)
    d, e = banded_tridiagonal(G, pool) if len(G) >= _LARGE else lapack.tridiagonalise(G)[:2]
    return lapack.tridiagonal_values(d, e).flip(0)


def _in_parts(G: Tensor) -> bool:
    return G.device.type == "cpu" and _SMALL < len(G) <= lapack.LARGEST and lapack.available()


def _dense(G: Tensor, choose: Choose) -> tuple[Tensor, Tensor]:
    try:
        values, vectors = torch.linalg.eigh(G, UPLO="U")
    except LinAlgError as exc:
        raise lapack.NotConverged(str(exc)) from exc
    values = values.flip(0)
    return values, vectors[:, len(G) - _count(values, choose) :].mT.flip(0).contiguous()


def _count(values: Tensor, choose: Choose) -> int:
    """Ask how many to keep, given eigenvalues of A'A."""
    return choose(values.clamp_min(0.0).sqrt())


def _panel(packed: Tensor, tau: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Return Y' and T' of the reflectors from `first` on."""
    last = min(first + _PANEL, len(tau))
    return block_reflector(packed[first:last, first + 1 :], tau[first:last])
