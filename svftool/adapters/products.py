"""Changes that are no product of two matrices: LoHa, LoKr, DoRA, convolutions through a core.

Formulas as LyCORIS (2309.14859) and DoRA (2402.09353) define them; all in float64.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def multiplied_out(kind: str, parts: Mapping[str, Tensor]) -> Tensor:
    """Multiply the tensors of a layer out, before they are scaled."""
    if kind == "diff":
        return parts["diff"].double()
    if kind == "loha":
        sides = [
            tuple(
                parts[one] for one in (f"hada_w{n}_a", f"hada_w{n}_b", f"hada_t{n}") if one in parts
            )
            for n in "12"
        ]
        return hadamard(sides[0], sides[1])
    if kind == "lokr":
        one, two = (
            factor(
                tuple(
                    parts[name]
                    for name in (f"lokr_w{n}", f"lokr_w{n}_a", f"lokr_w{n}_b", f"lokr_t{n}")
                    if name in parts
                )
            )
            for n in "12"
        )
        return kronecker(one, two)
    up, down = parts["up"].double(), parts["down"].double()
    if "mid" in parts:
        down = through_core(parts["mid"], down)
    if set(up.shape[2:]) - {1} or up.shape[1] != down.shape[0] or down.ndim < 2:
        raise ValueError("no product of two matrices")
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def through_core(core: Tensor, down: Tensor) -> Tensor:
    """Return the lower matrix of a convolution whose window lies in a core of its own.

    Parameters
    ----------
    core : (r, r, ...) Tensor
    down : (r, in, 1, ...) Tensor

    Returns
    -------
    (r, in, ...) Tensor
    """
    return torch.einsum("ij...,jc->ic...", core.double(), down.double().flatten(1))


def hadamard(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> Tensor:
    """Multiply two products entry by entry (LoHa).

    Parameters
    ----------
    first, second : (a, b) or (a, b, core)
        ``a`` is (m, r) and ``b`` (r, n); with a core (r, r, ...), ``a`` is (r, m).
    """
    return _product(*first) * _product(*second)


def _product(a: Tensor, b: Tensor, core: Tensor | None = None) -> Tensor:
    if core is None:
        return a.double() @ b.double()
    return torch.einsum("ij...,jr,ip->pr...", core.double(), b.double(), a.double())


def factor(parts: tuple[Tensor, ...]) -> Tensor:
    """Return one side of a Kronecker product: stored whole, or as ``a b`` with or without core."""
    if len(parts) == 1:
        return parts[0].double()
    a, b = parts[0], parts[1]
    if len(parts) == 2:
        return (a.double() @ b.double().flatten(1)).reshape(a.shape[0], *b.shape[1:])
    return _product(a, b, parts[2])


def kronecker(one: Tensor, two: Tensor) -> Tensor:
    """Return the Kronecker product over outputs and inputs (LoKr); `two` may be a convolution."""
    shape = one.shape + (1,) * (two.ndim - one.ndim)
    return torch.kron(one.reshape(shape), two)


def rescaled(weight: Tensor, change: Tensor, magnitude: Tensor) -> Tensor:
    """Return the change that DoRA makes of one: each vector gets the norm trained for it.

    Parameters
    ----------
    weight, change : (m, n, ...) Tensor
    magnitude : Tensor
        (m,) or (m, 1, ...) for outputs, (1, n, ...) for inputs.
    """
    moved = weight.double() + change
    axis = 1 if magnitude.ndim > 1 and magnitude.shape[0] == 1 and weight.shape[0] != 1 else 0
    others = [one for one in range(weight.ndim) if one != axis]
    norms = torch.linalg.vector_norm(moved, dim=others, keepdim=True)
    scaled = moved * (magnitude.double().reshape(norms.shape) / norms)
    return torch.sub(scaled, weight.double())
