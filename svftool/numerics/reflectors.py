"""Products of Householder reflectors as one large product, ``H1 H2 ... = I - Y T Y'``."""

from __future__ import annotations

import torch
from torch import Tensor


def block_reflector(rows: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """Gather reflectors ``I - tau v v'`` into one block.

    ``T^-1 = diag(1 / tau) + strictly upper (Y' Y)`` (Puglisi, SIAM J. Sci. Stat. Comput. 13, 1992);
    a reflector with tau = 0 is the identity.

    Parameters
    ----------
    rows : (b, r) Tensor
        Each reflector's vector, of which the first i entries are taken as 0 and the next as 1 in
        row i.
    tau : (b,) Tensor

    Returns
    -------
    Y' : (b, r) Tensor
    T' : (b, b) Tensor
        Lower triangular.
    """
    Y = rows.triu()
    Y.diagonal().fill_(1.0)
    idle = tau == 0
    Y[idle] = 0.0
    inverse = (Y @ Y.mT).triu(1)
    inverse.diagonal().copy_(torch.where(idle, 1.0, tau).reciprocal())
    eye = torch.eye(len(tau), dtype=Y.dtype)
    return Y, torch.linalg.solve_triangular(inverse, eye, upper=True).mT
