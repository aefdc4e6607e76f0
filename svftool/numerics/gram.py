"""Factors from the Gram matrix of the short side: the fast rung of the ladder.

With ``A' A = V diag(S^2) V'`` in float64 the long side is one product, ``U = A V / S``. The Gram
matrix knows singular values to ``1e-16 S[0]^2 / S[i]``, which decides how each column is made:

- head, ``S[i]`` well above the rounding of a single precision product: that product;
- middle: the same product in float64;
- deep, ``S[i] < 1e-4 S[0]``, where the columns of ``A V`` are accurate but no longer orthogonal:
  they are rotated against each other by their own Gram matrix, after what they share with the
  columns before them has been taken away (at most ``1e-10 S[0]``). Spectra that fall over many
  decades take this step several times. What is left at the rounding level is replaced by an
  orthonormal basis of the complement.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from svftool.numerics.eigen import eigenvectors, gram
from svftool.numerics.tall import ALL, Choose, Tall, Thin, tall
from svftool.numerics.threads import ThreadPool

# Left vectors are divided by the singular value, which magnifies rounding: above this share of the
# root mean square single precision keeps columns orthogonal to 6e-8 / 0.03, a fifth of the bound.
SINGLE = 0.03

# The Gram matrix squares the condition number: below 1e-4 of the largest value, float64 keeps fewer
# than 8 of its 16 digits, and the values from there on are found again in what the others leave.
_DEEP = 1e-4

# Below this share of the largest value there is rounding alone: float64 has 2.2e-16, and a sum of a
# few hundred thousand products loses less than three digits.
_NULL = 1e-13


def gram_factors(A: Tall, choose: Choose, pool: ThreadPool, *, single: float = SINGLE) -> Thin:
    """Find the largest singular values and their vectors through the Gram matrix, unchecked.

    Parameters
    ----------
    A : Tall
        Not zero.
    choose : Choose
        How many of them.
    pool : ThreadPool
    single : float
        Singular values below this share of their root mean square get their left vectors in
        float64; with infinity all of them do.

    Raises
    ------
    svftool.numerics.lapack.NotConverged
        If LAPACK says so.
    """
    values, V = eigenvectors(gram(A, pool), choose, pool)
    values.clamp_min_(0.0)
    squares = float(values.sum())
    S = values[: len(V)].sqrt()
    deep = int((_DEEP * S[0] < S).sum())
    head = min(deep, int((single * (squares / A.n) ** 0.5 < S).sum()))
    U, rest = _multiply(A, S, V, head, deep, pool)
    if deep < len(S):
        _orthogonalise(A, U, S, V, rest, deep, pool)
    return Thin(U, S.cummin(0).values, V.float(), squares)


def _multiply(
    A: Tall, S: Tensor, V: Tensor, head: int, deep: int, pool: ThreadPool
) -> tuple[Tensor, Tensor]:
    """Return ``A V' / S`` with its columns up to `deep` filled in, and ``A V'`` from there on."""
    slices = A.slices()
    long, k = A.matrix.shape[0], len(S)
    U = V.new_empty((k, long) if A.transposed else (long, k), dtype=torch.float32)
    U = U.mT if A.transposed else U
    rest = V.new_empty(long, k - deep)
    right = (V[:head] / S[:head, None]).float()
    middle = V[head:deep] / S[head:deep, None]
    squares = V.new_zeros(len(slices), deep - head)

    def block(index: int, rows: slice) -> None:
        if head:
            torch.mm(A.single(rows), right.mT, out=U[rows, :head])
        if head < k:
            wide = A.double(rows)
            columns = wide @ middle.mT
            squares[index] = columns.square().sum(0)
            U[rows, head:deep] = columns.float()
            torch.mm(wide, V[deep:].mT, out=rest[rows])

    pool.share([partial(block, i, rows) for i, rows in enumerate(slices)])
    lengths = squares.sum(0).sqrt()
    S[head:deep] *= lengths
    U[:, head:deep] /= lengths.float()
    return U, rest


def _orthogonalise(
    A: Tall, U: Tensor, S: Tensor, V: Tensor, rest: Tensor, done: int, pool: ThreadPool
) -> None:
    """Fill in what belongs to the columns from `done` on, given ``rest = A V[done:]'``."""
    floor = _NULL * float(S[0])
    while done < len(S):
        _project_off(A, U[:, :done], rest)
        if float(torch.linalg.vector_norm(rest, dim=0).max()) <= floor:
            U[:, done:] = _complement(U[:, :done].double(), rest.shape[1])
            S[done:] = 0.0
            return
        inner = tall(rest)
        values, X = eigenvectors(gram(inner, pool), ALL, pool)
        V[done:] = X @ V[done:]
        rest = rest @ X.mT
        count = int((_DEEP**2 * values[0] < values).sum())
        lengths = torch.linalg.vector_norm(rest[:, :count], dim=0)
        U[:, done : done + count] = rest[:, :count] / lengths
        S[done : done + count] = lengths
        rest, done = rest[:, count:].contiguous(), done + count


def _project_off(A: Tall, basis: Tensor, rest: Tensor) -> None:
    """Take what the columns of `rest` have in common with the orthonormal `basis` out of them.

    Once is not enough: the basis is orthonormal to single precision only, and a column may be
    all but inside its span.
    """
    for _ in range(2):
        common = rest.new_zeros(basis.shape[1], rest.shape[1])
        for rows in A.slices():
            common.addmm_(basis[rows].double().mT, rest[rows])
        for rows in A.slices():
            rest[rows].addmm_(basis[rows].double(), common, alpha=-1.0)


def _complement(basis: Tensor, count: int) -> Tensor:
    """Return `count` orthonormal columns orthogonal to the columns of `basis`."""
    long, done = basis.shape
    reflectors, tau = torch.geqrf(basis)
    columns = basis.new_zeros(long, count)
    columns[done : done + count] = torch.eye(count, dtype=basis.dtype, device=basis.device)
    return torch.ormqr(reflectors, tau, columns)
