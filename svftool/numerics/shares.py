"""How a change of a weight divides over the base's singular basis.

For ``D = W' - W`` and the factors of W, ``N = U' D V``. What lies on the diagonal of N is a change
of singular values; what lies off it turns singular vectors within the base's subspaces; what N
does not hold lies outside them. The three shares of ``||D||_F^2`` sum to one.

Where singular values repeat, the basis is arbitrary: any rotation of the repeated vectors is as
good a basis. Such groups are taken as blocks, and a block's part of the diagonal is the most that
any choice of its basis could put there: the symmetric part of N's block (its eigenbasis puts all
of that on the diagonal), or the whole block where the singular values are zero, because there the
left and the right vectors may turn apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

NEAR_EQUAL = 1e-5
"""Gap relative to the largest singular value below which two values count as equal.

Factors in float32 are accurate to about 2e-7 of the largest singular value, so vectors whose values
are this close are turned against another decomposition's by up to 0.02 radians.
"""


@dataclass(frozen=True)
class Shares:
    """Shares of ``||D||_F^2``; they sum to one.

    Attributes
    ----------
    svf : float
        On the diagonal: what a change of singular values alone can make.
    off_diagonal : float
        Inside the base's subspaces, off the diagonal.
    out_of_span : float
        Outside the base's subspaces; 0 for a square matrix of full rank.
    """

    svf: float
    off_diagonal: float
    out_of_span: float


def change_shares(
    U: Tensor, S: Tensor, Vh: Tensor, D: Tensor, *, near_equal: float = NEAR_EQUAL
) -> Shares | None:
    """Divide a change over full factors of the base.

    Parameters
    ----------
    U : (m, k) Tensor
        Left singular vectors of the base, ``k = min(m, n)``.
    S : (k,) Tensor
        Singular values, non-increasing.
    Vh : (k, n) Tensor
        Right singular vectors.
    D : (m, n) Tensor
        The change.
    near_equal : float
        Gap, relative to ``S[0]``, below which singular values count as one group.

    Returns
    -------
    Shares or None
        None where D is zero. Computed in float64.

    Examples
    --------
    >>> eye = torch.eye(3, dtype=torch.float64)
    >>> S = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    >>> change_shares(eye, S, eye, torch.diag(S))
    Shares(svf=1.0, off_diagonal=0.0, out_of_span=0.0)
    """
    if U.shape[0] < Vh.shape[1]:
        return change_shares(Vh.mT, S, U.mT, D.mT, near_equal=near_equal)
    D, U, V = D.double(), U.double(), Vh.double().mT
    total = float(D.square().sum())
    if total == 0.0:
        return None
    S = S.double()
    r = count_regular(S, near_equal)
    N = U.mT @ D @ V
    rest = (D @ V).square().sum(dim=0) - N[:r].square().sum(dim=0)
    return divide(
        N.diagonal()[:r],
        [N[a:b, a:b] for a, b in groups(S[:r], near_equal) if b - a > 1],
        inside=float(N[:r].square().sum()),
        outside=float(rest[:r].sum()),
        null=float(rest[r:].sum()),
        square=U.shape[0] == V.shape[0],
    )


def count_regular(S: Tensor, near_equal: float = NEAR_EQUAL) -> int:
    """Count the singular values that are clearly not zero.

    Parameters
    ----------
    S : (k,) Tensor
        Non-increasing.
    near_equal : float
        Values up to this, relative to ``S[0]``, and all in the same group as one of them count as
        zero.
    """
    if S.numel() == 0 or float(S[0]) == 0.0:
        return 0
    bounds = groups(S, near_equal)
    while bounds and float(S[bounds[-1][1] - 1]) <= near_equal * float(S[0]):
        bounds.pop()
    return bounds[-1][1] if bounds else 0


def groups(S: Tensor, near_equal: float = NEAR_EQUAL) -> list[tuple[int, int]]:
    """Split a spectrum where neighbours differ by more than ``near_equal * S[0]``.

    Parameters
    ----------
    S : (k,) Tensor
        Non-increasing.
    near_equal : float
        Relative to ``S[0]``.

    Returns
    -------
    list of (int, int)
        First index and the one past the last, covering ``range(k)``.

    Examples
    --------
    >>> groups(torch.tensor([2.0, 1.0, 1.0, 0.5]))
    [(0, 1), (1, 3), (3, 4)]
    """
    if S.numel() == 0:
        return []
    cuts = torch.nonzero(S[:-1] - S[1:] > near_equal * S[0]).flatten() + 1
    edges = [0, *cuts.tolist(), S.numel()]
    return list(pairwise(edges))


def divide(
    diagonal: Tensor,
    blocks: Iterable[Tensor],
    *,
    inside: float,
    outside: float,
    null: float,
    square: bool,
) -> Shares:
    """Divide a change whose parts in the base's basis are known, the long side on the left.

    Parameters
    ----------
    diagonal : (r,) Tensor
        Diagonal of ``U' D V``, over the r singular values that are not zero.
    blocks : iterable of (b, b) Tensor
        Its diagonal blocks over groups of more than one value, see `groups`.
    inside : float
        Sum of squares of the first r rows of ``U' D V``.
    outside : float
        What the first r columns of ``D V`` hold beyond them.
    null : float
        What the other columns of ``D V`` hold beyond them.
    square : bool
        Whether the matrix is square, so that nothing lies outside the left vectors.

    Returns
    -------
    Shares
    """
    inside, outside, null = max(inside, 0.0), max(outside, 0.0), max(null, 0.0)
    total = inside + outside + null
    spectral = float(diagonal.square().sum()) + null
    for block in blocks:
        even = (block + block.mT) / 2
        spectral += float(even.square().sum() - block.diagonal().square().sum())
    svf = min(spectral / total, 1.0)
    out = 0.0 if square else min(outside / total, 1.0 - svf)
    return Shares(svf, max(1.0 - svf - out, 0.0), out)
