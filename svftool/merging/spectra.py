"""Singular vectors of changes in float64, and the orthogonal matrix nearest to a given one."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from svftool.merging.combined import Triplets
from svftool.numerics import ThreadPool, svd
from svftool.numerics.eigen import eigenvectors, gram
from svftool.numerics.lapack import NotConverged
from svftool.numerics.tall import ALL, Choose, Tall, cuts, tall

_SMALL = 160
"""Short side up to which LAPACK takes no longer than the Gram matrix."""

NULL = 1e-6
"""Share of the largest singular value up to which there is only rounding of float32 weights."""

_DEPENDENT = 1e-6
"""Share of the longest direction below which columns are taken to depend on each other."""

_ROWS = 512
"""Rows of one part of a product."""


def directions(
    matrix: Tensor, pool: ThreadPool, *, most: int | None = None, floor: float = 0.0
) -> Triplets:
    """Find the leading singular values and vectors of a change.

    The eigenvectors of the Gram matrix of the short side, in float64; LAPACK for small ones. The
    Gram matrix keeps vectors orthogonal to ``1e-16 (S[0] / S[i])^2``, which is why values below
    1e-6 of the largest, where float32 weights hold nothing, are left out.

    Parameters
    ----------
    matrix : (m, n) Tensor
        Finite.
    pool : ThreadPool
    most : int, optional
        How many; all that are more than rounding by default.
    floor : float
        Singular values up to it are rounding too: of a remainder, what it is the remainder of.
    """
    A = tall(matrix)
    if A.top == 0.0 or most == 0:
        m, n = matrix.shape
        zero = torch.zeros(m, n, dtype=torch.float64, device=matrix.device)
        return Triplets(zero[:, :0], zero.new_zeros(0), zero[:0])
    if A.n > _SMALL:
        try:
            return _by_gram(A, most, pool, floor)
        except NotConverged:
            pass
    found = svd(matrix, rank=most, dtype=torch.float64, pool=pool)
    count = _above_rounding(found.S, floor)
    return Triplets(found.U[:, :count], found.S.double()[:count], found.Vh[:count])


def _above_rounding(S: Tensor, floor: float) -> int:
    return int((max(float(S[0]) * NULL, floor) < S).sum())


def _by_gram(A: Tall, most: int | None, pool: ThreadPool, floor: float) -> Triplets:
    values, rows = eigenvectors(gram(A, pool), Choose(most), pool)
    S = values[: len(rows)].clamp_min(0.0).sqrt()
    count = _above_rounding(S, floor * 2.0**-A.exponent)
    S, V = S[:count], rows[:count].contiguous()
    right = (V / S[:, None]).mT
    U = V.new_empty(A.matrix.shape[0], count)

    def block(part: slice) -> None:
        torch.mm(A.double(part), right, out=U[part])

    pool.share([partial(block, part) for part in A.slices()])
    S = S * 2.0**A.exponent
    return Triplets(V.mT, S, U.mT) if A.transposed else Triplets(U, S, V)


def nearest_orthogonal(columns: Tensor, pool: ThreadPool) -> Tensor:
    """Return the matrix with orthonormal columns nearest to a given one: ``P Q'`` of ``P S Q'``.

    Parameters
    ----------
    columns : (m, k) Tensor
        float64, such as unit vectors of several inputs side by side.
    pool : ThreadPool

    Returns
    -------
    (m, k) Tensor
        ``A (A'A)^(-1/2)``. Where columns depend on each other, or are more than m, the inverse is
        that of what they span: a fixed choice, where singular vectors would be an arbitrary one.

    References
    ----------
    N. J. Higham, Computing the polar decomposition, SIAM J. Sci. Stat. Comput. 7, 1986.

    Examples
    --------
    >>> columns = torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.0, 0.0]], dtype=torch.float64)
    >>> nearest_orthogonal(columns, ThreadPool()).tolist()
    [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    """
    return ranked_orthogonal(columns, pool)[0]


def ranked_orthogonal(columns: Tensor, pool: ThreadPool) -> tuple[Tensor, int]:
    """Return what `nearest_orthogonal` does, and its rank: of k, the columns are orthonormal.

    Parameters are those of `nearest_orthogonal`.
    """
    if 0 in columns.shape:
        return columns, 0
    A = tall(columns)
    values, rows = eigenvectors(gram(A, pool), ALL, pool)
    count = int((values[0] * _DEPENDENT**2 < values).sum())
    V = rows[:count]
    # The inverse root is of the short side: one product with the long side, where one with V / root
    # and one with V' would be two, and as exact.
    inverse = (V / values[:count, None].sqrt()).mT @ V
    result = product(A.double(slice(None)), inverse, pool)
    return result.mT if A.transposed else result, count


def product(left: Tensor, right: Tensor, pool: ThreadPool) -> Tensor:
    """Multiply two matrices in parts that idle threads can take.

    Parameters
    ----------
    left : (m, k) Tensor
    right : (k, n) Tensor
    pool : ThreadPool
    """
    result = left.new_empty(len(left), right.shape[1])

    def rows(part: slice) -> None:
        torch.mm(left[part], right, out=result[part])

    pool.share([partial(rows, part) for part in cuts(len(left), _ROWS)])
    return result
