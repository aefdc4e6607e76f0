"""Measures of how good factors are, cheap enough to be taken of every result.

Both use a few random probe vectors instead of forming ``W - U diag(S) Vh`` or ``U'U - I``: a
product with p probes costs O(p) per entry where the full matrices would cost as much as the
decomposition itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

PROBES = 8
_SEED = 0x5BD


def probes(rows: int, *, like: Tensor) -> Tensor:
    """Return the (rows, PROBES) matrix of standard normal numbers that all checks share."""
    generator = torch.Generator().manual_seed(_SEED)
    drawn = torch.randn(rows, PROBES, generator=generator, dtype=torch.float32)
    return drawn.to(device=like.device, dtype=like.dtype)


def orthogonality_error(basis: Tensor) -> float:
    """Bound the largest entry of ``|basis' basis - I|``.

    With standard normal probes Z each row of ``(basis' basis - I) Z`` has the row's 2-norm as its
    standard deviation, and no entry is larger than its row's norm.

    Parameters
    ----------
    basis : (m, k) Tensor
        Columns that should be orthonormal.

    Returns
    -------
    float
        An estimate of the largest row norm, so in all likelihood not below the largest entry.
    """
    if basis.shape[1] == 0:
        return 0.0
    z = probes(basis.shape[1], like=basis)
    defect = basis.mT @ (basis @ z) - z
    return float(defect.double().square().mean(dim=1).max().sqrt())


def reconstruction_error(W: Tensor, U: Tensor, S: Tensor, Vh: Tensor) -> float:
    """Estimate ``||W - U diag(S) Vh||_F / ||W||_F``.

    Parameters
    ----------
    W : (m, n) Tensor
    U : (m, k) Tensor
    S : (k,) Tensor
    Vh : (k, n) Tensor

    Returns
    -------
    float
        0 for W = 0. The standard deviation is a quarter of the value at most (where the error
        has rank 8 or more; rounding errors have full rank).
    """
    norm = float(torch.linalg.vector_norm(W, dtype=torch.float64))
    if norm == 0.0:
        return 0.0
    z = probes(W.shape[1], like=W)
    left = W @ z - U.to(W.dtype) @ (S.to(W.dtype).unsqueeze(1) * (Vh.to(W.dtype) @ z))
    return float(left.double().square().sum().div(PROBES).sqrt()) / norm
