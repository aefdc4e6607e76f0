"""What a layer trains beside its singular values: entries of M, scales, a low-rank remainder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from svftool.attaching.keeping import KeepsDtype
from svftool.choices.regimes import LayerNumbers, Spectral
from svftool.choices.singular_values import Parametrisation
from svftool.factors import LayerFactors, SpectralChange
from svftool.factors.spectral import EntryBlock

_SLOTS = ("row", "col", "entry", "B", "A", "still")
KINDS = {"S": "singular_values", "entry": "entries", "row": "scales", "col": "scales",
         "B": "remainder", "A": "remainder"}  # fmt: skip
"""The group of parameters that each trained part belongs to."""


@dataclass(frozen=True)
class _Places:
    """Which entries are on the diagonal and at which value, which beside it and at which place."""

    on: Tensor
    rows: Tensor
    off: Tensor
    index: Tensor


class Extras(KeepsDtype):
    """Parts of a layer's change beside its singular values; none at first.

    Attributes
    ----------
    row, col : (..., m), (..., n) Parameter or None
        Scales of rows and columns, less 1.
    entry : (..., q) Parameter or None
        Trained entries of M over `unit`, zero at the base.
    B, A : (..., m, r), (..., r, n) Parameter or None
        The remainder; B is zero at the base.
    still : (..., p) Parameter or None
        Entries beside the diagonal that a tuned file brought and nothing trains.
    """

    exempt = (*_SLOTS, "unit")

    if TYPE_CHECKING:  # torch.jit reads annotations, and knows none of these
        row: nn.Parameter | None
        col: nn.Parameter | None
        entry: nn.Parameter | None
        B: nn.Parameter | None
        A: nn.Parameter | None
        still: nn.Parameter | None
        unit: nn.Parameter | None

    def __init__(self) -> None:
        super().__init__()
        for name in (*_SLOTS, "unit"):
            self.register_parameter(name, None)
        self.trained: frozenset[str] = frozenset()
        self._index = self._still_index = torch.empty(0, dtype=torch.int64)
        self._block: EntryBlock | None = None
        self._found: _Places | None = None

    @property
    def empty(self) -> bool:
        """Whether there are none."""
        return all(self._parameters[name] is None for name in _SLOTS)

    def add(self, parts: Mapping[str, Tensor]) -> None:
        """Take in parts that are trained."""
        for name, value in parts.items():
            self.register_parameter(name, nn.Parameter(value))
        self.trained = self.trained | parts.keys()

    def add_entries(self, index: Tensor, unit: Tensor) -> None:
        """Take in entries at flat places ``i k + j``, the same ones in each matrix of a stack.

        Parameters
        ----------
        index : (q,) Tensor
        unit : (..., q) Tensor
            What a trained number of 1 is as an entry.
        """
        self._index = index
        self.unit = nn.Parameter(unit, requires_grad=False)
        self.add({"entry": torch.zeros_like(unit)})

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return what is trained."""
        return {n: cast(nn.Parameter, self._parameters[n]) for n in _SLOTS if n in self.trained}

    def frozen(self) -> tuple[nn.Parameter, ...]:
        """Return what is not."""
        names = [name for name in (*_SLOTS, "unit") if name not in self.trained]
        return tuple(one for name in names if (one := self._parameters[name]) is not None)

    def moving(self) -> tuple[Tensor, ...]:
        """Return every number that the weight follows."""
        held = (self._parameters[name] for name in _SLOTS)
        return tuple(one.detach() for one in held if one is not None)

    def _places(self, k: int, device: torch.device) -> _Places:
        """Return where the trained entries stand, on a device."""
        if self._found is None or self._found.on.device != device:
            index = self._index.to(device)
            on = index % (k + 1) == 0
            self._found = _Places(
                torch.nonzero(on).flatten(),
                index[on] // k,
                torch.nonzero(~on).flatten(),
                index[~on],
            )
        return self._found

    def diagonal(self, k: int) -> Tensor | None:
        """Return what entries on the diagonal add to the singular values, (..., k)."""
        if self.entry is None or self.unit is None:
            return None
        places = self._places(k, self.entry.device)
        if not len(places.on):
            return None
        value = (self.entry * self.unit.detach())[..., places.on]
        zero = value.new_zeros(*value.shape[:-1], k)
        return zero.index_add(-1, places.rows, value)

    def present(self, delta: Tensor) -> SpectralChange:
        """Return the layer's change with a change of its singular values."""
        if self.empty:
            return SpectralChange(delta)
        k, device = delta.shape[-1], delta.device
        index, value = self._beside(k, device)
        parts = {
            name: one if name in self.trained else one.detach()
            for name in ("row", "col", "B", "A")
            if (one := self._parameters[name]) is not None
        }
        return SpectralChange(delta, **parts, index=index, value=value, block=self.block(k, device))

    def _beside(self, k: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Return places and values of the entries beside the diagonal, trained ones first."""
        index, value = [], []
        if self.entry is not None and self.unit is not None:
            places = self._places(k, device)
            if len(places.off):
                value.append((self.entry * self.unit.detach())[..., places.off])
                index.append(places.index.expand(value[0].shape))
        if self.still is not None:
            value.append(self.still.detach())
            index.append(self._still_index.to(device))
        return (torch.cat(index, dim=-1), torch.cat(value, dim=-1)) if value else (None, None)

    def block(self, k: int, device: torch.device) -> EntryBlock | None:
        """Return where the entries beside the diagonal lie; None for a stack, and without any."""
        if self.entry is None and self.still is None:
            return None
        if self._block is None or self._block.place.device != device:
            with torch.no_grad():
                index, _ = self._beside(k, device)
            if index is None or index.ndim > 1:
                return None
            self._block = EntryBlock.of(index, k)
        return self._block

    @torch.no_grad()
    def set(self, change: SpectralChange, *, like: Tensor) -> None:
        """Set every part, and go back to the base where there is none.

        See `misfit` for what cannot be set.
        """
        if change.plain and self.empty:
            return
        for part, value in (("row", change.row), ("col", change.col)):
            self._put(part, None if value is None else value.to(like))
        self._put_remainder(change, like)
        if self.entry is not None:
            self.entry.zero_()
        self.still = None
        self._block = None
        if change.index is not None and change.value is not None:
            self._set_entries(change.index.to(like.device), change.value.to(like), like.shape[-1])

    def misfit(self, change: SpectralChange) -> str:
        """Say why a change cannot be set here; empty where it can."""
        if change.B is None or "B" not in self.trained or self.B is None:
            return ""
        rank, here = change.B.shape[-1], self.B.shape[-1]
        return f"a remainder of rank {rank}, expected at most {here}" if rank > here else ""

    def _put(self, part: str, value: Tensor | None) -> None:
        mine = self._parameters[part]
        if part in self.trained and mine is not None:
            mine.copy_(value if value is not None else torch.zeros_like(mine))
        else:
            frozen = None if value is None else nn.Parameter(value.clone(), requires_grad=False)
            self.register_parameter(part, frozen)

    def _put_remainder(self, change: SpectralChange, like: Tensor) -> None:
        B, A = (None if one is None else one.to(like) for one in (change.B, change.A))
        if "B" not in self.trained or self.B is None or self.A is None:
            self._put("B", B)
            self._put("A", A)
            return
        self.B.zero_()  # of rank 0 with any A
        if B is not None and A is not None:
            self.B[..., : B.shape[-1]] = B
            self.A[..., : A.shape[-2], :] = A

    def _set_entries(self, index: Tensor, value: Tensor, k: int) -> None:
        """Give each value to the entry that is trained there; keep the others as they are."""
        rest = value
        if self.entry is not None and self.unit is not None and index.ndim == 1:
            mine = self._index.to(index.device)
            order = mine.argsort()
            at = torch.searchsorted(mine[order], index).clamp(max=len(mine) - 1)
            found = order[at]
            hits = (mine[found] == index) & (self.unit[found] != 0)
            self.entry.index_add_(0, found[hits], value[hits] / self.unit[found[hits]])
            index, rest = index[~hits], value[~hits]
        if rest.shape[-1]:
            self.still = nn.Parameter(rest.clone(), requires_grad=False)
            self._still_index = index.clone()


def build_extras(
    name: str,
    factors: LayerFactors,
    spectral: Spectral,
    *,
    parametrisation: Parametrisation,
    seed: int,
    gradient: Tensor | None,
    dtype: torch.dtype,
) -> Extras | None:
    """Make the parts that a regime trains beside singular values; None where there are none.

    Parameters
    ----------
    name : str
        Tensor name; with `seed` it chooses random entries and the start of a remainder.
    factors : LayerFactors
    spectral : Spectral
        What is trained.
    parametrisation : {"scale", "shift", "absolute"}
        With ``scale`` an entry is ``theta sqrt(S_i S_j)``, which on the diagonal is what it is for
        singular values; else it is ``theta``.
    seed : int
    gradient : (..., m, n) Tensor or None
        Of the loss over the support set, where entries are chosen by it.
    dtype : torch.dtype
        Of what is trained.
    """
    if spectral.plain:
        return None
    *stack, m, k = factors.U.shape
    n = factors.Vh.shape[-1]
    numbers = spectral.of(m, n, k)
    extras = Extras()
    if numbers.rows:
        extras.add({"row": torch.zeros(*stack, m, dtype=dtype)})
    if numbers.columns:
        extras.add({"col": torch.zeros(*stack, n, dtype=dtype)})
    if numbers.entries:
        unit = entry_unit(factors.S.to(dtype), parametrisation)
        index = _choose(name, spectral, numbers, unit, factors, seed, gradient)
        extras.add_entries(index, unit.flatten(-2)[..., index].clone())
    if numbers.remainder:
        r = numbers.remainder
        A = torch.rand(*stack, r, n, generator=_generator(name, seed), dtype=torch.float64)
        # As LoRA starts: uniform up to 1 / sqrt(n).
        A = ((2.0 * A - 1.0) / n**0.5).to(dtype)
        extras.add({"B": torch.zeros(*stack, m, r, dtype=dtype), "A": A})
    return extras


def entry_unit(S: Tensor, parametrisation: Parametrisation) -> Tensor:
    """Return what a trained number of 1 is as an entry, for all of M: (..., k, k)."""
    if parametrisation != "scale":
        return torch.ones_like(S).unsqueeze(-1) * torch.ones_like(S).unsqueeze(-2)
    root = S.clamp(min=0.0).sqrt()
    return root.unsqueeze(-1) * root.unsqueeze(-2)


def _choose(
    name: str,
    spectral: Spectral,
    numbers: LayerNumbers,
    unit: Tensor,
    factors: LayerFactors,
    seed: int,
    gradient: Tensor | None,
) -> Tensor:
    """Return the places of a layer's entries, in ascending order."""
    k, count = unit.shape[-1], numbers.entries
    if spectral.core is not None:
        side = torch.arange(numbers.side)
        return (side[:, None] * k + side).flatten()
    if spectral.choice == "random":
        chosen = torch.randperm(k * k, generator=_generator(name, seed))[:count]
    elif spectral.choice == "band":
        chosen = band_places(k, count)
    else:
        chosen = _steepest(factors, unit, gradient, count)
    return chosen.sort().values


def band_places(k: int, count: int | None = None) -> Tensor:
    """Return places of M, those of the nearest diagonals first, from the largest values on.

    Parameters
    ----------
    k : int
        M is (k, k).
    count : int or None
        How many; all of them by default.

    Examples
    --------
    >>> band_places(3, 5).tolist()
    [0, 4, 8, 1, 3]
    """
    count = k * k if count is None else min(count, k * k)
    found, missing = [torch.arange(min(k, count)) * (k + 1)], count - k
    for away in range(1, k):
        if missing <= 0:
            break
        least = torch.arange(k - away)
        both = torch.stack((least * k + least + away, (least + away) * k + least), dim=1)
        found.append(both.flatten()[:missing])
        missing -= both.numel()
    return torch.cat(found)


def largest_places(sizes: Tensor, count: int) -> Tensor:
    """Return the places of M with the largest numbers; of equal ones those that a band takes first.

    Parameters
    ----------
    sizes : (k, k) Tensor
    count : int

    Returns
    -------
    (count,) Tensor
        Flat places, in no order.
    """
    k, flat = len(sizes), sizes.flatten()
    least = flat.topk(count).values[-1]
    above, equal = (torch.nonzero(one).flatten() for one in (flat > least, flat == least))
    missing = count - len(above)
    if missing < len(equal):
        i, j = equal // k, equal % k
        near = (i - j).abs() * k + torch.minimum(i, j)
        equal = equal[near.argsort(stable=True)[:missing]]
    return torch.cat((above, equal))


def _steepest(factors: LayerFactors, unit: Tensor, gradient: Tensor | None, count: int) -> Tensor:
    """Return the places of M with the largest gradients of their trained numbers.

    A layer that the loss does not reach has a band.
    """
    k = unit.shape[-1]
    if gradient is None:
        return band_places(k, count)
    U, Vh = factors.U.float().cpu(), factors.Vh.float().cpu()
    rows = gradient.detach().float().cpu().reshape(*U.shape[:-1], Vh.shape[-1])
    squares = ((U.mT @ rows @ Vh.mT) * unit.float()).square()
    return largest_places(squares.reshape(-1, k, k).sum(0), count)


def _generator(name: str, seed: int) -> torch.Generator:
    key = hashlib.sha256(f"{seed}:{name}".encode(errors="surrogatepass")).digest()[:8]
    return torch.Generator().manual_seed(int.from_bytes(key, "big") >> 1)
