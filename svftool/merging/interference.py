"""How changes of one tensor get in each other's way."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from svftool.merging.combined import Triplets
from svftool.numerics import ThreadPool, svd
from svftool.numerics.tall import cuts

LEADING = 8
"""Leading directions of a change whose subspaces are compared."""

_SMALL = 96
"""Short side up to which all singular vectors are taken."""

_STEPS = 4

_CHUNK = 1 << 17
"""Entries, of all inputs together, that are looked at at a time: they stay in a core's cache."""


@dataclass(frozen=True)
class Clash:
    """How changes clash, in one tensor or over several.

    Attributes
    ----------
    cosine : float
        Mean over pairs of ``<A, B> / |A| |B|``.
    overlap : float
        Mean over pairs of ``(|U_a'U_b|^2 + |V_a'V_b|^2) / 2r`` of the leading r singular vectors:
        0 for orthogonal subspaces, 1 for one and the same.
    sign_conflicts : float
        Mean over pairs of the share of entries whose signs differ, of those that both change; 0.5
        by chance.
    inflation : float
        Largest singular value of the merged change over the mean of those of the inputs' changes;
        1 where nothing is counted twice.
    inflation_of_largest : float
        The same over the largest of them.
    """

    cosine: float
    overlap: float
    sign_conflicts: float
    inflation: float
    inflation_of_largest: float

    def times(self, share: float) -> Clash:
        """Return what holds of all changes times one number, and of their sum times it."""
        if share == 0.0:
            return Clash(0.0, 0.0, 0.0, 0.0, 0.0)
        return replace(
            self,
            inflation=abs(share) * self.inflation,
            inflation_of_largest=abs(share) * self.inflation_of_largest,
        )


@dataclass(frozen=True)
class PairClash:
    """How two inputs clash; see `Clash`.

    Attributes
    ----------
    a, b : int
        Numbers of the inputs.
    cosine, overlap, sign_conflicts : float
    """

    a: int
    b: int
    cosine: float
    overlap: float
    sign_conflicts: float


@dataclass(frozen=True)
class Inputs:
    """What is known of the changes of one tensor, two or more.

    Attributes
    ----------
    cosine, overlap, sign_conflicts : (T, T) Tensor
        Of every pair; see `Clash`.
    largest : (T,) Tensor
        Largest singular value of each.
    """

    cosine: Tensor
    overlap: Tensor
    sign_conflicts: Tensor
    largest: Tensor

    @classmethod
    def of(
        cls, deltas: Tensor, pool: ThreadPool, known: Sequence[Triplets] | None = None
    ) -> Inputs:
        """Look at a stack of changes (T, m, n), of which the leading triplets may be known."""
        flat = deltas.reshape(len(deltas), -1)
        inner = inner_products(flat)
        norms = inner.diagonal().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
        differ, both = _signs(flat)
        bases = (
            [_leading(one, pool) for one in deltas]
            if known is None
            else [_shown(one.first(LEADING)) for one in known]
        )
        return cls(
            cosine=(inner / norms / norms[:, None]).clamp(-1.0, 1.0),
            overlap=_overlaps([U for U, _, _ in bases], [V for _, _, V in bases]),
            sign_conflicts=torch.where(both > 0, differ / both.clamp_min(1.0), 0.0),
            largest=torch.stack([S[0] if len(S) else S.new_zeros(()) for _, S, _ in bases]),
        )

    def pairs(self, numbers: Sequence[int]) -> list[PairClash]:
        """List how every pair clashes, with the numbers that the inputs have elsewhere."""
        count = len(numbers)
        return [
            PairClash(
                numbers[a],
                numbers[b],
                float(self.cosine[a, b]),
                float(self.overlap[a, b]),
                float(self.sign_conflicts[a, b]),
            )
            for a in range(count)
            for b in range(a + 1, count)
        ]


def clash_of(
    inputs: Inputs,
    merged: Tensor,
    pool: ThreadPool,
    largest: Tensor,
    known: Triplets | None = None,
) -> Clash:
    """Say how changes clash, given what they were merged to.

    Parameters
    ----------
    inputs : Inputs
        The changes, or what each of them contributes.
    merged : (m, n) Tensor
        Their sum.
    pool : ThreadPool
    largest : (T,) Tensor
        Largest singular values of the inputs' own changes.
    known : Triplets, optional
        Leading ones of `merged`.
    """
    _, S, _ = _leading(merged, pool) if known is None else _shown(known)
    top = float(S[0]) if len(S) else 0.0
    mean, most = float(largest.mean()), float(largest.max())
    return Clash(
        cosine=_mean(inputs.cosine),
        overlap=_mean(inputs.overlap),
        sign_conflicts=_mean(inputs.sign_conflicts),
        inflation=top / mean if mean > 0.0 else 0.0,
        inflation_of_largest=top / most if most > 0.0 else 0.0,
    )


def mean_clash(clashes: Sequence[tuple[Clash, float]]) -> Clash:
    """Return the mean, by weights such as the numbers of entries."""
    total = math.fsum(weight for _, weight in clashes)

    def mean(name: str) -> float:
        return math.fsum(getattr(one, name) * weight for one, weight in clashes) / total

    return Clash(*(mean(name) for name in Clash.__dataclass_fields__))


def mean_pairs(found: Iterable[PairClash]) -> tuple[PairClash, ...]:
    """Return one entry a pair: the means of all that are given of it."""
    groups: dict[tuple[int, int], list[PairClash]] = {}
    for one in found:
        groups.setdefault((one.a, one.b), []).append(one)
    return tuple(
        PairClash(
            *pair,
            math.fsum(one.cosine for one in group) / len(group),
            math.fsum(one.overlap for one in group) / len(group),
            math.fsum(one.sign_conflicts for one in group) / len(group),
        )
        for pair, group in sorted(groups.items())
    )


def inner_products(flat: Tensor) -> Tensor:
    """Return the inner products of vectors, summed in float64 part by part.

    Parameters
    ----------
    flat : (T, n) Tensor

    Returns
    -------
    (T, T) Tensor
        float64, on the CPU.
    """
    total = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for part in cuts(flat.shape[1], max(1, _CHUNK // len(flat))):
        wide = flat[:, part].double()
        total += (wide @ wide.mT).cpu()
    return total


def _signs(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Count, of every pair, the entries with different signs and those that both have."""
    count = len(flat)
    differ, both = (torch.zeros(count, count, dtype=torch.float64) for _ in range(2))
    for part in cuts(flat.shape[1], max(1, _CHUNK // len(flat))):
        sign = flat[:, part].sign().float()
        there = sign.abs()
        shared = there @ there.mT  # whole numbers below 2**24: exact
        differ += ((shared - sign @ sign.mT) / 2).cpu()
        both += shared.cpu()
    return differ, both


def _leading(matrix: Tensor, pool: ThreadPool) -> tuple[Tensor, Tensor, Tensor]:
    """Find the leading singular values and vectors, some better than others.

    Block Krylov iteration from a fixed start without a test of convergence (C. Musco and C. Musco,
    arXiv 1504.05477): the largest value is low by less than a hundredth where the spectrum is flat,
    by nothing that shows where it falls.

    Returns
    -------
    U : (m, r) Tensor
    S : (r,) Tensor
        On the CPU, float64, all above 1e-6 of the first.
    V : (n, r) Tensor
    """
    short = min(matrix.shape)
    if short <= _SMALL:
        found = svd(matrix, rank=min(LEADING, short), dtype=torch.float64, pool=pool)
        U, S, V = found.U, found.S.double(), found.Vh.mT
    else:
        U, S, V = _krylov(matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT)
        U, V = (U, V) if matrix.shape[0] >= matrix.shape[1] else (V, U)
    return _shown(Triplets(U, S, V.mT))


def _shown(found: Triplets) -> tuple[Tensor, Tensor, Tensor]:
    """Leave out what is no more than rounding."""
    U, S, V = found.U, found.S, found.Vh.mT
    count = int((1e-6 * S[0] < S).sum()) if len(S) and float(S[0]) > 0.0 else 0
    return U[:, :count], S[:count].cpu(), V[:, :count]


def _krylov(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    A = A.float()
    start = torch.randn(A.shape[1], 2 * LEADING, generator=torch.Generator().manual_seed(0))
    block = start.to(A.device)
    blocks = []
    for _ in range(_STEPS + 1):
        block = torch.linalg.qr(A.mT @ (A @ block)).Q
        blocks.append(block)
    basis = torch.linalg.qr(torch.cat(blocks, dim=1).double()).Q
    seen = (A @ basis.float()).double()
    values, W = torch.linalg.eigh(seen.mT @ seen)
    S, W = values.flip(0)[:LEADING].clamp_min(0.0).sqrt(), W.flip(1)[:, :LEADING]
    U = seen @ W / S.clamp_min(torch.finfo(torch.float64).tiny)
    return U, S, basis @ W


def _overlaps(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    count = len(left)
    found = torch.eye(count, dtype=torch.float64)
    for a in range(count):
        for b in range(a + 1, count):
            rank = min(left[a].shape[1], left[b].shape[1])
            if rank:
                squares = sum(
                    float((one[a].double().mT @ one[b].double()).square().sum())
                    for one in (left, right)
                )
                found[a, b] = found[b, a] = min(1.0, squares / (2 * rank))
            else:
                found[a, b] = found[b, a] = 0.0
    return found


def _mean(pairs: Tensor) -> float:
    count = len(pairs)
    return float((pairs.sum() - pairs.trace()) / (count * (count - 1)))
