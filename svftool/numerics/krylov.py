"""The largest singular values of a big matrix by block Krylov iteration, checked by residuals.

From a random block the space of ``x, A'A x, (A'A)^2 x, ...`` is built with an orthonormal basis;
the matrix enters through products with single precision blocks only. What the space knows of the
largest singular values is measured by the residuals ``A'u - s v`` (with ``A v = s u``): a value is
off by no more than its residual, and by no more than about the residual's square over the gap to
the values that the space does not hold yet. The recurrence foresees these residuals for next to
nothing, so they are measured only where they will do. Once they do, a second random block is
iterated beside the first one, which would bring up values that the first had missed (more than a
block of equal ones), and the measure is taken again. The vectors found are then rotated by a small
exact decomposition in float64.

References
----------
Golub, Luk and Overton, A block Lanczos method for computing the singular values and corresponding
singular vectors of a matrix, ACM TOMS 7, 1981. Musco and Musco, Randomized block Krylov methods,
NeurIPS 2015.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from svftool.numerics.eigen import eigenvectors
from svftool.numerics.tall import Choose, Tall, Thin, cuts
from svftool.numerics.threads import ThreadPool

VALUES_BOUND = 1e-6
"""Error of the singular values that is promised, relative to the largest."""

# Vectors a step: enough for products at full speed, few enough for many powers of A'A.
BLOCK = 32

# Held to less than the bound, because a residual is measured in single precision.
_AIM = 8e-7

# A flat spectrum does not converge before the space is everything. With this share of the steps
# done and an error still this large, four digits would have to come in the rest.
_HALFWAY, _HOPELESS = 0.6, 5e-3

# Steps after which a second look must find the same values: one look may miss a direction that the
# random start hardly holds, and four steps of 32 multiply it by many powers.
_CONFIRM = 4

# The foreseen residual leaves rounding out, so it may be off by this factor before one is measured.
_FORESEEN = 2.0

# The next look comes when the space has grown by this factor, the larger one while the error is
# far.
_GROWTH, _LEAP, _FAR = 1.125, 1.375, 1e-4

# Rows and columns of a block, which stay in a core's cache.
_CUT = 1024
_ROWS = 128


@dataclass(frozen=True)
class Krylov:
    """What the iteration found, and how it went.

    Attributes
    ----------
    factors : Thin
        Of rank k.
    values_error : float
        Estimated error of the singular values, relative to the largest.
    dimension : int
        Size of the space that it took.
    """

    factors: Thin
    values_error: float
    dimension: int


def krylov_factors(
    A: Tall, k: int, pool: ThreadPool, *, seed: int = 0, limit: int | None = None
) -> Krylov | None:
    """Find the k largest singular values and their vectors.

    Parameters
    ----------
    A : Tall
        Not zero.
    k : int
        Less than n.
    pool : ThreadPool
    seed : int
        Of the random blocks.
    limit : int, optional
        Largest dimension of the space; half of n by default.

    Returns
    -------
    Krylov or None
        None if the space of that dimension does not give the values to `VALUES_BOUND`.
    """
    limit = limit or A.n // 2
    space = Space(A, pool, seed, limit)
    block, check = space.fresh_block(), max(2 * k, 4 * BLOCK)
    before: _Ritz | None = None
    while space.has_room:
        block = space.extend(block)
        if space.dimension < check:
            continue
        values, rows = space.coordinates(k)
        error = space.foreseen_error(values, rows)
        growth = _LEAP if error > _FAR else _GROWTH
        check = max(int(space.dimension * growth), space.dimension + BLOCK)
        if space.dimension > _HALFWAY * limit and error > _HOPELESS:
            return None
        found = space.ritz(values, rows) if error <= _FORESEEN * _AIM else None
        if found is None or found.values_error > _AIM:
            before = None
        elif before is None or found.differs_from(before):
            before, check = found, space.dimension + _CONFIRM * BLOCK
            block = space.fresh_block()
        else:
            factors = _rotated(A, found.vectors, pool)
            return Krylov(factors, found.values_error, space.dimension)
    return None


@dataclass(frozen=True)
class _Ritz:
    """Approximate singular values, and right singular vectors as rows."""

    values: Tensor
    vectors: Tensor
    values_error: float

    def differs_from(self, other: _Ritz) -> bool:
        return float((self.values - other.values).abs().max()) > _AIM * float(self.values[0])


class Space:
    """An orthonormal basis, as rows, and ``H = basis A'A basis'``, whose upper triangle is kept.

    Parameters
    ----------
    A : Tall
    pool : ThreadPool
    seed : int
        Of the random blocks.
    limit : int
        Largest dimension.
    block : int
        Vectors a step.
    dtype : torch.dtype
        float32 or float64, of the products.
    """

    def __init__(
        self,
        A: Tall,
        pool: ThreadPool,
        seed: int,
        limit: int,
        *,
        block: int = BLOCK,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        device = A.matrix.device
        self._tall = A
        # A copy in float64 would take more memory than all else: its blocks are made in passing.
        self._A = A.single(slice(None)) if dtype == torch.float32 else None
        self.block, self.limit = block, limit
        self.eps = torch.finfo(dtype).eps
        self._pool = pool
        self._cut = _CUT if A.on_cpu else max(A.matrix.shape)
        self._generator = torch.Generator().manual_seed(seed)
        self._basis = torch.empty(limit, A.n, dtype=dtype, device=device)
        self._H = torch.zeros(limit, limit, dtype=torch.float64, device=device)
        self._coupling = torch.zeros(block, block, dtype=torch.float64, device=device)
        self.dimension = 0

    @property
    def has_room(self) -> bool:
        """Whether another block fits."""
        return self.dimension + self.block <= len(self._basis)

    def fresh_block(self) -> Tensor:
        """Draw a random block, orthonormal and orthogonal to the space."""
        drawn = torch.randn(self.block, self._basis.shape[1], generator=self._generator)
        return self._orthonormal(drawn.to(self._basis))[0]

    def orthonormal(self, rows: Tensor) -> Tensor:
        """Return a block that spans `rows`, less what the space holds of them."""
        return self._orthonormal(rows.to(self._basis))[0]

    def extend(self, block: Tensor) -> Tensor:
        """Add a block to the basis; return the next one of its sequence."""
        old, new = self.dimension, self.dimension + self.block
        self._basis[old:new] = block
        self.dimension = new
        image = self._times_back(self._times(block))
        self._H[:new, old:new] = self._take_out(image)
        following, self._coupling = self._orthonormal(image)
        return following

    def coordinates(self, k: int) -> tuple[Tensor, Tensor]:
        """Return all eigenvalues of H, and its k first eigenvectors as rows."""
        size = self.dimension
        return eigenvectors(self._H[:size, :size].clone(), Choose(k), self._pool)

    def foreseen_error(self, values: Tensor, rows: Tensor) -> float:
        """Tell what `ritz` would measure, from what the last block still brings in.

        As long as every block followed from the one before it,
        ``A'A v - s^2 v`` is the share that v has in the last block, times the next one.
        """
        S = values[: len(rows)].clamp_min(1e-300).sqrt()
        return _values_error(self.residuals(rows) / S, S, values)

    def residuals(self, rows: Tensor) -> Tensor:
        """Return the lengths of ``A'A v - s^2 v``, without what rounding does to them."""
        off: Tensor = torch.linalg.vector_norm(rows[:, -self.block :] @ self._coupling, dim=1)
        return off

    def vectors(self, rows: Tensor) -> Tensor:
        """Return the vectors with these coordinates, as rows."""
        return rows.to(self._basis.dtype) @ self._basis[: self.dimension]

    def ritz(self, values: Tensor, rows: Tensor) -> _Ritz:
        """Return the approximations with these coordinates, and the error by their residuals."""
        vectors = self.vectors(rows)
        left, S, turn = _orthogonal_columns(self._times(vectors).double())
        vectors = turn.float() @ vectors
        residual = self._times_back(left.float()).double() - S[:, None] * vectors
        off = torch.linalg.vector_norm(residual, dim=1)
        return _Ritz(S, vectors, _values_error(off, S, values))

    def _times(self, rows: Tensor) -> Tensor:
        """Return ``A rows'``."""
        A, T, left = self._A, self._tall, rows.new_empty(self._tall.matrix.shape[0], len(rows))
        self._spread(
            len(left),
            lambda s: torch.mm(T.double(s) if A is None else A[s], rows.mT, out=left[s]),
        )
        return left

    def _times_back(self, left: Tensor) -> Tensor:
        """Return ``left' A``."""
        A, T, rows = self._A, self._tall, left.new_zeros(left.shape[1], self._tall.n)

        def columns(s: slice) -> None:
            if A is not None:
                torch.mm(left.mT, A[:, s], out=rows[:, s])
                return
            for part in T.slices():
                rows[:, s].addmm_(left[part].mT, T.double(part, s))

        self._spread(rows.shape[1], columns)
        return rows

    def _take_out(self, rows: Tensor) -> Tensor:
        """Take the space's share out of `rows`, in place; return its coordinates, by columns."""
        basis = self._basis[: self.dimension]
        share = rows.new_empty(len(basis), len(rows))
        self._spread(len(basis), lambda s: torch.mm(basis[s], rows.mT, out=share[s]))
        self._spread(
            rows.shape[1],
            lambda s: rows[:, s].addmm_(share.mT, basis[:, s], alpha=-1.0),
        )
        return share

    def _spread(self, total: int, work: Callable[[slice], object]) -> None:
        def one(part: slice) -> None:
            work(part)

        self._pool.share([partial(one, part) for part in cuts(total, self._cut)])

    def _orthonormal(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Orthogonalise twice: what rounding left of a vanished row becomes a new direction.

        Returns
        -------
        result : Tensor
            Orthonormal rows.
        lower : (b, b) Tensor
            float64; `rows`, less what it had in the space, is ``lower @ result``.
        """
        lower = torch.eye(len(rows), dtype=torch.float64, device=rows.device)
        for _ in range(2):
            self._take_out(rows)
            Q, R = torch.linalg.qr(rows.mT)
            rows, lower = Q.mT.contiguous(), lower @ R.mT.double()
        return rows, lower


def _values_error(off: Tensor, S: Tensor, values: Tensor) -> float:
    """Bound the error of the singular values S by their residuals, relative to the largest.

    `values` are the squares of all that the space knows.
    """
    k = len(S)
    gap = (S.square() - values[min(k + k // 2, len(values) - 1)]).clamp_min(1e-300)
    return float(torch.minimum(off, off.square() * S / (2.0 * gap)).max() / S[0])


def _rotated(A: Tall, vectors: Tensor, pool: ThreadPool) -> Thin:
    """Return the exact factors of A within the span of the rows given."""
    basis = torch.linalg.qr(vectors.double().mT).Q
    slices = A.slices(_ROWS if A.on_cpu else None)
    image = basis.new_empty(A.matrix.shape[0], basis.shape[1])
    squares = basis.new_zeros(len(slices))

    def block(index: int, rows: slice) -> None:
        wide = A.double(rows)
        squares[index] = wide.square().sum()
        torch.mm(wide, basis, out=image[rows])

    pool.share([partial(block, i, rows) for i, rows in enumerate(slices)])
    left, S, turn = _orthogonal_columns(image)
    return Thin(left.float(), S, (turn @ basis.mT).float(), float(squares.sum()))


def _orthogonal_columns(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose a narrow matrix by LAPACK: its thin factors U, S and Vh."""
    Q, R = torch.linalg.qr(image)
    left, S, right = torch.linalg.svd(R)
    return Q @ left, S, right
