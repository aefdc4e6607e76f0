"""How far one layer moved, and which way: by its weights on both sides, or by its tuned file."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from svftool.checkpoints import View
from svftool.factors import TunedFile
from svftool.numerics import Svd, effective_rank, numerical_rank, stable_rank
from svftool.numerics.rounding import precision_of, rounding_error
from svftool.numerics.shares import change_shares
from svftool.numerics.subspace import count_intruders

INTRUDER_TOP = 10


@dataclass(frozen=True)
class Sides:
    """A number of the base and of the fine-tune; None where a side is missing."""

    base: float | None
    tuned: float | None


@dataclass(frozen=True)
class LayerDrift:
    """One row of an inspection. What compares two sides is None where there is one, or no change.

    Attributes
    ----------
    name : str
        Tensor name in the base.
    view : str or None
        How it is seen as matrices; None for norms, biases and other tensors that are no matrices.
    matrix : tuple of int or None
        ``(m, n)`` or ``(E, m, n)``.
    weight_drift : float or None
        ``||W' - W||_F / ||W||_F``.
    relative_drift : float or None
        ``||S' - S|| / ||S||`` of the sorted spectra.
    delta_norm : float or None
        Norm of the change of singular values by index: ``||diag(U' D V)||``.
    max_log_ratio : float or None
        Largest ``|ln(S'_i / S_i)|`` above the numerical rank of both sides.
    spectrum_share, svf_share, off_diagonal_share, out_of_span_share : float or None
        Shares of ``||D||_F^2``, see docs/metrics.md.
    rounding_floor : float or None
        ``||rounding noise||_F / ||W||_F`` expected from the coarser dtype of the two sides.
    intruders : int or None
        Of the leading 10 left singular vectors of W', those whose best match in W is below 0.5.
    cosine : float or None
        ``<W, W'> / (||W||_F ||W'||_F)``.
    effective_rank, stable_rank, spectral_norm : Sides
        Of the spectra; a batch of matrices gives the mean.
    verdict : str
        In words, see `svftool.auditing.verdicts`.
    spectrum_base, spectrum_tuned : ndarray or None
        Singular values, for plots.
    """

    name: str
    view: View | None
    matrix: tuple[int, ...] | None
    weight_drift: float | None = None
    relative_drift: float | None = None
    delta_norm: float | None = None
    max_log_ratio: float | None = None
    spectrum_share: float | None = None
    svf_share: float | None = None
    off_diagonal_share: float | None = None
    out_of_span_share: float | None = None
    rounding_floor: float | None = None
    intruders: int | None = None
    cosine: float | None = None
    effective_rank: Sides = Sides(None, None)
    stable_rank: Sides = Sides(None, None)
    spectral_norm: Sides = Sides(None, None)
    verdict: str = ""
    spectrum_base: np.ndarray | None = None
    spectrum_tuned: np.ndarray | None = None


def single_spectrum(name: str, view: View, matrix: tuple[int, ...], S: Tensor) -> LayerDrift:
    """Summarise the spectrum of a layer that is looked at alone."""
    row = LayerDrift(name, view, matrix, spectrum_base=S.double().numpy())
    return _with_spectra(row)


def drift_of_vectors(name: str, base: Tensor, tuned: Tensor) -> LayerDrift:
    """Compare tensors that are no matrices: norms, biases, counters."""
    row = LayerDrift(name, None, None)
    if torch.equal(base, tuned):
        return replace(row, weight_drift=0.0)
    W, D = base.double(), tuned.double() - base.double()
    return replace(row, weight_drift=_ratio(float(D.norm()), float(W.norm())))


def drift_of_factors(
    name: str, view: View, base: Tensor, tuned: Tensor, base_svd: Svd, tuned_svd: Svd
) -> LayerDrift:
    """Compare two weights whose singular value decompositions are at hand.

    Parameters
    ----------
    name : str
        Tensor name.
    view : {"matrix", "batch"}
        How the weights are seen.
    base, tuned : (m, n) or (E, m, n) Tensor
        The weights as matrices, any floating dtype.
    base_svd, tuned_svd : Svd
        Their factors at full rank.
    """
    matrix = tuple(base.shape)
    spectra = base_svd.S.double(), tuned_svd.S.double()
    row = LayerDrift(
        name, view, matrix, spectrum_base=spectra[0].numpy(), spectrum_tuned=spectra[1].numpy()
    )
    if torch.equal(base, tuned):
        return _with_spectra(
            replace(
                row,
                spectrum_tuned=row.spectrum_base,
                weight_drift=0.0,
                relative_drift=0.0,
                delta_norm=0.0,
                max_log_ratio=0.0,
                intruders=0,
                cosine=1.0,
            )
        )
    W, V = base.double(), tuned.double()
    D = V - W
    total = float(D.square().sum())
    shares = _shares(D, base_svd, total)
    spectrum = float((spectra[1] - spectra[0]).square().sum())
    dtype = max((precision_of(base), precision_of(tuned)), key=lambda kind: torch.finfo(kind).eps)
    return _with_spectra(
        replace(
            row,
            weight_drift=_ratio(math.sqrt(total), float(W.norm())),
            relative_drift=_ratio(math.sqrt(spectrum), float(spectra[0].norm())),
            delta_norm=math.sqrt(shares[0] * total),
            max_log_ratio=_max_log_ratio(row),
            spectrum_share=min(1.0, spectrum / total),
            svf_share=shares[0],
            off_diagonal_share=shares[1],
            out_of_span_share=shares[2],
            rounding_floor=_ratio(rounding_error(W, dtype) * math.sqrt(W.numel()), float(W.norm())),
            intruders=_intruders(base_svd, tuned_svd),
            cosine=_cosine(W, V),
        )
    )


def drift_of_tuned(name: str, tuned: TunedFile) -> LayerDrift:
    """Compare a layer with its base by the tuned file alone.

    The change is ``U diag(S - S_base) Vh`` by construction, so nothing else is needed.
    """
    before, delta = tuned.S_base[name].double(), tuned.delta(name)
    after = tuned.S[name].double().abs().sort(dim=-1, descending=True).values
    batch = "batch" if before.ndim == 2 else "matrix"
    row = LayerDrift(
        name,
        "batch" if batch == "batch" else "matrix",
        None,
        spectrum_base=before.numpy(),
        spectrum_tuned=after.numpy(),
    )
    total, changed = float(delta.square().sum()), bool(torch.any(delta))
    spectrum = float((after - before).square().sum())
    norm = float(before.norm())
    return _with_spectra(
        replace(
            row,
            weight_drift=_ratio(math.sqrt(total), norm),
            relative_drift=_ratio(math.sqrt(spectrum), norm),
            delta_norm=math.sqrt(total),
            max_log_ratio=_max_log_ratio(row),
            spectrum_share=min(1.0, spectrum / total) if changed else None,
            svf_share=1.0 if changed else None,
            off_diagonal_share=0.0 if changed else None,
            out_of_span_share=0.0 if changed else None,
            rounding_floor=0.0,
            intruders=0,
            cosine=_cosine(before, tuned.S[name].double()),
        )
    )


def _ratio(part: float, whole: float) -> float:
    if part == 0.0:
        return 0.0
    return part / whole if whole > 0.0 else math.inf


def _cosine(one: Tensor, two: Tensor) -> float | None:
    norms = float(one.norm() * two.norm())
    return float((one * two).sum()) / norms if norms > 0.0 else None


def _each(svd: Svd) -> list[tuple[Tensor, Tensor, Tensor]]:
    if svd.S.ndim == 1:
        return [(svd.U, svd.S, svd.Vh)]
    return list(zip(svd.U, svd.S, svd.Vh, strict=True))


def _shares(D: Tensor, svd: Svd, total: float) -> tuple[float, float, float]:
    """Add the three shares up over a batch, each matrix by its part of the change."""
    parts = [0.0, 0.0, 0.0]
    changes = [D] if svd.S.ndim == 1 else list(D)
    for (U, S, Vh), change in zip(_each(svd), changes, strict=True):
        shares = change_shares(U, S, Vh, change)
        if shares is not None:
            weight = float(change.square().sum()) / total
            for i, part in enumerate((shares.svf, shares.off_diagonal, shares.out_of_span)):
                parts[i] += weight * part
    return parts[0], parts[1], parts[2]


def _intruders(base: Svd, tuned: Svd) -> int:
    return sum(
        count_intruders(one[0].double().mT @ two[0][:, :INTRUDER_TOP].double())
        for one, two in zip(_each(base), _each(tuned), strict=True)
    )


def _max_log_ratio(row: LayerDrift) -> float | None:
    largest = 0.0
    assert row.spectrum_base is not None
    assert row.spectrum_tuned is not None
    pairs = zip(np.atleast_2d(row.spectrum_base), np.atleast_2d(row.spectrum_tuned), strict=True)
    for before, after in pairs:
        sides = (row.matrix or (before.size, before.size))[-2:]
        kept = min(numerical_rank(before, *sides), numerical_rank(after, *sides))
        if kept:
            largest = max(largest, float(np.abs(np.log(after[:kept] / before[:kept])).max()))
    return largest


def _with_spectra(row: LayerDrift) -> LayerDrift:
    def sides(function: object) -> Sides:
        return Sides(
            *(_mean(function, spectrum) for spectrum in (row.spectrum_base, row.spectrum_tuned))
        )

    return replace(
        row,
        effective_rank=sides(effective_rank),
        stable_rank=sides(stable_rank),
        spectral_norm=sides(np.max),
    )


def _mean(function: object, spectrum: np.ndarray | None) -> float | None:
    if spectrum is None or not callable(function):
        return None
    rows = [one for one in np.atleast_2d(spectrum) if one.size and one[0] > 0]
    return float(np.mean([function(one) for one in rows])) if rows else 0.0
