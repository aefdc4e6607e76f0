"""The checked singular value decomposition of one matrix or a batch."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from svftool.errors import NumericalError
from svftool.numerics.checks import orthogonality_error, reconstruction_error
from svftool.numerics.results import Svd, fix_signs, truncate

Method = Literal["auto", "exact", "randomized"]

RECONSTRUCTION_BOUND = 1e-6
ORTHOGONALITY_BOUND = 1e-5


def singular_values(matrix: Tensor) -> Tensor:
    """Compute singular values alone, to 1e-6 of the largest or better.

    Parameters
    ----------
    matrix : (m, n) or (E, m, n) Tensor
        Any floating dtype.

    Returns
    -------
    (k,) or (E, k) Tensor
        float64, non-increasing, ``k = min(m, n)``.

    Raises
    ------
    NumericalError
        If the matrix holds NaN or infinity.
    """
    if matrix.ndim == 3:
        rows = [singular_values(one) for one in matrix]
        return torch.stack(rows) if rows else matrix.new_zeros(0, min(matrix.shape[1:])).double()
    W, exponent = _scaled(matrix)
    gram = W.double()
    gram = gram @ gram.mT if W.shape[0] <= W.shape[1] else gram.mT @ gram
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(0).ldexp(torch.tensor(exponent))


def svd(
    matrix: Tensor,
    *,
    rank: int | None = None,
    method: Method = "auto",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Svd:
    """Decompose a matrix, checking every factor that is handed out.

    Parameters
    ----------
    matrix : (m, n) or (E, m, n) Tensor
        Any floating dtype; not changed. A batch is E matrices.
    rank : int, optional
        Number of singular values to keep; all of them by default.
    method : {"auto", "exact", "randomized"}
        How a truncated decomposition may be found.
    seed : int
        Of the randomized method.
    dtype : torch.dtype
        float32 or float64, of the factors.

    Returns
    -------
    Svd

    Raises
    ------
    NumericalError
        If the matrix holds NaN or infinity.
    """
    start = time.perf_counter()
    if matrix.ndim == 3:
        result = _stack(
            [svd(one, rank=rank, method=method, seed=seed, dtype=dtype) for one in matrix], matrix
        )
    else:
        result = truncate(_exact(matrix, dtype), rank or min(matrix.shape))
    return replace(result, seconds=time.perf_counter() - start)


def _scaled(matrix: Tensor) -> tuple[Tensor, int]:
    """Upcast and divide by the power of two that brings the largest entry into [0.5, 1)."""
    if matrix.ndim != 2:
        raise ValueError(
            f"matrix has shape {tuple(matrix.shape)}, expected two or three dimensions"
        )
    W = matrix.detach()
    W = W if W.dtype == torch.float64 else W.float()
    top = float(W.abs().max()) if W.numel() else 0.0
    if not math.isfinite(top):
        bad = int(W.numel() - W.isfinite().sum())
        raise NumericalError(
            f"{bad} of {W.numel()} entries are NaN or infinite, expected finite weights"
        )
    exponent = math.frexp(top)[1]
    return torch.ldexp(W, torch.tensor(-exponent)) if exponent else W, exponent


def _exact(matrix: Tensor, dtype: torch.dtype) -> Svd:
    W, exponent = _scaled(matrix)
    if min(W.shape) == 0 or not W.any():
        return _zero(W, dtype)
    for name, kernel in (("gram", _gram), ("lapack", _lapack)):
        if name == "gram" and dtype == torch.float64:
            continue
        U, S, Vh = kernel(W)
        U, Vh = fix_signs(U.to(dtype), Vh.to(dtype))
        wide = W.double()
        rec = reconstruction_error(wide, U, S, Vh)
        orth = max(orthogonality_error(U.double()), orthogonality_error(Vh.double().mT))
        if rec <= RECONSTRUCTION_BOUND and orth <= ORTHOGONALITY_BOUND:
            break
    else:
        raise NumericalError(f"reconstruction error {rec:.1e}, orthogonality {orth:.1e}")
    S = S.ldexp(torch.tensor(exponent))
    fits = torch.finfo(torch.float32)
    small = dtype == torch.float32 and fits.tiny * 1e7 < float(S[0]) < fits.max
    return Svd(U, S.float() if small else S, Vh, name, rec, orth)


def _zero(W: Tensor, dtype: torch.dtype) -> Svd:
    m, n = W.shape
    k = min(m, n)
    return Svd(
        torch.eye(m, k, dtype=dtype),
        torch.zeros(k, dtype=dtype),
        torch.eye(k, n, dtype=dtype),
        "zero",
        0.0,
        0.0,
    )


def _gram(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if W.shape[0] < W.shape[1]:
        U, S, Vh = _gram(W.mT)
        return Vh.mT, S, U.mT
    wide = W.double()
    _, V = torch.linalg.eigh(wide.mT @ wide)
    V = V.flip(1)
    B = wide @ V
    S = torch.linalg.vector_norm(B, dim=0)
    order = S.argsort(descending=True, stable=True)
    return (B / S.clamp_min(1e-300))[:, order], S[order], V[:, order].mT


def _lapack(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(W.double(), full_matrices=False)


def _stack(results: list[Svd], batch: Tensor) -> Svd:
    if not results:
        raise ValueError(f"batch has shape {tuple(batch.shape)}, expected at least one matrix")
    return Svd(
        U=torch.stack([r.U for r in results]),
        S=torch.stack([r.S for r in results]),
        Vh=torch.stack([r.Vh for r in results]),
        method="+".join(sorted({r.method for r in results})),
        reconstruction_error=max(r.reconstruction_error for r in results),
        orthogonality_error=max(r.orthogonality_error for r in results),
        energy=min(r.energy for r in results),
    )
