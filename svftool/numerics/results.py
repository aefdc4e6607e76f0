"""What a singular value decomposition hands out, and the small operations on its factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Svd:
    """Checked factors of a matrix ``W ~ U diag(S) Vh``, or of a batch of E matrices.

    Attributes
    ----------
    U : (m, k) Tensor
        Left singular vectors, orthonormal columns; (E, m, k) for a batch.
    S : (k,) Tensor
        Singular values, non-increasing; (E, k) for a batch.
    Vh : (k, n) Tensor
        Right singular vectors, orthonormal rows; (E, k, n) for a batch.
    method : str
        The rung of the ladder that gave the factors; several joined by ``+`` for a batch.
    reconstruction_error : float
        ``||W - U diag(S) Vh||_F / ||W||_F``, what truncation cuts off included; 0 for W = 0.
    orthogonality_error : float
        Upper estimate of the largest entry of ``|U'U - I|`` and ``|Vh Vh' - I|``.
    energy : float
        Share of the sum of squares of W that the k singular values keep.
    values_error : float
        Estimated error of S over S[0] where an iteration found it; 0 where the method is exact.
    seconds : float
        Time that the decomposition took.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    method: str
    reconstruction_error: float
    orthogonality_error: float
    energy: float = 1.0
    values_error: float = 0.0
    seconds: float = 0.0

    @property
    def rank(self) -> int:
        """Number of singular values kept."""
        return self.S.shape[-1]


def fix_signs(U: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """Make the largest entry of each left singular vector positive.

    Parameters
    ----------
    U : (..., m, k) Tensor
        Left singular vectors.
    Vh : (..., k, n) Tensor
        Right singular vectors.

    Returns
    -------
    U, Vh : Tensor
        New tensors with the same product ``U diag(S) Vh`` for every S.

    Examples
    --------
    >>> U, Vh = fix_signs(-torch.eye(2), torch.eye(2))
    >>> (U + 0.0).tolist(), (Vh + 0.0).tolist()
    ([[1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [0.0, -1.0]])
    """
    if U.numel() == 0:
        return U, Vh
    flips = signs(U)
    return U * flips.unsqueeze(-2), Vh * flips.unsqueeze(-1).to(Vh.dtype)


def signs(U: Tensor) -> Tensor:
    """Return -1 for each column whose largest entry is negative, else 1."""
    return torch.where(U.amax(-2) < -U.amin(-2), -1.0, 1.0).to(U.dtype)


def reconstruct(U: Tensor, S: Tensor, Vh: Tensor) -> Tensor:
    """Multiply the factors: ``U diag(S) Vh``.

    Parameters
    ----------
    U : (..., m, k) Tensor
    S : (..., k) Tensor
    Vh : (..., k, n) Tensor

    Returns
    -------
    (..., m, n) Tensor
        In the widest dtype of the three.

    Examples
    --------
    >>> reconstruct(torch.eye(2), torch.tensor([2.0, 1.0]), torch.eye(2)).tolist()
    [[2.0, 0.0], [0.0, 1.0]]
    """
    dtype = torch.promote_types(torch.promote_types(U.dtype, S.dtype), Vh.dtype)
    return (U.to(dtype) * S.to(dtype).unsqueeze(-2)) @ Vh.to(dtype)
