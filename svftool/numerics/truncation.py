"""The best matrix of a low rank, no closer than asked: block Krylov iteration until little is left.

What counts of a truncation is its error, ``sum of the squares of A - sum of the k squares found``.
That is right long before the singular vectors are: two vectors of nearly one value may be mixed at
no loss, and a flat spectrum has nothing else. The iteration of `svftool.numerics.krylov` therefore
stops on a bound of the squares that are still missing. A vector v of the space with
``A'A v = t v + r`` lacks no more than ``|r|``, and no more than about ``|r|^2 / (t - t')``, where
t' is what the space holds beside the k best. The blocks are wider than k, so that values as many
as that which are all but equal cannot hide each other.

The products are in float32. Two products in float64 at the end, ``Q = orth(A V)`` and ``Q'A``,
take rounding out again: what V has of a direction with value s_j is multiplied by
``s_j / s_i``. Where float32 does not reach far enough down, the iteration goes on from there in
float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from svftool.numerics.krylov import Space
from svftool.numerics.tall import Tall, Thin, cuts
from svftool.numerics.threads import ThreadPool

# Vectors beside the k wanted ones, and a block's least width.
_BESIDE, _LEAST = 8, 16

# Blocks that the iteration in float64 may take: it starts from vectors that hold what float32 can.
_STEPS_IN_DOUBLE = 6

# A sum of squares in the space is off by less than this many units of rounding.
_SUMMING = 8

# Below so many units of rounding a square is no more than roughly known.
_FAINT = 64

_TINY = 1e-300

# The pace quickens: an estimate by the last two steps asks for up to this many times too many.
_PATIENCE = 3

# Rows and columns of a block in float64, which stay in a core's cache.
_CUT = 256


@dataclass(frozen=True)
class Slack:
    """How close to the best truncation is close enough.

    Attributes
    ----------
    excess : float
        By how much the Frobenius norm of what is cut off may exceed the least one, relative to it.
    floor : float
        Singular values up to it need not be found.
    rounding : float
        Share of the matrix's norm that is lost anyway when the factors are stored.
    """

    excess: float = 1e-6
    floor: float = 0.0
    rounding: float = 0.0


def truncated_factors(
    A: Tall, k: int, slack: Slack, pool: ThreadPool, *, seed: int = 0
) -> Thin | None:
    """Find factors of rank k whose error is the least one, or nearly so.

    Parameters
    ----------
    A : Tall
        Not zero.
    k : int
        Less than n.
    slack : Slack
    pool : ThreadPool
    seed : int
        Of the random block.

    Returns
    -------
    Thin or None
        ``U diag(S) V' = U U'A``. None where iterating costs more than all eigenvectors of A'A.
    """
    squares = _squares(A, pool)
    block = 8 * -(-max(_LEAST, k + _BESIDE) // 8)
    goal = _Goal(A.n, k, slack, slack.floor * 2.0**-A.exponent, squares)
    space = Space(A, pool, seed, A.n // 2, block=block)
    found = _iterate(space, space.fresh_block, goal)
    if found is not None and not found.enough:
        # Rounding of single precision is in the way of the smaller values.
        start = found.vectors
        limit = min(A.n // 2, _STEPS_IN_DOUBLE * block)
        space = Space(A, pool, seed, limit, block=block, dtype=torch.float64)
        found = _iterate(space, lambda: space.orthonormal(start), goal)
    if found is None or not found.enough:
        return None
    return _polished(A, found.vectors, k, squares, pool)


@dataclass(frozen=True)
class _Found:
    """Vectors, as rows, and whether they will do; else rounding is in the way of better ones."""

    vectors: Tensor
    enough: bool


@dataclass(frozen=True)
class _Goal:
    """When k vectors will do: the squares that they miss against those that are cut off."""

    n: int
    k: int
    slack: Slack
    floor: float
    squares: float

    def missing(self, values: Tensor, off: Tensor) -> float:
        """Bound the squares that are missing after the two last products, given residuals.

        What is outside of the space has squares up to about the first ones beside the k, or more
        where residuals say that the space knows little yet.
        """
        outside = off.clamp_min(float(values[self._beside(values)]))
        return self._missing(values, off, outside)

    def rounding(self, values: Tensor, eps: float) -> float:
        """Bound what rounding of the products alone makes be missing: it goes everywhere alike."""
        found = values[: self.k].clamp_min(0.0)
        outside = torch.full_like(found, self._rest(values, -eps) / self.n)
        outside[found < _FAINT * eps * values[0]] = math.inf
        return self._missing(values, eps * (values[0] * found).sqrt(), outside)

    def allowed(self, values: Tensor, eps: float) -> float:
        """Return the squares that may be missing, by a lower bound of those that are cut off."""
        lost = self.slack.rounding**2 * self.squares
        return self.slack.excess * (max(self._rest(values, eps), 0.0) + lost)

    def _beside(self, values: Tensor) -> int:
        return min(self.k + _BESIDE, len(values)) - 1

    def _rest(self, values: Tensor, eps: float) -> float:
        kept = float(values[: self.k].clamp_min(0.0).sum())
        return self.squares - kept - _SUMMING * eps * self.squares

    def _missing(self, values: Tensor, off: Tensor, outside: Tensor) -> float:
        found = values[: self.k]
        gap = (found - values[self._beside(values)]).clamp_min(_TINY)
        kept = (outside / found.clamp_min(_TINY)).clamp_max(1.0)
        each = torch.minimum(off, off.square() / gap) * kept
        return float(each[found > self.floor**2].sum())


def _iterate(space: Space, start: Callable[[], Tensor], goal: _Goal) -> _Found | None:
    """Extend a space until it holds enough; None where that costs too much."""
    block, look, before = start(), 1, None
    while space.has_room:
        block = space.extend(block)
        steps = space.dimension // space.block
        if steps < look and space.has_room:
            continue
        values, rows = space.coordinates(space.block)
        missing = goal.missing(values, space.residuals(rows[: goal.k]))
        rounding, allowed = goal.rounding(values, space.eps), goal.allowed(values, space.eps)
        # One block is a sample: what it says of the values beside the best ones is too low.
        enough = steps > 1 and missing + rounding <= allowed
        if enough or (missing < rounding and rounding > allowed):
            return _Found(space.vectors(rows), enough)
        needed = _foreseen(before, (steps, missing), allowed)
        room = space.limit // space.block - steps
        if 2 * steps > room and needed > _PATIENCE * room and needed < math.inf:
            return None
        look = steps + (max(1, int(needed / _PATIENCE)) if needed < math.inf else 1)
        before = steps, missing
    return None


def _foreseen(before: tuple[int, float] | None, now: tuple[int, float], allowed: float) -> float:
    """Return how many steps more are needed at the pace of the last ones; infinity if unknown."""
    if before is None or not 0.0 < allowed < now[1] < before[1]:
        return math.inf
    pace = math.log(before[1] / now[1]) / (now[0] - before[0])
    return math.log(now[1] / allowed) / pace


def _squares(A: Tall, pool: ThreadPool) -> float:
    slices = A.slices(_CUT if A.on_cpu else None)
    found = torch.zeros(len(slices), dtype=torch.float64, device=A.matrix.device)

    def add(index: int, rows: slice) -> None:
        found[index] = A.double(rows).square().sum()

    pool.share([partial(add, i, rows) for i, rows in enumerate(slices)])
    return float(found.sum())


def _polished(A: Tall, vectors: Tensor, k: int, squares: float, pool: ThreadPool) -> Thin:
    """Return the best factors of rank k within the span of ``A vectors'``."""
    basis = torch.linalg.qr(vectors.double().mT).Q
    image = basis.new_empty(A.matrix.shape[0], basis.shape[1])

    def forth(rows: slice) -> None:
        torch.mm(A.double(rows), basis, out=image[rows])

    slices = A.slices(_CUT if A.on_cpu else None)
    pool.share([partial(forth, rows) for rows in slices])
    left = torch.linalg.qr(image).Q.mT.contiguous()
    back = left.new_zeros(len(left), A.n)

    def home(columns: slice) -> None:
        for rows in A.slices():
            back[:, columns] += left[:, rows] @ A.double(rows, columns)

    pool.share([partial(home, part) for part in cuts(A.n, _CUT if A.on_cpu else A.n)])
    right, R = torch.linalg.qr(back.mT)
    turn, S, other = torch.linalg.svd(R.mT)
    U = left.mT @ turn[:, :k]
    return Thin(U.float(), S[:k].clone(), (other[:k] @ right.mT).float(), squares)
