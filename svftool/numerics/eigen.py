"""The Gram matrix of the short side and its eigenvectors, in float64."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from svftool.numerics import lapack
from svftool.numerics.tall import Choose, Tall, cuts
from svftool.numerics.threads import ThreadPool

# Products of Householder reflectors as one large product, ``H1 H2 ... = I - Y T Y'``.


def block_reflector(rows: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """Gather reflectors ``I - tau v v'`` into one block.

    ``T^-1 = diag(1 / tau) + strictly upper (Y' Y)`` (Puglisi, SIAM J. Sci. Stat. Comput. 13, 1992);
    a reflector with tau = 0 is the identity.

    Parameters
    ----------
    rows : (b, r) Tensor
        Each reflector's vector, of which the first i entries are taken as 0 and the next as 1 in
        row i.
    tau : (b,) Tensor

    Returns
    -------
    Y' : (b, r) Tensor
    T' : (b, b) Tensor
        Lower triangular.
    """
    Y = rows.triu()
    Y.diagonal().fill_(1.0)
    idle = tau == 0
    Y[idle] = 0.0
    inverse = (Y @ Y.mT).triu(1)
    inverse.diagonal().copy_(torch.where(idle, 1.0, tau).reciprocal())
    eye = torch.eye(len(tau), dtype=Y.dtype)
    return Y, torch.linalg.solve_triangular(inverse, eye, upper=True).mT


# A large symmetric matrix is brought to a band, and the band to tridiagonal form.


# Diagonals of the band: a wider one makes the products of the first reduction larger, and the
# second reduction, which one core does alone, longer.
WIDTH = 48
_BAND_TILE = 512


def banded_tridiagonal(G: Tensor, pool: ThreadPool) -> tuple[Tensor, Tensor]:
    """Reduce a symmetric matrix to tridiagonal form, without the rotation that leads to it.

    Parameters
    ----------
    G : (n, n) Tensor
        float64, upper triangle; overwritten.
    pool : ThreadPool

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


def _reduce(G: Tensor, start: int, pool: ThreadPool) -> None:
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


# Tiles and blocks are sized to the caches: 2**19 entries are 4 MiB in float64.
_TILE = 1024
_PANEL = 48
_ROWS = 384
_GRAM_ROWS = 512
_BLOCK_ENTRIES = 2**19

# Up to a third of the eigenvectors come from inverse iteration, more from divide and conquer. Timed
# on an Intel core at n = 768 and 1536: a third takes 1.5 and 1.8 times as long as all by divide and
# conquer, an eighth 0.6 times. The audit asks for ten.
_FEW = 3

# Up to the first side torch's own eigh is taken: on an Intel core with MKL it takes 0.5 times as
# long there, and 0.8 times at 384; the processor of docs/performance.md set the number. From the
# second on the way by a band is faster for values (VGG-16 there).
_SMALL, _LARGE = 160, 2560


def gram(A: Tall, pool: ThreadPool) -> Tensor:
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


def eigenvectors(G: Tensor, choose: Choose, pool: ThreadPool) -> tuple[Tensor, Tensor]:
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


def eigenvalues(G: Tensor, pool: ThreadPool) -> Tensor:
    """Return the eigenvalues, non-increasing, of a matrix of which the upper triangle is given.

    It is overwritten.

    Raises
    ------
    svftool.numerics.lapack.NotConverged
        If LAPACK says so.
    """
    if not _in_parts(G):
        return _dense_values(G).flip(0)
    d, e = banded_tridiagonal(G, pool) if len(G) >= _LARGE else lapack.tridiagonalise(G)[:2]
    return lapack.tridiagonal_values(d, e).flip(0)


def _in_parts(G: Tensor) -> bool:
    return G.device.type == "cpu" and _SMALL < len(G) <= lapack.LARGEST and lapack.available()


def _dense_values(G: Tensor) -> Tensor:
    try:
        values: Tensor = torch.linalg.eigvalsh(G, UPLO="U")
    except LinAlgError as exc:
        raise lapack.NotConverged(str(exc)) from exc
    return values


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
