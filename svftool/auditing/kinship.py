"""Whether two networks come from one another: tests whose p-values are known for strangers.

The units of a hidden layer have no order of their own. A network trained on its own could as well
have had them in any other order, so how much its units agree with those of a stranger is one draw
of what all orders give. That holds whatever both have learned, and needs nothing but the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

FEWEST = 8
"""Units that an axis must have to be tested."""

_UNITS = 256
_ENTRIES = 1024


def unit_axes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Choose the axis of each weight whose entries are units of a hidden layer.

    Inputs and classes have an order that all networks of a task share; units have none. An axis is
    of units where another weight meets it: as many outputs as another has inputs, or the reverse.

    Parameters
    ----------
    shapes : mapping of str to tuple of int
        In file order.

    Returns
    -------
    dict of str to int
        0 for outputs, 1 for inputs; a weight that has neither is not there.
    """
    weights = {name: shape for name, shape in shapes.items() if len(shape) >= 2}
    outs = [shape[0] for shape in weights.values()]
    ins = [shape[1] for shape in weights.values()]
    found = {}
    for index, (name, (m, n, *_)) in enumerate(weights.items()):
        outputs = m >= FEWEST and ins.count(m) > (n == m)
        inputs = n >= FEWEST and outs.count(n) > (n == m)
        if outputs and (index == 0 or not inputs):
            found[name] = 0
        elif inputs:
            found[name] = 1
    return found


def agreement(base: Tensor, tuned: Tensor, axis: int) -> Tensor | None:
    """Return how every unit of one agrees with every unit of the other, centred both ways.

    Parameters
    ----------
    base, tuned : Tensor
        Of one shape, with two axes or more.
    axis : int
        0 or 1, of the units.

    Returns
    -------
    (u, u) Tensor or None
        Of norm 1; None where nothing can be told.
    """
    rows, places = _places(base, axis)
    sides = [_units(side, axis, rows, places) for side in (base, tuned)]
    C = sides[0] @ sides[1].mT
    C = C - C.mean(dim=0, keepdim=True) - C.mean(dim=1, keepdim=True) + C.mean()
    norm = float(C.norm())
    return C / norm if math.isfinite(norm) and norm > 1e-6 else None


def _places(like: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Choose which units and which of their entries are looked at, evenly over all."""
    units = like.shape[axis]
    entries = like.numel() // units
    return (
        torch.linspace(0, units - 1, min(units, _UNITS)).round().long(),
        torch.linspace(0, entries - 1, min(entries, _ENTRIES)).round().long(),
    )


def _units(side: Tensor, axis: int, rows: Tensor, places: Tensor) -> Tensor:
    flat = side.transpose(0, axis).reshape(side.shape[axis], -1)
    some = flat[rows][:, places].double()
    some = some - some.mean(dim=0, keepdim=True)
    return torch.nn.functional.normalize(some, dim=1)


def score(agreements: Sequence[Tensor]) -> float:
    """Return how far the units of two networks agree beyond what another order of them would give.

    Parameters
    ----------
    agreements : sequence of Tensor
        Of all layers, as `agreement` gives them.

    Returns
    -------
    float
        About standard normal for strangers.

    Notes
    -----
    Over all orders, the trace of a centred matrix C has mean 0 and variance
    ``||C||^2 / (u - 1)`` (Hoeffding 1951). Layers with as many units may share their order, so they
    are added up before.
    """
    groups: dict[int, list[Tensor]] = {}
    for one in agreements:
        groups.setdefault(len(one), []).append(one)
    total = weights = 0.0
    for units, members in groups.items():
        whole = torch.stack(members).sum(dim=0)
        norm = float(whole.norm())
        if norm > 0.0:
            weight = math.sqrt(units * len(members))
            total += weight * float(whole.trace()) * math.sqrt(units - 1) / norm
            weights += weight * weight
    return total / math.sqrt(weights) if weights else 0.0


def upper_tail(z: float) -> float:
    """Return the probability that a standard normal number is larger."""
    return 0.5 * math.erfc(z / math.sqrt(2.0))


# Spectra, which no order of rows or columns changes.


def spectral_kinship(base: Tensor, tuned: Tensor) -> float:
    """Bound how likely two spectra lie so near to each other by chance, as a logarithm.

    Parameters
    ----------
    base, tuned : (k,) Tensor
        Singular values, non-increasing, of two matrices of one shape.

    Returns
    -------
    float
        Natural logarithm of a probability, at most 0.

    Notes
    -----
    The values of strangers differ by about the distance of neighbours. That half of them differ by
    less than a part r of it has, for values that repel each other, a probability below
    ``(4 r)^(k/4)``.
    """
    kept = base > 1e-4 * base.max()
    a, b = base[kept], tuned[kept]
    if len(a) < 2 * FEWEST:
        return 0.0
    gaps = (a[:-4] - a[4:]) / 4.0
    apart = (a[2:-2] - b[2:-2]).abs()
    told = gaps > 1e-5 * a[2:-2]
    if int(told.sum()) < FEWEST:
        return 0.0
    part = float((apart[told] / gaps[told]).median())
    return min(0.0, math.log(max(4.0 * part, 1e-9)) * int(told.sum()) / 4.0)


# What tells the earlier from the later.


@dataclass(frozen=True)
class Marks:
    """What a checkpoint shows of its age.

    Attributes
    ----------
    steps : mapping of str to float
        Counters of training steps that it holds, by name.
    zeros : float
        Share of entries that are exactly zero.
    digits : int
        Significant binary digits of its values.
    """

    steps: Mapping[str, float] = field(default_factory=dict)
    zeros: float = 0.0
    digits: int = 0


_PRUNED = 0.05


def earlier(a: Marks, b: Marks) -> tuple[int, str]:
    """Tell which of two relatives came first.

    Parameters
    ----------
    a, b : Marks

    Returns
    -------
    order : int
        -1 where the first did, 1 where the second did, 0 where it cannot be told.
    why : str
    """
    # What only one of them holds was added, and counts from zero.
    ahead = sum(b.steps[name] - count for name, count in a.steps.items() if name in b.steps)
    if ahead:
        return (-1 if ahead > 0 else 1), "counters of training steps"
    if abs(a.zeros - b.zeros) > _PRUNED:
        return (-1 if a.zeros < b.zeros else 1), "zeros where the other has values"
    if a.digits != b.digits:
        return (-1 if a.digits > b.digits else 1), "values rounded to fewer digits"
    return 0, ""
