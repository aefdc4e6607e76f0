"""The checked singular value decomposition of one matrix or a batch: the ladder of methods.

Each rung is tried in turn and its factors are measured; those that miss a bound are thrown away.

========== =========================================================================================
zero       all entries are zero: unit vectors
truncated  truncated to a rank, with some slack: block Krylov iteration until little is missing
krylov     truncated to a rank: block Krylov iteration, accepted at its measured residual
gram       float64 Gram matrix of the short side, the long side in single precision where that does
           (on the CPU alone)
gram64     the same with everything in float64
lapack64   LAPACK's divide and conquer in float64 on the CPU
========== =========================================================================================
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from svftool.errors import NumericalError
from svftool.numerics.checks import measure
from svftool.numerics.eigen import eigenvalues, gram
from svftool.numerics.gram import gram_factors
from svftool.numerics.krylov import krylov_factors
from svftool.numerics.lapack import NotConverged
from svftool.numerics.results import Svd, signs
from svftool.numerics.tall import Choose, Rank, Tall, Thin, tall
from svftool.numerics.threads import ThreadPool
from svftool.numerics.truncation import Slack, truncated_factors

Method = Literal["auto", "exact", "randomized"]

RECONSTRUCTION_BOUND = 1e-6
ORTHOGONALITY_BOUND = 1e-5

_Rung = tuple[str, Callable[[Tall, Choose, ThreadPool], Thin]]

# The reconstruction error is an estimate whose standard deviation is a quarter of it: held to this
# share of the bound it would have to be low by more than two and a half of them.
_CAUTION = 0.6

# Iterating pays from these on: 2n x n matrices on one core, time of all vectors over time of the
# iteration, at rank n/8, n/16, n/32. Spectrum 1/i: n = 384 0.5, 0.6, 0.3; n = 768 0.9, 1.4, 1.2;
# n = 1536 1.2, 1.8, 3.0. Spectrum i^-1/2, n = 1536: 0.8, 1.6, 2.7. Flat: 0.6 throughout, which is
# what giving up costs.
_LARGE = 768
_SPARSE = 16

# The same on a GPU, where an eigenproblem takes less time than many small steps of an iteration. On
# an H100, exact against iterated at rank n/16 of a flat spectrum: n = 768 10 and 24 ms, 1024 14
# and 36, 2048 32 and 84; at rank 64 of 4096 137 and 82, and 27 where the spectrum falls as 1/i.
_LARGE_ON_GPU = 3072

# Where some slack is allowed.
_NARROW = 8

# Below it a float32 singular value has less than 23 bits: its smallest normal number is 1.2e-38,
# and the values down to 1e-7 of the largest are to keep theirs.
_SMALLEST = 1e-31

# Multiplications above which one matrix is worth several threads: some 5 ms on one core.
_SPREAD = 2e8


def svd(
    matrix: Tensor,
    *,
    rank: Rank | None = None,
    method: Method = "auto",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    slack: Slack | None = None,
    pool: ThreadPool | None = None,
) -> Svd:
    """Decompose a matrix; every factor that is handed out has been measured.

    Parameters
    ----------
    matrix : (m, n) or (E, m, n) Tensor
        Any floating dtype, on any device; not changed. A batch is E matrices of one rank.
    rank : int or callable, optional
        Number of singular values to keep, or a function that tells it from all singular values,
        (k,) or (E, k) in float64 and non-increasing; all of them by default.
    method : {"auto", "exact", "randomized"}
        How a truncated decomposition may be found: "auto" tries block Krylov iteration where it
        is likely to be the faster, "randomized" always. Both take the exact way where the
        iteration does not reach the accuracy of `svftool.numerics.krylov`.
    seed : int
        Of the randomized method.
    dtype : torch.dtype
        float32 or float64, of the factors; those in float64 come from LAPACK.
    slack : Slack, optional
        How far the error of a decomposition truncated to a number may be from the least one: such
        factors come sooner. They are a projection, ``U diag(S) Vh = U U'W``, or W times one. The
        single values and vectors are no better than that needs. Of no effect on a batch.
    pool : ThreadPool, optional
        Threads to use; by default as many as torch has. Their number does not change the result.

    Returns
    -------
    Svd
        S is float64 where float32 cannot hold it (beyond 1e38, below 1e-31).

    Raises
    ------
    NumericalError
        If the matrix holds NaN or infinity, or no method meets the bounds: reconstruction to 1e-6
        of the Frobenius norm, orthogonality to 1e-5.
    ValueError
        If the matrix has other than two or three dimensions, or the rank is below 1.
    """
    start = time.perf_counter()
    if isinstance(rank, int) and rank < 1:
        raise ValueError(f"rank is {rank}, expected at least 1")
    with _threads(matrix, pool) as used:
        if matrix.ndim == 3:
            result = _batch(matrix, rank, method, seed, dtype, used)
        else:
            result = _one(matrix, rank, method, seed, dtype, used, slack)
    return replace(result, seconds=time.perf_counter() - start)


def singular_values(matrix: Tensor, *, pool: ThreadPool | None = None) -> Tensor:
    """Compute singular values alone, to 1e-6 of the largest or better.

    Parameters
    ----------
    matrix : (m, n) or (E, m, n) Tensor
        Any floating dtype, on any device; not changed.
    pool : ThreadPool, optional
        Threads to use; by default as many as torch has. Their number does not change the result.

    Returns
    -------
    (k,) or (E, k) Tensor
        float64, non-increasing, ``k = min(m, n)``.

    Raises
    ------
    NumericalError
        If the matrix holds NaN or infinity.
    """
    with _threads(matrix, pool) as used:
        if matrix.ndim == 2:
            return _values(matrix, used)
        values = torch.empty(len(matrix), min(matrix.shape[1:]), dtype=torch.float64)

        def fill(index: int) -> None:
            values[index] = _values(matrix[index], used)

        used.share([partial(fill, i) for i in range(len(matrix))])
        return values


def _threads(matrix: Tensor, pool: ThreadPool | None) -> AbstractContextManager[ThreadPool]:
    if matrix.ndim not in (2, 3):
        shape = tuple(matrix.shape)
        raise ValueError(f"matrix has shape {shape}, expected two or three dimensions")
    if pool is not None:
        return nullcontext(pool)
    large = matrix.numel() * min(matrix.shape[-2:]) > _SPREAD and matrix.device.type == "cpu"
    return ThreadPool(torch.get_num_threads() - 1 if large else 0)


def _values(matrix: Tensor, pool: ThreadPool) -> Tensor:
    A = tall(matrix)
    if min(A.matrix.shape) == 0:
        return torch.zeros(0, dtype=torch.float64)
    try:
        values = eigenvalues(gram(A, pool), pool).clamp_min(0.0).sqrt()
    except NotConverged:
        values = torch.linalg.svdvals(A.double(slice(None)).cpu())
    return values.cpu() * 2.0**A.exponent


def _one(
    matrix: Tensor,
    rank: Rank | None,
    method: Method,
    seed: int,
    dtype: torch.dtype,
    pool: ThreadPool,
    slack: Slack | None = None,
) -> Svd:
    A = tall(matrix)
    choose = Choose(rank)
    if A.top == 0.0:
        return _zero(matrix, choose(torch.zeros(A.n, dtype=torch.float64)), dtype)
    if isinstance(rank, int) and dtype == torch.float32:
        found = _iterated(A, rank, method, seed, slack, pool)
        if found is not None:
            return found
    rungs = _rungs(A) if dtype == torch.float32 else _RUNGS[-1:]
    best = (math.inf, math.inf)
    for name, rung in rungs:
        try:
            factors = rung(A, choose, pool)
        except NotConverged:
            continue
        errors = measure(A, factors, pool)
        if _within(errors):
            return _finish(A, factors, name, errors, dtype)
        best = min(best, errors)
    raise NumericalError(
        f"reconstruction error {best[0]:.1e} and orthogonality error {best[1]:.1e} at best, "
        f"expected {RECONSTRUCTION_BOUND:.0e} and {ORTHOGONALITY_BOUND:.0e} at most"
    )


def _iterated(
    A: Tall, rank: int, method: Method, seed: int, slack: Slack | None, pool: ThreadPool
) -> Svd | None:
    """Truncate by an iteration, where one is worth it and what it finds holds."""
    if slack is not None:
        return _truncated(A, rank, slack, seed, pool)
    if not _worth_iterating(A, rank, method):
        return None
    found = krylov_factors(A, rank, pool, seed=seed)
    if found is None or not _within(errors := measure(A, found.factors, pool)):
        return None
    result = _finish(A, found.factors, "krylov", errors, torch.float32)
    return replace(result, values_error=found.values_error)


def _truncated(A: Tall, rank: int, slack: Slack, seed: int, pool: ThreadPool) -> Svd | None:
    large = _LARGE if A.on_cpu else _LARGE_ON_GPU
    if A.n < large or _NARROW * rank > A.n:
        return None
    thin = truncated_factors(A, rank, slack, pool, seed=seed)
    if thin is None:
        return None
    # It holds that U diag(S) = A V only as far as V has converged, but V diag(S) = A'U.
    turned = replace(A, matrix=A.matrix.mT, transposed=not A.transposed)
    errors = measure(turned, replace(thin, U=thin.V.mT, V=thin.U.mT), pool)
    return _finish(A, thin, "truncated", errors, torch.float32) if _within(errors) else None


def _rungs(A: Tall) -> tuple[_Rung, ...]:
    """Leave out what only a CPU gains from.

    An H100 multiplies in float64 as fast as in float32, and its long sums in float32 miss the bound
    from sides of 2048 on.
    """
    return _RUNGS if A.on_cpu else _RUNGS[1:]


def _within(errors: tuple[float, float]) -> bool:
    """Hold errors to the bounds; the first is an estimate, so it is held to less."""
    return errors[0] <= _CAUTION * RECONSTRUCTION_BOUND and errors[1] <= ORTHOGONALITY_BOUND


def _worth_iterating(A: Tall, rank: int, method: Method) -> bool:
    if method == "randomized":
        return rank < A.n
    large = _LARGE if A.on_cpu else _LARGE_ON_GPU
    return method == "auto" and A.n >= large and _SPARSE * rank <= A.n


def _finish(
    A: Tall, factors: Thin, name: str, errors: tuple[float, float], dtype: torch.dtype
) -> Svd:
    """Fix the signs, undo scaling and transposition, and say what truncation cut off."""
    U, V = factors.U, factors.V
    flips = signs(V.mT if A.transposed else U)
    U *= flips
    V *= flips[:, None]
    energy = (
        min(1.0, float(factors.S.square().sum()) / factors.squares) if U.shape[1] < A.n else 1.0
    )
    S = factors.S * 2.0**A.exponent
    fits = _SMALLEST < float(S[0]) < torch.finfo(torch.float32).max
    return Svd(
        U=(V.mT if A.transposed else U).to(dtype).contiguous(),
        S=S.float() if fits and dtype == torch.float32 else S,
        Vh=(U.mT if A.transposed else V).to(dtype).contiguous(),
        method=name,
        reconstruction_error=math.hypot(errors[0], math.sqrt(1.0 - energy)),
        orthogonality_error=errors[1],
        energy=energy,
    )


def _zero(matrix: Tensor, k: int, dtype: torch.dtype) -> Svd:
    m, n = matrix.shape
    one = torch.ones((), dtype=dtype, device=matrix.device)
    U, Vh = (torch.eye(*sides).to(one) for sides in ((m, k), (k, n)))
    return Svd(U, one.new_zeros(k), Vh, "zero", 0.0, 0.0)


def _batch(
    matrix: Tensor,
    rank: Rank | None,
    method: Method,
    seed: int,
    dtype: torch.dtype,
    pool: ThreadPool,
) -> Svd:
    experts, m, n = matrix.shape
    if callable(rank):
        rank = rank(singular_values(matrix, pool=pool))
    k = min(m, n) if rank is None else min(rank, m, n)
    U = torch.empty(experts, m, k, dtype=dtype, device=matrix.device)
    Vh = U.new_empty(experts, k, n)
    parts: list[Svd | None] = [None] * experts

    def fill(index: int) -> None:
        part = _one(matrix[index], rank, method, seed, dtype, pool)
        U[index], Vh[index] = part.U, part.Vh
        parts[index] = replace(part, U=U[index], Vh=Vh[index])

    pool.share([partial(fill, i) for i in range(experts)])
    done = [part for part in parts if part is not None]
    wide = torch.float32 if all(part.S.dtype == torch.float32 for part in done) else torch.float64
    return Svd(
        U=U,
        S=torch.stack([part.S.to(wide) for part in done]) if done else U.new_empty(0, k),
        Vh=Vh,
        method="+".join(sorted({part.method for part in done})),
        reconstruction_error=max((part.reconstruction_error for part in done), default=0.0),
        orthogonality_error=max((part.orthogonality_error for part in done), default=0.0),
        energy=min((part.energy for part in done), default=1.0),
        values_error=max((part.values_error for part in done), default=0.0),
    )


def _lapack64(A: Tall, choose: Choose, pool: ThreadPool) -> Thin:
    try:
        U, S, Vh = torch.linalg.svd(A.double(slice(None)).cpu(), full_matrices=False)
    except LinAlgError as exc:
        raise NotConverged(str(exc)) from exc
    squares, k = float(S.square().sum()), choose(S)
    U, S, Vh = (factor.to(A.matrix.device) for factor in (U[:, :k], S[:k], Vh[:k]))
    return Thin(U.clone(), S.clone(), Vh.clone(), squares)


_RUNGS: tuple[_Rung, ...] = (
    ("gram", gram_factors),
    ("gram64", partial(gram_factors, single=math.inf)),
    ("lapack64", _lapack64),
)
