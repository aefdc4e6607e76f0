"""What a verdict on a layer rests on, gathered from the tensors and from the pair of matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from svftool.auditing.pair import norm_ratio
from svftool.auditing.spectral import AnyPair
from svftool.checkpoints import dtype_name
from svftool.numerics.rounding import coarser, largest_step, precision_of, rounding_noise

EDGE_MARGIN = 1.1
"""How far above the noise's edge a singular value of the change must be to count."""

ROTATED = "rotated: the singular values are the same and the vectors are not"

RESOLVED = 1e-6
"""Part of the largest singular value of a change below which one is not resolved."""

_PERMUTED = 1e-6
_ROWS = 256


@dataclass(frozen=True)
class Noise:
    """Rounding noise to expect in a change.

    Attributes
    ----------
    dtype : torch.dtype
        The precision it is of.
    energy : float
        Sum of squares to expect.
    edge : float
        Bound of its largest singular value.
    steps : float or None
        Largest change of an entry, in units of the dtype's spacing there; None where the change is
        far above it.
    storage : str
        The format of codes that the values are of; empty where a dtype rounded them.
    """

    dtype: torch.dtype
    energy: float
    edge: float = 0.0
    steps: float | None = None
    storage: str = ""

    @property
    def name(self) -> str:
        """What the noise is of."""
        return self.storage or dtype_name(self.dtype)


@dataclass(frozen=True)
class Quantised:
    """How far the values of a tensor lie apart that is stored as codes.

    Attributes
    ----------
    step : Tensor
        Of the tensor's shape; 0 where it is not known.
    storage : str
        The format.
    """

    step: Tensor
    storage: str

    def reshaped(self, shape: tuple[int, ...], device: torch.device) -> Quantised:
        """Return the same in another shape and place."""
        return replace(self, step=self.step.reshape(shape).to(device))

    def of(self, index: int) -> Quantised:
        """Return that of one matrix of a batch; of a single one, its own."""
        return self if self.step.ndim == 2 else replace(self, step=self.step[index])


@dataclass(frozen=True)
class Screened:
    """What a screen could tell of a change, without a decomposition of the base.

    Attributes
    ----------
    spectral : bool or None
        Whether singular values alone changed; None where that is not certain.
    asymmetry : float or None
        Part of the change that cannot be one of singular values, as estimated.
    may_be_rotated : bool
        Whether a rotation could have made it: the norm is the same, and nothing else explains it.
    """

    spectral: bool | None = None
    asymmetry: float | None = None
    may_be_rotated: bool = False


@dataclass(frozen=True)
class Evidence:
    """Numbers that a verdict is read off.

    Attributes
    ----------
    m, n, count : int
        Sides of one matrix, and how many there are.
    identical : bool
        Every entry is equal.
    base_energy, tuned_energy, change_energy, inner : float
        ``||W||^2``, ``||W'||^2``, ``||D||^2`` and ``<W, W'>``.
    relative_drift : float or None
    svf_share : float or None
    noise : Noise or None
        Of the coarser precision of the two sides; None where nothing was rounded.
    tuned_noise : Noise or None
        Of the tuned side's precision, where it is finer.
    rank : int or None
        Singular values of the change above its noise; None where it was not taken.
    tail : float
        Sum of squares of the others.
    participation : float
        Lower bound of the change's rank.
    rearranged : str
        How the entries were moved or flipped; empty where they were not.
    broken : str
        What cannot be right; empty where nothing is.
    exponent : int
        Power of two that entries were divided by before their squares were summed.
    whole : bool
        Both sides are whole numbers, which nothing rounds.
    screened : Screened or None
        Where the base was not decomposed.
    """

    m: int
    n: int
    count: int = 1
    identical: bool = False
    base_energy: float = 0.0
    tuned_energy: float = 0.0
    change_energy: float = 0.0
    inner: float = 0.0
    relative_drift: float | None = None
    svf_share: float | None = None
    noise: Noise | None = None
    tuned_noise: Noise | None = None
    rank: int | None = None
    tail: float = 0.0
    participation: float = 0.0
    rearranged: str = ""
    broken: str = ""
    exponent: int = 0
    whole: bool = False
    screened: Screened | None = None

    @property
    def side(self) -> int:
        """Length of the short side."""
        return min(self.m, self.n)

    @property
    def weight_drift(self) -> float:
        """``||D|| / ||W||``; infinite for a base of zeros."""
        return norm_ratio(self.change_energy, self.base_energy)

    @property
    def cosine(self) -> float | None:
        """Cosine of base and tuned, None where one of them is zero."""
        product = self.base_energy * self.tuned_energy
        # The sums of a screen are rounded each for itself.
        return max(-1.0, min(1.0, self.inner / math.sqrt(product))) if product > 0.0 else None

    @property
    def noise_share(self) -> float:
        """Part of the change's energy that rounding would account for."""
        if self.noise is None or self.change_energy == 0.0:
            return 0.0
        return self.noise.energy / self.change_energy


def gather(
    pair: AnyPair,
    base: Tensor | None,
    tuned: Tensor | None,
    *,
    relative_drift: float | None,
    values: bool = True,
    quantised: Sequence[Quantised] = (),
) -> Evidence:
    """Collect the evidence on one matrix.

    Parameters
    ----------
    pair : AnyPair
        The matrices' spectra, norms and shares.
    base, tuned : (m, n) Tensor or None
        The matrices as stored; None where only factors or a change are known, which were not
        rounded.
    relative_drift : float or None
        As the metric.
    values : bool
        Whether the spectrum of the change may be computed.
    quantised : sequence of Quantised
        Of the sides that are stored as codes.

    Returns
    -------
    Evidence
    """
    plain = Evidence(
        pair.m,
        pair.n,
        identical=pair.identical,
        base_energy=pair.base_energy,
        tuned_energy=pair.tuned_energy,
        change_energy=pair.change_energy,
        inner=pair.inner,
        relative_drift=relative_drift,
        svf_share=None if pair.shares is None else pair.shares.svf,
    )
    if pair.identical:
        return plain
    if quantised and base is not None and tuned is not None:
        found = replace(plain, noise=quantisation_noise(base, tuned, quantised))
    else:
        found = _with_noise(plain, base, tuned)
    if base is not None and tuned is not None and may_be_rearranged(found):
        found = replace(found, rearranged=rearrangement(base, tuned))
    return with_rank(found, pair) if values else found


def _with_noise(found: Evidence, base: Tensor | None, tuned: Tensor | None) -> Evidence:
    if base is None or tuned is None:
        return found
    precisions = precision_of(base), precision_of(tuned)
    dtype = coarser(*precisions)
    noise = noise_of(base, tuned, dtype, drift=found.weight_drift)
    finer = None
    if precisions[1] != dtype:
        finer = noise_of(base, tuned, precisions[1], drift=found.weight_drift)
    return replace(found, noise=noise, tuned_noise=finer)


def noise_of(base: Tensor, tuned: Tensor, dtype: torch.dtype, *, drift: float) -> Noise:
    """Return the rounding noise of a dtype to expect, and how many of its steps entries moved."""
    steps = None
    if drift <= 4.0 * torch.finfo(dtype).eps:
        steps = largest_step(base, tuned, dtype)
    expected = rounding_noise(tuned if tuned.ndim == 2 else tuned.reshape(1, -1), dtype)
    return Noise(dtype, expected.energy, expected.edge, steps)


def quantisation_noise(base: Tensor, tuned: Tensor, quantised: Sequence[Quantised]) -> Noise:
    """Return the noise to expect of codes, and by how many of their steps entries moved at most.

    The error of an entry is taken as uniform over a step around it, as that of rounding is.
    """
    columns = torch.zeros(base.shape[1], dtype=torch.float64, device=base.device)
    longest = most = 0.0
    for start in range(0, base.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        step = quantised[0].step[rows].double()
        for other in quantised[1:]:
            step = torch.maximum(step, other.step[rows].double())
        before, after = base[rows].double(), tuned[rows].double()
        moved = (after - before).abs()
        tiny = 1e-6 * torch.maximum(before.abs(), after.abs())
        most = max(most, float(torch.where(moved <= tiny, 0.0, moved / step).max()))
        squares = step.square().div_(12.0)
        columns += squares.sum(dim=0)
        longest = max(longest, float(squares.sum(dim=1).max()))
    return Noise(
        torch.float32,
        float(columns.sum()),
        math.sqrt(longest) + math.sqrt(float(columns.max())),
        most,
        " and ".join(dict.fromkeys(one.storage for one in quantised)),
    )


def with_rank(found: Evidence, pair: AnyPair) -> Evidence:
    """Count the singular values of the change above its noise, unless they are certainly many."""
    found = replace(found, participation=pair.change_participation)
    noise = found.tuned_noise or found.noise
    energy = 0.0 if noise is None else noise.energy
    if found.participation > found.side / 2 and energy < 0.01 * found.change_energy:
        return found
    values = pair.change_values
    if values is None or not values.size:
        return found
    edge = 0.0 if noise is None else EDGE_MARGIN * noise.edge
    kept = int((values > max(edge, RESOLVED * float(values[0]))).sum())
    return replace(found, rank=kept, tail=float(values[kept:] @ values[kept:]))


def with_screen(found: Evidence, other: Evidence) -> Evidence:
    """Add what a screen of the same matrices tells of their directions and of the change's rank.

    What was measured stays. The spectra are known, so that nothing may be rotated unnoticed.
    """
    if other.screened is None or found.identical:
        return found
    return replace(
        found,
        rank=other.rank,
        tail=other.tail,
        participation=other.participation,
        screened=replace(other.screened, may_be_rotated=False),
    )


def may_be_rearranged(found: Evidence) -> bool:
    """Tell whether entries changed much and the spectrum stayed where it was.

    Entries that were moved or flipped were not rounded again, so their spectrum is the same to the
    last digits. A rotation was; it must be a large one to be told from a fine-tune.
    """
    drift = found.relative_drift
    if drift is None or not math.isfinite(drift) or found.weight_drift < 1e-3:
        return False
    floor = math.sqrt(found.noise.energy / found.base_energy) if found.noise else 0.0
    rotated = drift <= max(1e-5, floor) and drift < 0.01 * found.weight_drift
    return drift <= _PERMUTED or (rotated and found.weight_drift > 0.1)


def rearrangement(base: Tensor, tuned: Tensor) -> str:
    """Say how the entries of a matrix were rearranged.

    Parameters
    ----------
    base, tuned : (m, n) Tensor
        With the same singular values.

    Returns
    -------
    str
        As the end of a sentence; a general rotation where it is none of the plain ways.
    """
    W, T = base.float(), tuned.float()
    close = _PERMUTED
    if torch.allclose(W.abs(), T.abs(), rtol=close, atol=0.0):
        share = float((W != T).float().mean())
        return f"the signs of {share:.0%} of the entries are flipped, their sizes are the same"
    if W.shape == T.mT.shape and torch.allclose(W.mT, T, rtol=close, atol=0.0):
        return "the matrix is transposed"
    rows, columns = (_same_lengths(W, T, dim, close) for dim in (1, 0))
    if rows and columns:
        return "its rows or columns are permuted or sign-flipped"
    return ROTATED


def _same_lengths(W: Tensor, T: Tensor, dim: int, close: float) -> bool:
    """Whether rows or columns have the same set of lengths."""
    before, after = (torch.linalg.vector_norm(X, dim=dim).sort().values for X in (W, T))
    return torch.allclose(before, after, rtol=10.0 * close, atol=0.0)


def join(parts: Sequence[Evidence], relative_drift: float | None) -> Evidence:
    """Add up the evidence on the matrices of a batch."""
    if len(parts) == 1:
        return parts[0]
    changed = [part for part in parts if not part.identical]
    shares = [part for part in changed if part.svf_share is not None]
    change = sum(part.change_energy for part in parts)
    ranks = [part.rank for part in changed]
    ways = sorted({part.rearranged for part in changed})
    return Evidence(
        parts[0].m,
        parts[0].n,
        count=len(parts),
        identical=not changed,
        base_energy=sum(part.base_energy for part in parts),
        tuned_energy=sum(part.tuned_energy for part in parts),
        change_energy=change,
        inner=sum(part.inner for part in parts),
        relative_drift=relative_drift,
        svf_share=(
            sum(
                part.svf_share * part.change_energy for part in shares if part.svf_share is not None
            )
            / change
            if shares
            else None
        ),
        noise=_joined_noise([part.noise for part in changed]),
        tuned_noise=_joined_noise([part.tuned_noise for part in changed]),
        rank=max((rank for rank in ranks if rank is not None), default=None)
        if all(rank is not None for rank in ranks)
        else None,
        tail=sum(part.tail for part in changed),
        participation=max((part.participation for part in changed), default=0.0),
        rearranged="" if "" in ways else "; ".join(ways),
        exponent=parts[0].exponent,
        screened=_joined_screens([part.screened for part in changed]),
    )


def _joined_screens(parts: Sequence[Screened | None]) -> Screened | None:
    known = [part for part in parts if part is not None]
    if not known:
        return None
    told = {part.spectral for part in known}
    uneven = [part.asymmetry for part in known if part.asymmetry is not None]
    return Screened(
        told.pop() if len(told) == 1 else None,
        max(uneven, default=None),
        any(part.may_be_rotated for part in known),
    )


def _joined_noise(parts: Sequence[Noise | None]) -> Noise | None:
    known = [part for part in parts if part is not None]
    if not known or len(known) < len(parts):
        return None
    steps = [part.steps for part in known]
    return Noise(
        known[0].dtype,
        sum(part.energy for part in known),
        max(part.edge for part in known),
        None if None in steps else max(step for step in steps if step is not None),
        known[0].storage,
    )
