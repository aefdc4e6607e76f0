"""Every metric against an independent float64 computation, closed forms, and its documentation."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from svftool.auditing import METRICS, choose_metrics
from svftool.auditing.metrics import combine, measure
from svftool.auditing.pair import MatrixPair
from svftool.errors import UsageError

ALL = choose_metrics(["all"])
SHAPES = [(60, 60), (90, 40), (40, 90)]


def pair(m: int, n: int, size: float = 0.2) -> tuple[np.ndarray, np.ndarray, MatrixPair]:
    generator = torch.Generator().manual_seed(m * n)
    W = torch.randn(m, n, generator=generator, dtype=torch.float64)
    W = W * torch.logspace(0, -1, n, dtype=torch.float64)
    T = W + size * torch.randn(m, n, generator=generator, dtype=torch.float64)
    return W.numpy(), T.numpy(), MatrixPair(W, T)


def expected_changes(w: np.ndarray, t: np.ndarray) -> dict[str, float]:
    """Compute the metrics of a change anew, from numpy's decompositions of both sides."""
    d = t - w
    u, s, vh = np.linalg.svd(w, full_matrices=False)
    u2, s2, vh2 = np.linalg.svd(t, full_matrices=False)
    ud, sd, vdh = np.linalg.svd(d, full_matrices=False)
    total = (d**2).sum()
    N = u.T @ d @ vh.T
    M = u.T @ t @ vh.T
    matches, right = np.abs(u.T @ u2[:, :10]), np.abs(vh @ vh2[:10].T)
    inside = np.sqrt(((u[:, :10].T @ u2[:, :10]) ** 2).sum(0))
    angles = np.arccos(np.clip(np.linalg.svd(u[:, :10].T @ u2[:, :10])[1], 0, 1))
    angles_right = np.arccos(np.clip(np.linalg.svd(vh[:10] @ vh2[:10].T)[1], 0, 1))
    share = ((s2 - s) ** 2).sum() / total
    p = sd / sd.sum()
    kept = np.cumsum(sd**2) / total
    return {
        "relative_drift": np.linalg.norm(s2 - s) / np.linalg.norm(s),
        "delta_norm": np.linalg.norm(s2 - s),
        "max_log_ratio": np.abs(np.log(s2 / s)).max(),
        "mean_log_ratio": np.log(s2 / s).mean(),
        "weight_drift": np.linalg.norm(d) / np.linalg.norm(w),
        "frobenius_distance": np.linalg.norm(d),
        "spectrum_share": share,
        "rotation_share": 1 - share,
        "svf_share": (np.diag(N) ** 2).sum() / total,
        "off_diagonal_share": ((N**2).sum() - (np.diag(N) ** 2).sum()) / total,
        "out_of_span_share": 1 - (N**2).sum() / total,
        "intruders": (matches.max(0) < 0.5).sum(),
        "intruders_strict": (matches.max(0) < 0.8).sum(),
        "intruders_right": (right.max(0) < 0.5).sum(),
        "intruders_subspace": (inside < 0.5).sum(),
        "weakest_match": matches.max(0).min(),
        "left_similarity": ((u[:, :10].T @ u2[:, :10]) ** 2).sum() / 10,
        "right_similarity": ((vh[:10] @ vh2[:10].T) ** 2).sum() / 10,
        "angle_max": angles.max(),
        "angle_mean": angles.mean(),
        "angle_max_right": angles_right.max(),
        "chordal_distance": np.sqrt((np.sin(angles) ** 2).sum()),
        "grassmann_distance": np.sqrt((angles**2).sum()),
        "projection_distance": np.sin(angles).max(),
        "off_diagonal_energy": 1 - (np.diag(M) ** 2).sum() / (t**2).sum(),
        "cosine": (w * t).sum() / np.linalg.norm(w) / np.linalg.norm(t),
        "cka": np.linalg.norm(w.T @ t) ** 2 / np.linalg.norm(w.T @ w) / np.linalg.norm(t.T @ t),
        "amplification": np.linalg.norm(d) / np.linalg.norm(ud[:, :10].T @ w @ vdh[:10].T),
        "nuclear_ratio": s2.sum() / s.sum(),
        "spectral_ratio": s2[0] / s[0],
        "change_rank90": int((kept < 0.9).sum()) + 1,
        "change_rank99": int((kept < 0.99).sum()) + 1,
        "change_effective_rank": np.exp(-(p * np.log(p)).sum()),
        "change_stable_rank": total / sd[0] ** 2,
        "change_spectral_norm": sd[0],
    }


def expected_spectrum(w: np.ndarray) -> dict[str, float]:
    """Compute the metrics of one spectrum anew; those of fits have tests of their own."""
    s = np.linalg.svd(w, compute_uv=False)
    p, q = s / s.sum(), s**2 / (s**2).sum()
    return {
        "effective_rank": np.exp(-(p * np.log(p)).sum()),
        "stable_rank": (s**2).sum() / s[0] ** 2,
        "spectral_norm": s[0],
        "frobenius_norm": np.linalg.norm(w),
        "condition_number": s[0] / s[-1],
        "nuclear_rank": s.sum() ** 2 / (s**2).sum(),
        "participation_ratio": (s**2).sum() ** 2 / (s**4).sum(),
        "numerical_rank": len(s),
        "rank90": int((np.cumsum(q) < 0.9).sum()) + 1,
        "log_norm": math.log10((s**2).sum()),
        "log_spectral_norm": math.log10(s[0] ** 2),
        "matrix_entropy": -(q * np.log(q)).sum() / math.log(len(s)),
    }


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_every_metric_of_a_change(m: int, n: int) -> None:
    w, t, both = pair(m, n)
    found = measure(both, ALL).change
    expected = expected_changes(w, t)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_every_metric_of_a_spectrum(m: int, n: int) -> None:
    w, t, both = pair(m, n)
    found = measure(both, ALL)
    for side, matrix in ((found.base, w), (found.tuned, t)):
        for name, value in expected_spectrum(matrix).items():
            assert side[name] == pytest.approx(value, rel=1e-8), name


def test_derived_numbers_of_the_power_law_and_the_bulk() -> None:
    w, _, both = pair(90, 70)
    s = np.linalg.svd(w, compute_uv=False)
    found = measure(both, ALL).base
    alpha = found["alpha"]
    assert alpha is not None
    assert found["alpha_weighted"] == pytest.approx(alpha * math.log10(s[0] ** 2))
    assert found["log_alpha_norm"] == pytest.approx(math.log10((s ** (2 * alpha)).sum()))
    tail = s**2 >= (found["alpha_xmin"] or 0.0) * (1 - 1e-12)
    assert alpha == pytest.approx(
        1 + tail.sum() / np.log(s[tail] ** 2 / (found["alpha_xmin"] or 1.0)).sum()
    )
    assert found["mp_softrank"] == pytest.approx((found["mp_edge"] or 0.0) ** 2 / s[0] ** 2)
    assert found["mp_spikes"] == (s > (found["mp_edge"] or 0.0)).sum()
    assert found["hard_threshold_rank"] == (s > (found["hard_threshold"] or 0.0)).sum()
    assert found["mp_edge"] == pytest.approx(
        (found["mp_sigma"] or 0.0) * (math.sqrt(90) + math.sqrt(70))
    )


def test_a_pure_scaling_in_closed_form() -> None:
    W = torch.randn(30, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = measure(MatrixPair(W, 1.1 * W), ALL)
    change = found.change
    for name, value in {
        "weight_drift": 0.1,
        "relative_drift": 0.1,
        "max_log_ratio": math.log(1.1),
        "mean_log_ratio": math.log(1.1),
        "spectrum_share": 1.0,
        "svf_share": 1.0,
        "cosine": 1.0,
        "cka": 1.0,
        "intruders": 0.0,
        "nuclear_ratio": 1.1,
        "left_similarity": 1.0,
        "off_diagonal_energy": 0.0,
    }.items():
        assert change[name] == pytest.approx(value, abs=1e-7), name
    assert change["angle_max"] == pytest.approx(0.0, abs=1e-6)
    assert found.base["effective_rank"] == pytest.approx(found.tuned["effective_rank"])


def test_no_change_is_zero_or_null_and_never_a_small_number() -> None:
    W = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    found = measure(MatrixPair(W, W.clone()), ALL).change
    nulls = {name for name, value in found.items() if value is None}
    assert nulls == {
        "spectrum_share", "rotation_share", "svf_share", "off_diagonal_share", "out_of_span_share",
        "amplification", "change_rank90", "change_rank99", "change_effective_rank",
        "change_stable_rank", "change_spectral_norm",
    }  # fmt: skip
    ones = {
        "cosine", "cka", "nuclear_ratio", "spectral_ratio", "weakest_match", "left_similarity",
        "right_similarity",
    }  # fmt: skip
    for name, value in found.items():
        if name in ones:
            assert value == pytest.approx(1.0, abs=1e-12), name
        elif name not in nulls:
            assert value == pytest.approx(0.0, abs=1e-12), name
    exact = ("weight_drift", "relative_drift", "delta_norm", "max_log_ratio", "intruders")
    assert all(found[name] == 0.0 for name in exact)


def test_a_batch_adds_up_as_a_block_diagonal_matrix() -> None:
    pairs = [pair(12, 8, size)[2] for size in (0.1, 0.3, 0.9)]
    sides = [pair(12, 8, size)[:2] for size in (0.1, 0.3, 0.9)]
    blocks = [torch.block_diag(*(torch.from_numpy(x[i]) for x in sides)) for i in (0, 1)]
    whole = measure(MatrixPair(*blocks), ALL).change
    found = combine([measure(one, ALL) for one in pairs], pairs).change
    for name in ("weight_drift", "frobenius_distance", "change_spectral_norm"):
        assert found[name] == pytest.approx(whole[name], rel=1e-9), name
    changes = [one.change_energy for one in pairs]
    shares = [one.shares.svf for one in pairs if one.shares is not None]
    assert found["svf_share"] == pytest.approx(np.average(shares, weights=changes))
    assert found["intruders"] == sum(measure(one, ALL).change["intruders"] or 0 for one in pairs)


def test_metrics_are_looked_up_by_name() -> None:
    assert {one.name for one in choose_metrics(None)} == {
        name for name, one in METRICS.items() if one.default
    }
    assert "alpha" in {one.name for one in choose_metrics(["alpha"])}
    assert len(choose_metrics(["all"])) == len(METRICS)
    assert not any(one.vectors for one in choose_metrics(["all"], fast=True))
    with pytest.raises(UsageError, match=r"metric 'beta', expected one of all, spectral_drift"):
        choose_metrics(["beta"])
    with pytest.raises(UsageError, match=r"'cka' needs singular vectors, which --fast leaves out"):
        choose_metrics(["cka"], fast=True)


def test_every_metric_is_documented() -> None:
    text = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
    missing = [
        name for name in (*METRICS, "rounding_floor", "change_rank") if f"`{name}`" not in text
    ]
    assert not missing
