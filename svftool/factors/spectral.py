"""How a layer changes in its singular basis: values, entries, scales and a low-rank remainder.

``W' = W + diag(row) U M Vh diag(col) - U diag(S_base) Vh + B A``, where ``M`` has the singular
values on its diagonal. Singular values alone are Singular Value Fine-tuning (2206.06122), further
entries of M are SVFT (2405.19597) and, over the largest values, LoRA-XS (2405.17604); a remainder
beside the values is SALT (2503.16055).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

PARTS = ("row", "col", "index", "value", "B", "A")
"""What a tuned file may hold of a layer beside ``NAME.S``, as ``NAME.row`` and so on."""


@dataclass(frozen=True)
class EntryBlock:
    """The rows and columns of M in which entries lie, and where in that block each of them is.

    Attributes
    ----------
    rows, columns : (a,), (b,) Tensor
        Which of the k.
    place : (q,) Tensor
        Of each entry, flat in the (a, b) block.
    """

    rows: Tensor
    columns: Tensor
    place: Tensor

    @classmethod
    def of(cls, index: Tensor, k: int) -> EntryBlock:
        """Find the block of flat indices ``i k + j``."""
        rows, i = torch.unique(index // k, return_inverse=True)
        columns, j = torch.unique(index % k, return_inverse=True)
        return cls(rows, columns, i * len(columns) + j)

    def filled(self, value: Tensor) -> Tensor:
        """Return the (a, b) block of entries (q,); those of one place add up."""
        flat = value.new_zeros(len(self.rows) * len(self.columns))
        return flat.scatter_add(0, self.place, value).view(len(self.rows), len(self.columns))


@dataclass(frozen=True)
class SpectralChange:
    """What changes in a layer, or in a stack of matrices.

    Attributes
    ----------
    delta : (..., k) Tensor
        ``S - S_base``.
    row, col : (..., m), (..., n) Tensor or None
        Scales of rows and columns, less 1.
    index, value : (..., q) Tensor or None
        Flat indices ``i k + j`` of entries of M beside the diagonal, and what stands there; values
        of one place add up.
    B, A : (..., m, r), (..., r, n) Tensor or None
        The remainder.
    block : EntryBlock or None
        That of `index`, where it is known already.
    """

    delta: Tensor
    row: Tensor | None = None
    col: Tensor | None = None
    index: Tensor | None = None
    value: Tensor | None = None
    B: Tensor | None = None
    A: Tensor | None = None
    block: EntryBlock | None = None

    @property
    def plain(self) -> bool:
        """Whether singular values are all that there is."""
        return all(getattr(self, name) is None for name in PARTS)

    @property
    def linear(self) -> bool:
        """Whether the weight changes in proportion to the numbers: there are no scales."""
        return self.row is None and self.col is None

    def tensors(self) -> tuple[Tensor, ...]:
        """Return what can be trained, in a fixed order; `with_tensors` puts others in place."""
        found = (self.delta, self.row, self.col, self.value, self.B, self.A)
        return tuple(one for one in found if one is not None)

    def with_tensors(self, tensors: Sequence[Tensor]) -> SpectralChange:
        """Return the same with other numbers, in the order of `tensors`."""
        names = ("delta", "row", "col", "value", "B", "A")
        held = [name for name in names if getattr(self, name) is not None]
        fields: dict[str, Any] = dict(zip(held, tensors, strict=True))
        return replace(self, **fields)

    def to(self, like: Tensor) -> SpectralChange:
        """Return the same in the dtype and on the device of a tensor."""
        found = self.with_tensors([one.to(like) for one in self.tensors()])
        return found if self.index is None else replace(found, index=self.index.to(like.device))

    def moves(self) -> bool:
        """Whether the weight is another one."""
        beside = (self.row, self.col, self.value)
        if bool(self.delta.any()) or any(one is not None and bool(one.any()) for one in beside):
            return True
        return self.B is not None and self.A is not None and bool(self.B.any() and self.A.any())

    def finite(self) -> bool:
        """Whether all numbers are."""
        return all(bool(one.isfinite().all()) for one in self.tensors())

    def one(self, e: int) -> SpectralChange:
        """Return that of one matrix of a stack."""
        found = self.with_tensors([tensor[e] for tensor in self.tensors()])
        return found if self.index is None else replace(found, index=self.index[e])

    def beside(self, k: int) -> Tensor:
        """Return the entries beside the diagonal as a (..., k, k) matrix."""
        assert self.index is not None
        assert self.value is not None
        flat = self.value.new_zeros(*self.value.shape[:-1], k * k)
        return flat.scatter_add(-1, self.index, self.value).reshape(*flat.shape[:-1], k, k)

    def product(self, U: Tensor, S: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
        """Return two thin matrices whose product is the change of the weight.

        ``(R - 1) U M Vh C + U M Vh (C - 1) + U (M - S) Vh + B A`` with ``R = diag(row)`` and
        ``C = diag(col)``: what does not change adds nothing, to the last bit.

        Parameters
        ----------
        U, S, Vh : (..., m, k), (..., k), (..., k, n) Tensor
            Factors of the base; `S` is ``S_base``. All in the dtype of the change.
        """
        moved = self.moved(U)
        left, right = [moved], [Vh]
        if not self.linear:
            whole = U * S.unsqueeze(-2) + moved
            wide = Vh if self.col is None else Vh * (1.0 + self.col).unsqueeze(-2)
            if self.row is not None:
                left, right = [*left, self.row.unsqueeze(-1) * whole], [*right, wide]
            if self.col is not None:
                left, right = [*left, whole], [*right, Vh * self.col.unsqueeze(-2)]
        if self.B is not None and self.A is not None:
            left, right = [*left, self.B], [*right, self.A]
        return torch.cat(left, dim=-1), torch.cat(right, dim=-2)

    def moved(self, U: Tensor) -> Tensor:
        """Return ``U (M - diag(S_base))``, (..., m, k)."""
        moved = U * self.delta.unsqueeze(-2)
        if self.index is None or self.value is None:
            return moved
        if self.index.ndim > 1:
            return moved + U @ self.beside(U.shape[-1])
        block = self.block or EntryBlock.of(self.index, U.shape[-1])
        mixed = U[:, block.rows] @ block.filled(self.value)
        return moved.index_add(1, block.columns, mixed)

    def parts(self) -> dict[str, Tensor]:
        """Return what a tuned file holds beside singular values; scales as what multiplies.

        Parts that change nothing are left out.
        """
        idle = [
            pair
            for pair in (("row",), ("col",), ("value", "index"), ("B", "A"))
            if (one := getattr(self, pair[0])) is None or not bool(one.any())
        ]
        left_out = {name for pair in idle for name in pair}
        found = {name: getattr(self, name) for name in PARTS if name not in left_out}
        return {name: one + 1.0 if name in ("row", "col") else one for name, one in found.items()}

    @classmethod
    def of_parts(cls, delta: Tensor, parts: Mapping[str, Tensor]) -> SpectralChange:
        """Read back what `parts` gave, in float64."""
        found: dict[str, Any] = {
            name: one.long() if name == "index" else one.double() for name, one in parts.items()
        }
        found |= {name: found[name] - 1.0 for name in ("row", "col") if name in found}
        return cls(delta, **found)


Terms = Sequence[tuple[float, SpectralChange]]
"""Changes of one layer with their weights, to be summed."""


def gathered(terms: Terms) -> list[tuple[float, SpectralChange]]:
    """Sum what is in proportion to its numbers to one change; scales keep their own weight.

    One change of weight 1 stays what it is.
    """
    if len(terms) == 1 and (terms[0][0] == 1.0 or not terms[0][1].linear):
        return list(terms)
    linear = [(weight, one) for weight, one in terms if one.linear]
    scaled = [(weight, one) for weight, one in terms if not one.linear]
    return [*([(1.0, _sum(linear))] if linear else []), *scaled]


def _sum(terms: Terms) -> SpectralChange:
    deltas = [weight * one.delta for weight, one in terms]
    found = SpectralChange(sum(deltas, start=torch.zeros(1, dtype=torch.float64)))
    index = [one.index for _, one in terms if one.index is not None]
    value = [weight * one.value for weight, one in terms if one.value is not None]
    B = [weight * one.B for weight, one in terms if one.B is not None]
    A = [one.A for _, one in terms if one.A is not None]
    if index:
        places, sums = _once(torch.cat(index, dim=-1), torch.cat(value, dim=-1))
        found = replace(found, index=places, value=sums)
    if B:
        found = replace(found, B=torch.cat(B, dim=-1), A=torch.cat(A, dim=-2))
    return found


def _once(index: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Add up what stands in one place; in stacks, whose matrices may have other places, not."""
    if index.ndim > 1:
        return index, value
    places, inverse = torch.unique(index, return_inverse=True)
    return places, value.new_zeros(len(places)).index_add(0, inverse, value)
