"""Methods in the singular basis: one matrix at a time.

Every function takes a stack of changes (T, m, n), finite and none of them zero, each multiplied by
its weight, and makes one change of them. A convolution is the matrix (out, in kh kw), an expert of
a stack a matrix of its own.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from torch import Tensor

from svftool.merging.combined import Combined, Known, Triplets
from svftool.merging.elementwise import ties
from svftool.merging.interference import LEADING
from svftool.merging.spectra import (
    NULL,
    directions,
    nearest_orthogonal,
    product,
    ranked_orthogonal,
)
from svftool.numerics import ThreadPool

ALONE = ThreadPool()
"""No thread but the caller's."""


def tsv(deltas: Tensor, *, pool: ThreadPool = ALONE) -> Combined:
    """Put the leading directions of all changes side by side, and make them orthogonal (TSV-M).

    Of each change the leading ``floor(min(m, n) / T)`` singular triplets are kept. With U and V all
    their left and right vectors, ``D = U_o diag(S) V_o'`` where U_o and V_o are the matrices with
    orthonormal columns nearest to U and V. One change alone stays as it is.

    References
    ----------
    A. A. Gargiulo et al., Task singular vectors: reducing task interference in model merging,
    arXiv 2412.00081, algorithm 1.
    """
    share = max(1, min(deltas.shape[1:]) // len(deltas))
    found = [directions(one, pool, most=share) for one in deltas]
    S = torch.cat([one.S for one in found])
    left, rank = ranked_orthogonal(torch.cat([one.U for one in found], dim=1), pool)
    right, other = ranked_orthogonal(torch.cat([one.Vh for one in found]).mT, pool)
    own = _runs([one.S for one in found])
    wide = left * S
    # What is shown of a contribution needs no more than single precision.
    sides = wide.float(), right.mT.float()
    return Combined(
        product(wide, right.mT, pool),
        lambda index: sides[0][:, own[index]] @ sides[1][own[index]],
        known=_known(found, left, S, right)
        if rank == other == len(S) and share >= LEADING
        else None,
    )


def _known(found: list[Triplets], left: Tensor, S: Tensor, right: Tensor) -> Known:
    """Read singular triplets off ``U_o diag(S) V_o'``, whose sides have orthonormal columns."""
    order = S.argsort(descending=True)[:LEADING]
    parts = [
        Triplets(left[:, own], S[own], right[:, own].mT) for own in _runs([one.S for one in found])
    ]
    return Known(found, parts, Triplets(left[:, order], S[order], right[:, order].mT))


def _runs(values: list[Tensor]) -> list[slice]:
    """Return where the values of each input are, once they are put one after another."""
    ends = list(accumulate((len(one) for one in values), initial=0))
    return [slice(*pair) for pair in pairwise(ends)]


def iso_c(deltas: Tensor, *, pool: ThreadPool = ALONE) -> Combined:
    """Give the sum of the changes one singular value for all directions (Iso-C).

    ``D = mean(S) U V'`` of the sum ``U diag(S) V'``. Where the sum has a lower rank than its sides
    allow, as sums of adapters do, the directions that it does not have stay empty and the mean is
    over those that it has: the sum of singular values stays, and nothing arbitrary is added.

    References
    ----------
    D. Marczak et al., No task left behind: isotropic model merging with common and task-specific
    subspaces, arXiv 2502.04959, algorithm 1.
    """
    total = directions(_sum(deltas), pool)
    if not len(total.S):
        return _nothing(deltas)
    mean = total.S.mean()

    def part(index: int) -> Tensor:
        inner = (mean / total.S)[:, None] * (total.U.mT @ deltas[index].double())
        return total.U @ inner

    return Combined(mean * (total.U @ total.Vh), part)


def iso_cts(deltas: Tensor, *, common: float = 0.8, pool: ThreadPool = ALONE) -> Combined:
    """Keep the common directions of the sum, add some of each input, make all equal (Iso-CTS).

    The leading directions of the sum stay; of what is outside their left space, each change gives
    as many of its own. All together are made orthogonal as in `tsv`, and get the mean of their
    singular values.

    Parameters
    ----------
    deltas : (T, m, n) Tensor
    common : float
        Share of the short side that is for common directions; what is left is rounded to a multiple
        of the number of inputs.
    pool : ThreadPool

    References
    ----------
    As `iso_c`, algorithm 2; 0.8 is the paper's share.
    """
    count, side = len(deltas), min(deltas.shape[1:])
    own = round((side - int(side * common)) / count)
    own = min(own, side // count)
    total = directions(_sum(deltas), pool, most=side - own * count)
    shared = len(total.S)
    found = []
    for one in deltas:
        rest = one.double()
        floor = NULL * float(rest.norm())
        rest = rest - total.U @ (total.U.mT @ rest)
        found.append(directions(rest, pool, most=own, floor=floor))
    left = nearest_orthogonal(torch.cat([total.U, *(one.U for one in found)], dim=1), pool)
    right = nearest_orthogonal(torch.cat([total.Vh, *(one.Vh for one in found)]).mT, pool)
    S = torch.cat([total.S, *(one.S for one in found)])
    if not len(S):
        return _nothing(deltas)
    mean = S.mean()
    own_runs = _runs([total.S, *(one.S for one in found)])[1:]

    def part(index: int) -> Tensor:
        mine = own_runs[index]
        inner = total.U.mT @ deltas[index].double() @ total.Vh.mT
        core = (mean / total.S)[:, None] * inner
        return (
            left[:, :shared] @ core @ right[:, :shared].mT
            + mean * left[:, mine] @ right[:, mine].mT
        )

    return Combined(mean * (left @ right.mT), part)


def knots_ties(deltas: Tensor, *, density: float = 0.2, pool: ThreadPool = ALONE) -> Combined:
    """Apply TIES to the changes as seen in one basis of their outputs (KnOTS).

    With ``[D_1 ... D_T] = U diag(S) [V_1' ... V_T']``, input t is ``diag(S) V_t' = U' D_t``. These
    are merged by `ties`, and U takes the result back: ``D = U ties(U' D_1, ...)``.

    Parameters
    ----------
    deltas : (T, m, n) Tensor
    density : float
        Of `ties`; ranked in one layer, where the paper ranks all layers together.
    pool : ThreadPool

    References
    ----------
    G. Stoica et al., Model merging with SVD to tie the knots, arXiv 2410.19735.
    """
    count, m, n = deltas.shape
    U = directions(deltas.permute(1, 0, 2).reshape(m, count * n), pool).U
    if not U.shape[1]:
        return _nothing(deltas)
    seen = ties(torch.stack([U.mT @ one.double() for one in deltas]), density=density)
    return Combined(U @ seen.delta, lambda index: U @ seen.part(index))


def svc(deltas: Tensor, *, alpha: float | None = None, pool: ThreadPool = ALONE) -> Combined:
    """Set right the singular values of the sum that several changes have counted (SVC).

    With ``sum_t D_t = U diag(S) V'`` and the responses ``a_t = u_r' D_t`` along direction r,
    ``s_t = <S_r v_r, a_t> / |a_t|^2`` says how much of input t the sum holds there; more than 1 is
    counted twice. ``D = U diag(g S) V'`` with ``g_r = T / sum_t max(alpha, s_t)``.

    Parameters
    ----------
    deltas : (T, m, n) Tensor
        A vector may come as a matrix of one row, which is the paper's way with vectors.
    alpha : float, optional
        With 1 singular values only become smaller; ``1 / T`` by default, as in the paper.
    pool : ThreadPool

    References
    ----------
    Y. Li et al., When shared knowledge hurts: spectral over-accumulation in model merging,
    arXiv 2602.05536.
    """
    least = 1.0 / len(deltas) if alpha is None else alpha
    total = directions(_sum(deltas), pool)
    if not len(total.S):
        return _nothing(deltas)
    response = total.S[:, None] * total.Vh
    held = torch.zeros_like(total.S)
    for one in deltas:
        own = total.U.mT @ one.double()
        squares = own.square().sum(dim=1)
        inner = (own * response).sum(dim=1)
        held += torch.where(squares > 0.0, inner / squares, 0.0).clamp_min(least)
    gain = len(deltas) / held

    def part(index: int) -> Tensor:
        return total.U @ (gain[:, None] * (total.U.mT @ deltas[index].double()))

    return Combined(total.U @ (gain[:, None] * response), part)


def _sum(deltas: Tensor) -> Tensor:
    return deltas.sum(dim=0, dtype=torch.float64)


def _nothing(deltas: Tensor) -> Combined:
    """Return no change: the changes cancel each other."""
    zero = torch.zeros_like(deltas[0], dtype=torch.float64)
    return Combined(zero, lambda index: zero)
