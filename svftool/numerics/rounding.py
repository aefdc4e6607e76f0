"""What rounding to a floating dtype does to a weight: the floor below which a change is noise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""Floating dtypes that weights are computed in, coarsest first."""

_PART = 1 << 17
_DIGITS = {
    torch.float64: 53,
    torch.float32: 24,
    torch.float16: 11,
    torch.bfloat16: 8,
    torch.float8_e4m3fn: 4,
    torch.float8_e5m2: 3,
}
_SMALLEST = {
    torch.float64: -1074,
    torch.float32: -149,
    torch.float16: -24,
    torch.bfloat16: -133,
    torch.float8_e4m3fn: -9,
    torch.float8_e5m2: -16,
}


def spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance of neighbouring numbers of a dtype around each value.

    Parameters
    ----------
    values : Tensor
        Any shape, finite.
    dtype : torch.dtype
        A floating dtype.

    Returns
    -------
    Tensor
        Powers of two, same shape; float64 where `dtype` is, else float32.

    Examples
    --------
    >>> spacing(torch.tensor([1.0, 3.0]), torch.bfloat16).tolist()
    [0.0078125, 0.015625]
    """
    # The exponent field alone, read as a number, is the power of two below each value.
    if dtype == torch.float64:
        powers = (values.double().view(torch.int64) & 0x7FF0000000000000).view(torch.float64)
    else:
        powers = (values.float().contiguous().view(torch.int32) & 0x7F800000).view(torch.float32)
    return (powers * 2.0 ** (1 - _DIGITS[dtype])).clamp_min_(2.0 ** _SMALLEST[dtype])


def coarser(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """Return the dtype of the two with fewer significant digits.

    Examples
    --------
    >>> coarser(torch.float32, torch.bfloat16)
    torch.bfloat16
    """
    return min(a, b, key=lambda dtype: _DIGITS[dtype])


def precision_of(values: Tensor) -> torch.dtype:
    """Return the coarsest of `FLOATS` that holds all values exactly.

    A float32 file may hold a model that was trained, or once saved, in bfloat16: then that is the
    precision that its rounding noise is of.

    Parameters
    ----------
    values : Tensor
        Any shape, floating.

    Examples
    --------
    >>> precision_of(torch.tensor([1.0, 0.1]).bfloat16().float())
    torch.bfloat16
    """
    for dtype in FLOATS:
        if dtype == values.dtype:
            return dtype
        if all(torch.equal(part.to(dtype).to(part.dtype), part) for part in _parts(values)):
            return dtype
    return values.dtype


def _parts(values: Tensor) -> Iterator[Tensor]:
    """Cut a tensor along its first dimension, so that copies of the parts are small."""
    if values.ndim == 0 or values.numel() <= _PART:
        yield values
    else:
        yield from torch.split(values, max(1, _PART // max(1, values[0].numel())))


@dataclass(frozen=True)
class RoundingNoise:
    """What to expect of the errors of rounding a matrix to a dtype.

    The error of one entry is taken as uniform over the spacing around it, so its variance is the
    spacing's square over 12, and as independent of the others.

    Attributes
    ----------
    energy : float
        Sum of squares of all errors. For normally distributed bfloat16 weights its root is 0.0017
        of the weights' norm.
    edge : float
        Bound of the largest singular value: the longest row and the longest column of standard
        deviations added up. For equal entries this is ``rms * (sqrt(m) + sqrt(n))``, the edge of
        the Marchenko-Pastur law.

    References
    ----------
    A. S. Bandeira and R. van Handel, Sharp nonasymptotic bounds on the norm of random matrices with
    independent entries, Annals of Probability 44, 2016 (arXiv 1408.6185), theorem 1.1.
    """

    energy: float
    edge: float


def rounding_noise(values: Tensor, dtype: torch.dtype) -> RoundingNoise:
    """Estimate the noise that a computation leaves behind whose result is stored in a dtype.

    Parameters
    ----------
    values : (m, n) Tensor
        Finite; the estimate is the same whether or not they are representable already.
    dtype : torch.dtype
        The dtype that is rounded to.

    Examples
    --------
    >>> noise = rounding_noise(torch.ones(4, 4), torch.bfloat16)
    >>> round(noise.energy * 12 * 2**14, 6), round(noise.edge * 12**0.5 * 2**7, 6)
    (16.0, 4.0)
    """
    if values.numel() == 0:
        return RoundingNoise(0.0, 0.0)
    columns = torch.zeros(values.shape[1], dtype=torch.float64, device=values.device)
    longest = 0.0
    for part in _parts(values):
        squares = spacing(part, dtype).double().square_().div_(12.0)
        columns += squares.sum(dim=0)
        longest = max(longest, float(squares.sum(dim=1).max()))
    edge = math.sqrt(longest) + math.sqrt(float(columns.max()))
    return RoundingNoise(float(columns.sum()), edge)


def largest_step(before: Tensor, after: Tensor, dtype: torch.dtype) -> float:
    """Return how far an entry moved at most, in steps of a dtype at the larger of its two values.

    Parameters
    ----------
    before, after : Tensor
        Same shape, floating, finite.
    dtype : torch.dtype
        Whose spacing counts.

    Examples
    --------
    >>> largest_step(torch.ones(2), torch.tensor([1.0, 1.0078125]), torch.bfloat16)
    1.0
    """
    return moved_within(before, after, dtype, most=math.inf)


def moved_within(before: Tensor, after: Tensor, dtype: torch.dtype, *, most: float) -> float:
    """As `largest_step`, but stop looking where an entry moved by more than `most`."""
    wide = torch.promote_types(torch.promote_types(before.dtype, after.dtype), torch.float32)
    found = 0.0
    for one, two in zip(_parts(before), _parts(after), strict=True):
        first, second = one.to(wide), two.to(wide)
        steps = (second - first).abs() / spacing(torch.maximum(first.abs(), second.abs()), dtype)
        found = max(found, float(steps.max()))
        if found > most:
            break
    return found


def round_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 values to a dtype, to the nearest and ties to even.

    torch rounds float64 to float32 first and that to half precision: two roundings, of which the
    second takes a value just off the middle of two numbers for the middle.

    Parameters
    ----------
    values : Tensor
        float64.
    dtype : torch.dtype
        What the result is in.

    Examples
    --------
    >>> above_the_middle = torch.tensor(1 + 2.0**-11 + 2.0**-40, dtype=torch.float64)
    >>> above_the_middle.half().item(), round_once(above_the_middle, torch.float16).item()
    (1.0, 1.0009765625)
    """
    if dtype not in _DIGITS or dtype in (torch.float64, torch.float32):
        return values.to(dtype)
    single = values.float().contiguous()
    # Only what float32 takes for the middle of two numbers can go wrong: its last bits are zero.
    spare = (1 << (_DIGITS[torch.float32] - _DIGITS[dtype] - 1)) - 1
    doubtful = torch.nonzero((single.view(torch.int32) & spare).flatten() == 0).flatten()
    if len(doubtful):
        single.view(-1)[doubtful] = _to_odd(values.flatten()[doubtful])
    return single.to(dtype)


def _to_odd(values: Tensor) -> Tensor:
    """Round to float32; where that is not exact, to the neighbour with an odd last bit.

    Rounded again, each value goes where it would have gone at once: the last bit tells on which
    side of float32 it lies (S. Boldo and G. Melquiond, IEEE Transactions on Computers 57, 2008).
    """
    single = values.float()
    even = (single.double() != values) & (single.view(torch.int32) & 1 == 0) & ~values.isnan()
    toward = torch.where(values > single.double(), math.inf, -math.inf).float()
    return torch.where(even, torch.nextafter(single, toward), single)


def beyond(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Tell which values a dtype cannot hold: they are finite, and would round past its largest.

    Parameters
    ----------
    values : Tensor
        float64.
    dtype : torch.dtype
        A dtype of real numbers.

    Returns
    -------
    Tensor
        bool, of the same shape.
    """
    if dtype in _DIGITS:
        top = torch.finfo(dtype).max
        half_step = math.ldexp(1.0, math.frexp(top)[1] - _DIGITS[dtype] - 1)
        return values.isfinite() & (values.abs() - top >= half_step)
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        return torch.zeros_like(values, dtype=torch.bool)
    limits = torch.iinfo(dtype)
    return values.isfinite() & ((values < limits.min) | (values > limits.max))
