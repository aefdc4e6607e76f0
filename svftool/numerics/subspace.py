"""How two subspaces, or two sets of singular vectors, lie to each other."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

INTRUDER_TOP = 10
"""How many singular vectors of the tuned matrix are looked at (arXiv 2410.21228)."""

INTRUDER_BELOW = 0.5
"""Best match in the base below which a singular vector counts as new (arXiv 2410.21228)."""


def principal_angles(A: Tensor, B: Tensor) -> Tensor:
    """Angles between two subspaces, accurate for small and for large ones.

    Cosines lose half the digits of a small angle, sines those of a large one; each angle is taken
    from whichever is below 1/sqrt(2).

    Parameters
    ----------
    A : (n, r) Tensor
        Orthonormal columns.
    B : (n, q) Tensor
        Orthonormal columns.

    Returns
    -------
    (min(r, q),) Tensor
        Radians in [0, pi/2], non-decreasing; float64.

    References
    ----------
    A. Bjorck and G. H. Golub, Numerical methods for computing angles between linear subspaces,
    Mathematics of Computation 27, 1973.

    Examples
    --------
    >>> eye = torch.eye(3, dtype=torch.float64)
    >>> principal_angles(eye[:, :2], eye[:, 1:]).tolist()
    [0.0, 1.5707963267948966]
    """
    if A.shape[1] < B.shape[1]:
        return principal_angles(B, A)
    A, B = A.double(), B.double()
    inner = A.mT @ B
    cosines = torch.linalg.svdvals(inner).clamp(0.0, 1.0)
    sines = torch.linalg.svdvals(B - A @ inner).clamp(0.0, 1.0).flip(0)
    return torch.where(cosines > math.sqrt(0.5), sines.arcsin(), cosines.arccos())


@dataclass(frozen=True)
class SubspaceDistance:
    """Distances of two subspaces of equal dimension, all functions of their principal angles.

    Attributes
    ----------
    largest, mean : float
        Of the principal angles, in radians.
    chordal : float
        ``sqrt(sum sin^2)``.
    grassmann : float
        ``sqrt(sum theta^2)``, the geodesic distance.
    projection : float
        ``||A A' - B B'||_2``, the largest sine.
    """

    largest: float
    mean: float
    chordal: float
    grassmann: float
    projection: float


def subspace_distance(A: Tensor, B: Tensor) -> SubspaceDistance:
    """Measure how far two subspaces of the same dimension are apart.

    Parameters
    ----------
    A, B : (n, r) Tensor
        Orthonormal columns, r >= 1.

    Returns
    -------
    SubspaceDistance
    """
    angles = principal_angles(A, B)
    sines = angles.sin()
    return SubspaceDistance(
        largest=float(angles[-1]),
        mean=float(angles.mean()),
        chordal=float(sines.square().sum().sqrt()),
        grassmann=float(angles.square().sum().sqrt()),
        projection=float(sines[-1]),
    )


def subspace_similarity(A: Tensor, B: Tensor) -> Tensor:
    """Similarity of the leading subspaces of every two dimensions, up to those given.

    Parameters
    ----------
    A : (n, r) Tensor
        Orthonormal columns, most important first.
    B : (n, q) Tensor
        Orthonormal columns, most important first.

    Returns
    -------
    (r, q) Tensor
        Entry (i - 1, j - 1) is ``||A[:, :i]' B[:, :j]||_F^2 / min(i, j)``, in [0, 1]; float64.

    References
    ----------
    E. Hu et al., LoRA, arXiv 2106.09685, section 7.2.

    Examples
    --------
    >>> eye = torch.eye(2, dtype=torch.float64)
    >>> subspace_similarity(eye, eye.flip(1)).tolist()
    [[0.0, 1.0], [1.0, 1.0]]
    """
    held = (A.double().mT @ B.double()).square().cumsum(0).cumsum(1)
    i = torch.arange(1, A.shape[1] + 1, device=held.device).unsqueeze(1)
    j = torch.arange(1, B.shape[1] + 1, device=held.device).unsqueeze(0)
    return held / torch.minimum(i, j)


def best_matches(overlaps: Tensor) -> Tensor:
    """Largest absolute overlap of each tuned vector with any one base vector.

    Parameters
    ----------
    overlaps : (k, t) Tensor
        ``U' u'_j`` for the k base vectors and t tuned ones.

    Returns
    -------
    (t,) Tensor
    """
    return overlaps.abs().amax(dim=0)


def count_intruders(overlaps: Tensor, *, below: float = INTRUDER_BELOW) -> int:
    """Count tuned singular vectors that resemble no single singular vector of the base.

    Parameters
    ----------
    overlaps : (k, t) Tensor
        ``U' u'_j`` for all k base vectors and the leading t tuned ones.
    below : float
        A vector is an intruder when its best match is smaller.

    Returns
    -------
    int

    References
    ----------
    R. Shuttleworth et al., LoRA vs full fine-tuning: an illusion of equivalence, arXiv 2410.21228.

    Notes
    -----
    Where the base's singular values repeat, its vectors are arbitrary and the count means little;
    `captured` does not depend on the choice of basis inside the leading subspace.

    Examples
    --------
    >>> eye = torch.eye(4, dtype=torch.float64)
    >>> count_intruders(eye[:, :2]), count_intruders(torch.full((4, 2), 0.49))
    (0, 2)
    """
    return int((best_matches(overlaps) < below).sum())


def captured(overlaps: Tensor, *, top: int) -> Tensor:
    """Norm of each tuned vector's projection onto the span of the `top` leading base vectors.

    Parameters
    ----------
    overlaps : (k, t) Tensor
        As in `count_intruders`.
    top : int
        Dimension of the base's leading subspace.

    Returns
    -------
    (t,) Tensor
        In [0, 1].
    """
    return overlaps[:top].square().sum(dim=0).sqrt().clamp_max(1.0)
