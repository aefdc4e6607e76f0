"""One tensor before and after: metrics, evidence and curves of a matrix, a batch, or a vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from svftool.auditing.directional import Leading
from svftool.auditing.evidence import (
    Evidence,
    Quantised,
    gather,
    join,
    noise_of,
    with_screen,
)
from svftool.auditing.metrics import METRICS, Measured, Metric, combine, measure, measure_energies
from svftool.auditing.pair import Array, MatrixPair
from svftool.auditing.results import Curves
from svftool.auditing.screen import screen
from svftool.auditing.spectral import AnyPair, SpectralPair
from svftool.errors import NumericalError
from svftool.numerics import ThreadPool
from svftool.numerics.rounding import coarser, precision_of
from svftool.numerics.tall import largest


@dataclass(frozen=True)
class Found:
    """What was found of one tensor.

    Attributes
    ----------
    measured : Measured
    evidence : Evidence or None
        None where there is nothing to compare with.
    curves : Curves or None
    leading : tuple of Leading
        Leading directions of the change, one a matrix, where they were asked for.
    """

    measured: Measured
    evidence: Evidence | None = None
    curves: Curves | None = None
    leading: tuple[Leading, ...] = ()


@dataclass(frozen=True)
class Changes:
    """The changes of a batch of matrices, formed one at a time and never held together.

    Attributes
    ----------
    count : int
    of : callable
        Gives the change of one, (m, n).
    """

    count: int
    of: Callable[[int], Tensor]

    def whole(self) -> Tensor:
        """Form them all, (count, m, n)."""
        return torch.stack([self.of(index) for index in range(self.count)])


@dataclass(frozen=True)
class Tuned:
    """The other side of a matrix: its weight, or the change that makes it.

    Attributes
    ----------
    weight : Tensor or None
        Of the base's shape.
    change : Tensor, Changes or None
        What is added to the base without rounding.
    quantised : Quantised or None
        Of a weight that is stored as codes.
    """

    weight: Tensor | None = None
    change: Tensor | Changes | None = None
    quantised: Quantised | None = None

    @property
    def whole_change(self) -> Tensor | None:
        """The change as one tensor."""
        return self.change.whole() if isinstance(self.change, Changes) else self.change

    def reshaped(self, shape: tuple[int, ...], device: torch.device) -> Tuned:
        """Return both in another shape and place."""
        if isinstance(self.change, Changes) and len(shape) == 3:
            of = self.change.of
            return Tuned(change=Changes(shape[0], lambda index: of(index).to(device)))
        weight, change = (
            None if one is None else one.reshape(shape).to(device)
            for one in (self.weight, self.whole_change)
        )
        quantised = None if self.quantised is None else self.quantised.reshaped(shape, device)
        return Tuned(weight, change, quantised)

    def matrix(self, index: int) -> tuple[Tensor | None, Tensor | None]:
        """Return weight and change of one matrix of a batch, (m, n); of a single one, its own."""
        if isinstance(self.change, Changes):
            return None, self.change.of(index)
        weight, change = (
            one if one is None or one.ndim == 2 else one[index]
            for one in (self.weight, self.change)
        )
        return weight, change


@dataclass(frozen=True)
class _Part:
    """What is kept of one matrix of a batch once it has been worked on."""

    measured: Measured
    curves: Curves
    base_energy: float
    change_energy: float
    evidence: Evidence | None = None


class BaseMatrix:
    """A base matrix, or a batch, decomposed once for every fine-tune it is held against.

    Parameters
    ----------
    weight : (m, n) or (E, m, n) Tensor
        Any floating dtype.
    metrics : sequence of Metric
        What to compute.
    vectors : bool
        Whether singular vectors may be computed.
    pool : ThreadPool
        Threads for large products.
    quantised : Quantised, optional
        Of a weight that is stored as codes, in its shape.

    Attributes
    ----------
    broken : str
        What makes the base unusable; empty where nothing does.
    """

    def __init__(
        self,
        weight: Tensor,
        metrics: Sequence[Metric],
        *,
        vectors: bool,
        pool: ThreadPool,
        quantised: Quantised | None = None,
    ) -> None:
        self._quantised = quantised
        self._weights = weight.unsqueeze(0) if weight.ndim == 2 else weight
        self._metrics = metrics
        self._vectors = vectors
        self._pool = pool
        self.broken = _defect(weight, "the base")
        self._single = self._pair(weight) if weight.ndim == 2 else None

    def alone(self) -> Found:
        """Describe the base's spectrum."""
        if self.broken:
            return self._unusable(self.broken)
        exponent = _exponent([self._weights])
        pairs = (self._pair(divided(weight, exponent)) for weight in self._weights)
        return _multiplied(_joined([self._part(pair) for pair in pairs]), exponent)

    def spectra(self) -> Tensor:
        """Return the singular values of each matrix of a base that is not broken, (E, k)."""
        exponent = _exponent([self._weights])
        found = [
            torch.from_numpy(
                MatrixPair(divided(weight, exponent), vectors=False, pool=self._pool).base
            )
            for weight in self._weights
        ]
        return divided(torch.stack(found), -exponent)

    def against(self, tuned: Tuned) -> Found:
        """Compare with a fine-tune.

        The matrices of a batch come one after another: what one takes is given back before the
        next. So a batch is decomposed again for each fine-tune, and a single matrix is not.
        """
        if self.broken:
            return self._unusable(self.broken)
        broken = "" if tuned.weight is None else _defect(tuned.weight, "the fine-tune")
        if broken:
            return self._unusable(broken)
        exponent = _exponent([self._weights, tuned.weight])
        parts = []
        for index, weight in enumerate(self._weights):
            other, change = tuned.matrix(index)
            if change is not None and (broken := _defect(change, "the fine-tune")):
                return self._unusable(broken)
            if exponent:
                weight = divided(weight, exponent)
                other, change = (
                    one if one is None else divided(one, exponent) for one in (other, change)
                )
            pair = None if exponent else self._single
            pair = (pair or self._pair(weight)).with_tuned(other, change)
            sides = [one for one in (self._quantised, tuned.quantised) if one is not None]
            codes = [] if exponent else [one.of(index) for one in sides]
            parts.append(self._part(pair, weight, Tuned(other, change), codes))
        found = _multiplied(_joined(parts), exponent)
        return found if not exponent else _told_apart(found, self._weights, tuned)

    def _pair(self, weight: Tensor) -> MatrixPair:
        return MatrixPair(weight, vectors=self._vectors, pool=self._pool)

    def _part(
        self,
        pair: MatrixPair,
        base: Tensor | None = None,
        tuned: Tuned | None = None,
        quantised: Sequence[Quantised] = (),
    ) -> _Part:
        measured = measure(pair, self._metrics)
        curves = _curves([pair])
        if base is None or tuned is None:
            return _Part(measured, curves, pair.base_energy, 0.0)
        evidence = gather(
            pair,
            None if tuned.weight is None else base,
            tuned.weight,
            relative_drift=measured.change["relative_drift"],
            values=self._vectors,
            quantised=quantised,
        )
        if not self._vectors:
            # Singular values alone do not tell what kind of change it was; a screen does.
            screened = screen(base, tuned.weight, tuned.whole_change, quantised=tuple(quantised))
            evidence = with_screen(evidence, screened)
        return _Part(measured, curves, pair.base_energy, pair.change_energy, evidence)

    def _unusable(self, broken: str) -> Found:
        m, n = self._weights.shape[-2:]
        return Found(Measured(), Evidence(m, n, count=len(self._weights), broken=broken))


class ScreenedBase:
    """A base matrix, or a batch, held against fine-tunes without being decomposed.

    Parameters
    ----------
    weight : (m, n) or (E, m, n) Tensor
        Any floating dtype.
    metrics : sequence of Metric
        Of those that a screen measures.
    quantised : Quantised, optional
        Of a weight that is stored as codes, in its shape.
    """

    def __init__(
        self, weight: Tensor, metrics: Sequence[Metric], *, quantised: Quantised | None = None
    ) -> None:
        self._weights = weight.unsqueeze(0) if weight.ndim == 2 else weight
        self._quantised = quantised
        self._metrics = metrics

    def against(self, tuned: Tuned) -> Found:
        """Compare with a fine-tune, the matrices of a batch one after another."""
        exponent = _exponent([self._weights, tuned.weight])
        parts: list[Evidence] = []
        for index, weight in enumerate(self._weights):
            other, change = tuned.matrix(index)
            sides = [one for one in (self._quantised, tuned.quantised) if one is not None]
            codes = () if exponent else tuple(one.of(index) for one in sides)
            found = screen(
                divided(weight, exponent),
                None if other is None else divided(other, exponent),
                None if change is None else divided(change, exponent),
                quantised=codes,
            )
            finite = math.isfinite(found.base_energy) and math.isfinite(found.change_energy)
            broken = "" if finite else self._defect(other, change)
            if broken:
                m, n = weight.shape
                return Found(Measured(), Evidence(m, n, count=len(self._weights), broken=broken))
            parts.append(found)
        measured = combine([measure_energies(one, self._metrics) for one in parts], parts)
        found = join(parts, None)
        whole = _multiplied(Found(measured, found), exponent)
        return whole if not exponent else _told_apart(whole, self._weights, tuned)

    def _defect(self, other: Tensor | None, change: Tensor | None) -> str:
        after = other if change is None else change
        return _defect(self._weights, "the base") or _defect(after, "the fine-tune")

    def beside(self, S_base: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
        """Append the energy that truncated factors leave as it is in the base, as one value."""
        kept = S_base.double().reshape(len(self._weights), -1)
        norms = torch.stack([torch.linalg.vector_norm(one.double()) for one in self._weights])
        rest = (norms.square() - kept.square().sum(dim=1)).clamp_min(0.0).sqrt()[:, None]
        return tuple(  # type: ignore[return-value]
            torch.cat((one.double().reshape(kept.shape), rest), dim=1).reshape(*one.shape[:-1], -1)
            for one in (S_base, S)
        )


def _told_apart(found: Found, base: Tensor, tuned: Tuned) -> Found:
    """Correct what was called identical after a division that took the smallest entries to zero."""
    if found.evidence is None or not found.evidence.identical:
        return found
    change, weight = tuned.whole_change, tuned.weight
    if change is not None:
        equal = not bool(change.any())
    else:
        equal = weight is None or torch.equal(base.double().flatten(), weight.double().flatten())
    if equal:
        return found
    return replace(found, evidence=replace(found.evidence, identical=False))


def _joined(parts: Sequence[_Part]) -> Found:
    measured = combine([part.measured for part in parts], parts)
    curves = _mean_curves([part.curves for part in parts])
    evidence = [part.evidence for part in parts if part.evidence is not None]
    if not evidence:
        return Found(measured, None, curves)
    return Found(measured, join(evidence, measured.change["relative_drift"]), curves)


def _defect(values: Tensor | None, side: str) -> str:
    if values is None:
        raise ValueError("either a weight or a change is needed")
    try:
        largest(values)
    except NumericalError as error:
        return f"{side}: {error}"
    return ""


_DRIFT = METRICS["relative_drift"]


def compare_spectra(
    S: Tensor, S_tuned: Tensor, *, sides: tuple[int, int] | None, metrics: Sequence[Metric]
) -> Found:
    """Compare a layer by its singular values before and after, in one and the same basis.

    Parameters
    ----------
    S, S_tuned : (k,) or (E, k) Tensor
        As a tuned file holds them.
    sides : (int, int) or None
        Of one matrix; taken as k where they are not known.
    metrics : sequence of Metric
        What to compute.
    """
    m, n = sides or (S.shape[-1], S.shape[-1])
    count = len(S) if S.ndim == 2 else 1
    for side, values in (("the base", S), ("the fine-tune", S_tuned)):
        bad = int((~values.isfinite()).sum())
        if bad:
            broken = f"{side}: {bad} of {values.numel()} singular values are not finite"
            return Found(Measured(), Evidence(m, n, count=count, broken=broken))
    exponent = _exponent([S, S_tuned])
    rows = [divided(one, exponent).reshape(count, -1) for one in (S, S_tuned)]
    pairs = [SpectralPair(a, b, m=m, n=n) for a, b in zip(*rows, strict=True)]
    measured = combine([measure(pair, metrics) for pair in pairs], pairs)
    # A screen does not measure it: of weights it would need their decomposition.
    drift = combine([measure(pair, [_DRIFT]) for pair in pairs], pairs).change[_DRIFT.name]
    evidence = [gather(pair, None, None, relative_drift=drift) for pair in pairs]
    found = Found(measured, join(evidence, drift), _curves(pairs))
    return _multiplied(found, exponent)


# Squares of entries beyond 1e154 or below 1e-154 leave float64: such matrices are divided by a
# power of two first. Only float64 can hold them; the squares of all others are far inside.


_EXTREME = 300
_NORMS = ("spectral_norm", "frobenius_norm", "frobenius_distance", "change_spectral_norm")
_SIZES = frozenset((*_NORMS, "mp_sigma", "mp_edge", "hard_threshold", "delta_norm"))
_LOGS = frozenset(("log_norm", "log_spectral_norm"))
_NOT_SCALED = frozenset(("alpha_xmin", "alpha_weighted", "log_alpha_norm"))


def _exponent(tensors: Sequence[Tensor | None]) -> int:
    """Return the power of two that brings the largest entry of all below 1; 0 for usual sizes."""
    wide = [one for one in tensors if one is not None and one.dtype == torch.float64]
    top = max((largest(one) for one in tensors if one is not None), default=0.0) if wide else 0.0
    exponent = math.frexp(top)[1]
    return exponent if abs(exponent) > _EXTREME else 0


def divided(values: Tensor, exponent: int) -> Tensor:
    """Divide by a power of two, in two steps: the power itself may be beyond float64.

    Parameters
    ----------
    values : Tensor
    exponent : int
        0 leaves the values as they are.
    """
    if not exponent:
        return values
    half = exponent // 2
    return values.double() * 2.0**-half * 2.0 ** (half - exponent)


def _multiplied(found: Found, exponent: int) -> Found:
    """Return what was found of divided matrices for the matrices themselves."""
    if not exponent:
        return found
    half = exponent // 2

    def size(value: float) -> float:
        return value * 2.0**half * 2.0 ** (exponent - half)

    def metric(name: str, value: float | None) -> float | None:
        if value is None or name in _NOT_SCALED:
            return None
        if name in _LOGS:
            return value + 2.0 * exponent * math.log10(2.0)
        return size(value) if name in _SIZES else value

    sides = vars(found.measured).items()
    return Found(
        Measured(**{k: {name: metric(name, v) for name, v in s.items()} for k, s in sides}),
        None if found.evidence is None else replace(found.evidence, exponent=exponent),
        None if found.curves is None else _multiplied_curves(found.curves, exponent),
    )


def _multiplied_curves(curves: Curves, exponent: int) -> Curves:
    half = exponent // 2
    base, tuned, along = (
        None if one is None else one * 2.0**half * 2.0 ** (exponent - half)
        for one in (curves.base, curves.tuned, curves.along)
    )
    assert base is not None
    return Curves(base, tuned, along)


def compare_vectors(base: Tensor, tuned: Tensor | None, change: Tensor | None = None) -> Found:
    """Compare tensors that are no matrices: norms, biases, counters.

    Parameters
    ----------
    base : Tensor
        Any shape and dtype.
    tuned, change : Tensor or None
        One of the two.
    """
    n = base.numel()
    if tuned is not None and base.dtype == tuned.dtype and torch.equal(base, tuned):
        return Found(Measured({"weight_drift": 0.0}), Evidence(1, n, identical=True))
    W = base.double()
    T = tuned.double() if tuned is not None else W + _must(change)
    for side, values in (("the base", W), ("the fine-tune", T)):
        bad = int((~values.isfinite()).sum())
        if bad:
            broken = f"{side}: {bad} of {n} entries are NaN or infinite"
            return Found(Measured(), Evidence(1, n, broken=broken))
    whole = tuned is not None and not (_has_point(base) or _has_point(tuned))
    same = torch.equal(W, T) and _equal_beyond_float64(base, tuned)
    exponent = _exponent([W, T])
    W, T = divided(W, exponent), divided(T, exponent)
    D = _difference(base, tuned) if whole else T - W
    found = Evidence(
        1,
        n,
        identical=same,
        whole=whole,
        base_energy=float(W.square().sum()),
        tuned_energy=float(T.square().sum()),
        change_energy=float(D.square().sum()),
        inner=float((W * T).sum()),
        exponent=exponent,
    )
    measured = Measured({"weight_drift": found.weight_drift})
    if found.identical or tuned is None or not (_floats(base) and _floats(tuned)):
        return Found(measured, found)
    if exponent:
        base, tuned = W, T
    return Found(measured, _with_noise(found, base, tuned))


def _has_point(tensor: Tensor) -> bool:
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


def _equal_beyond_float64(base: Tensor, tuned: Tensor | None) -> bool:
    """Whether values that are equal as float64 are equal: only it rounds large whole numbers."""
    whole = [one for one in (base, tuned) if one is not None and not _has_point(one)]
    if len(whole) == 2:
        return not bool(_difference(base, tuned).any())
    return all(torch.equal(one.double().to(torch.int64), one.to(torch.int64)) for one in whole)


def _difference(base: Tensor, tuned: Tensor | None) -> Tensor:
    """Return the difference of whole numbers as float64, not zero where they are not equal.

    float64 holds whole numbers up to 2^53 alone, so that both halves of their bits are subtracted.
    """
    upper, lower = (
        after - before
        for before, after in zip(_halves(base), _halves(_must_be(tuned)), strict=True)
    )
    return upper * 2.0**32 + lower


def _halves(tensor: Tensor) -> tuple[Tensor, Tensor]:
    bits = tensor.view(torch.int64) if tensor.dtype == torch.uint64 else tensor.to(torch.int64)
    upper = bits >> 32
    if tensor.dtype == torch.uint64:
        upper = upper & 0xFFFFFFFF
    return upper.double(), (bits & 0xFFFFFFFF).double()


def _must_be(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _with_noise(found: Evidence, base: Tensor, tuned: Tensor) -> Evidence:
    dtype = coarser(precision_of(base), precision_of(tuned))
    noise = noise_of(base, tuned, dtype, drift=found.weight_drift)
    moved = "" if base.numel() < 2 else _moved(base, tuned)
    return replace(found, noise=noise, rearranged=moved)


def _moved(base: Tensor, tuned: Tensor) -> str:
    """Say whether the same values stand in another order."""
    before, after = (side.double().flatten().sort().values for side in (base, tuned))
    if torch.equal(before, after) and bool((before != before[0]).any()):
        return "the same values in another order"
    return ""


def _floats(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _must(change: Tensor | None) -> Tensor:
    if change is None:
        raise ValueError("either tuned or change is needed")
    return change.double()


def _curves(pairs: Sequence[AnyPair]) -> Curves:
    return _mean_curves(
        [Curves(pair.base, pair.tuned, pair.along if pair.paired else None) for pair in pairs]
    )


def _mean_curves(curves: Sequence[Curves]) -> Curves:
    tuned = [one.tuned for one in curves if one.tuned is not None]
    along = [one.along for one in curves if one.along is not None]
    return Curves(
        _mean([one.base for one in curves]),
        _mean(tuned) if tuned else None,
        _mean(along) if along else None,
    )


def _mean(curves: Sequence[Array]) -> Array:
    mean: Array = curves[0] if len(curves) == 1 else np.mean(curves, axis=0)
    return mean
