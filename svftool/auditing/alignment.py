"""Whether the leading directions of changes agree across layers.

All weights whose outputs (inputs) have one width are held against each other: in a network with a
residual stream these share a space.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from svftool.auditing.directional import ChangedMatrix, SharedSpace, Side
from svftool.numerics.chance import holm, log_aligned, log_product

_KEPT = 8


def align(places: Sequence[ChangedMatrix]) -> tuple[SharedSpace, ...]:
    """Hold the leading directions of all changes of one width against each other.

    Parameters
    ----------
    places : sequence of ChangedMatrix
        In the order of the checkpoint; what is not above its rounding noise is passed over.

    Returns
    -------
    tuple of SharedSpace
        Those with two matrices or more.

    Notes
    -----
    The null: each matrix has a direction of its own, uniform on the sphere of ``R^d``. In the order
    of the file, each direction is held against the leading one of all before it. For a uniform
    direction that squared cosine is Beta(1/2, (d - 1)/2) distributed whatever came before, so the
    p-values of all steps are independent and uniform, and so is Fisher's combination of them: it is
    exact for any d and number of matrices, with nothing simulated.
    """
    groups: dict[tuple[Side, int], list[Tensor]] = {}
    sides: tuple[Side, Side] = ("output", "input")
    for place in places:
        for side in sides if place.leading.above else ():
            direction = place.directions(side)[0].double()
            groups.setdefault((side, len(direction)), []).append(direction)
    found = [
        _space(side, width, torch.stack(directions))
        for (side, width), directions in groups.items()
        if len(directions) > 1 and width > 1
    ]
    adjusted = holm([one.log_p for one in found])
    known = (replace(one, log_adjusted=p) for one, p in zip(found, adjusted, strict=True))
    return tuple(sorted(known, key=lambda one: one.log_p))


def _space(side: Side, width: int, directions: Tensor) -> SharedSpace:
    leading, square = nearest_direction(directions)
    n = len(directions)
    return SharedSpace(
        side,
        width,
        n,
        leading,
        alignment=square / n,
        by_chance=min(1.0, (1.0 + math.sqrt(n / width)) ** 2 / n),
        log_p=log_agreement(directions),
    )


def nearest_direction(directions: Tensor) -> tuple[Tensor, float]:
    """Return the unit vector nearest to unit rows up to their signs, and its sum of squares."""
    if len(directions) <= directions.shape[1]:
        values, vectors = torch.linalg.eigh(directions @ directions.mT)
        vector = vectors[:, -1] @ directions / values[-1].sqrt()
    else:
        values, vectors = torch.linalg.eigh(directions.mT @ directions)
        vector = vectors[:, -1]
    vector = vector * (1.0 if float(vector.sum()) >= 0.0 else -1.0)
    return vector, float(values[-1])


def log_agreement(directions: Tensor) -> float:
    """Return the chance that random directions agree so well, as `align` tests it.

    Parameters
    ----------
    directions : (N, d) Tensor
        Unit rows, float64, N of two or more.

    Returns
    -------
    float
        Natural logarithm of a p-value.
    """
    n, d = directions.shape
    held, total = directions[:1], 0.0
    for direction in directions[1:]:
        total += log_aligned(float(held[0] @ direction) ** 2 / float(held[0] @ held[0]), d)
        # The leading few directions of what was seen, each times its singular value.
        seen = torch.cat((held, direction[None]))
        vectors = torch.linalg.eigh(seen @ seen.mT).eigenvectors
        held = (vectors.mT @ seen).flip(0)[:_KEPT]
    return log_product(total, n - 1)
