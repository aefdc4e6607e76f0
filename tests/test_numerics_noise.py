"""Rounding floors, random-matrix edges and power laws against closed forms and measured noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from svftool.numerics.power_law import fit_power_law
from svftool.numerics.random_matrix import (
    median_of_law,
    noise_bulk,
    optimal_hard_threshold,
    spectrum_snr,
)
from svftool.numerics.rounding import (
    coarser,
    precision_of,
    rounding_noise,
    spacing,
)

HALVES = [torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_spacing_is_the_distance_to_the_next_number(dtype: torch.dtype) -> None:
    values = torch.tensor([1.0, 1.5, 2.0, 3.9, 0.1, -0.3, 1e-3]).to(dtype)
    away = torch.nextafter(values.abs(), torch.full_like(values, torch.inf)).double()
    expected = away - values.abs().double()
    torch.testing.assert_close(spacing(values, dtype).double(), expected, rtol=0, atol=0)


def test_spacing_of_subnormal_numbers_is_the_smallest_one() -> None:
    tiny = torch.tensor([0.0, 2.0**-24, 2.0**-20])
    assert spacing(tiny, torch.float16).tolist() == [2.0**-24] * 3


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", [1.0, 0.02])
def test_rounding_error_and_its_edge_match_measured_rounding(
    dtype: torch.dtype, scale: float
) -> None:
    W = normal(300, 200) * scale
    E = W.to(dtype).double() - W
    noise = rounding_noise(W, dtype)
    assert math.sqrt(noise.energy) == pytest.approx(float(E.norm()), rel=0.02)
    assert 1.0 < noise.edge / float(torch.linalg.matrix_norm(E, ord=2)) < 1.15


def test_the_edge_of_uneven_noise_follows_its_loudest_rows() -> None:
    """Weights whose rows differ in size round unevenly: the even edge would be far too low."""
    W = normal(300, 200) * torch.logspace(0, -2, 300, dtype=torch.float64)[:, None]
    E = W.bfloat16().double() - W
    top = float(torch.linalg.matrix_norm(E, ord=2))
    noise = rounding_noise(W, torch.bfloat16)
    even = math.sqrt(noise.energy / W.numel()) * (math.sqrt(300) + math.sqrt(200))
    assert even < top < noise.edge


def test_the_noise_floor_of_bfloat16_is_what_the_docs_say() -> None:
    W = normal(400, 400)
    floor = math.sqrt(rounding_noise(W, torch.bfloat16).energy)
    assert floor / float(W.norm()) == pytest.approx(0.00166, rel=0.03)


def test_precision_is_that_of_the_values_not_of_the_file() -> None:
    W = normal(20, 20).float()
    assert precision_of(W) == torch.float32
    assert precision_of(W.bfloat16().float()) == torch.bfloat16
    assert precision_of(W.half().float()) == torch.float16
    assert precision_of(W.half()) == torch.float16
    assert coarser(torch.float16, torch.bfloat16) == torch.bfloat16


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.1])
def test_the_median_of_the_law_is_that_of_a_large_noise_matrix(beta: float) -> None:
    n = 1000
    values = torch.linalg.svdvals(normal(int(beta * n), n)).square() / n
    assert median_of_law(beta) == pytest.approx(float(values.median()), rel=0.02)


@pytest.mark.parametrize(("m", "n"), [(300, 300), (500, 120), (120, 500)])
def test_spikes_are_counted_and_the_noise_is_measured(m: int, n: int) -> None:
    noise = 0.3 * normal(m, n)
    u, v = (
        np.linalg.qr(normal(m, 3, seed=1).numpy())[0],
        np.linalg.qr(normal(n, 3, seed=2).numpy())[0],
    )
    edge = 0.3 * (math.sqrt(m) + math.sqrt(n))
    spiked = noise.numpy() + u * (2.0 * edge) @ v.T
    bulk = noise_bulk(np.linalg.svd(spiked, compute_uv=False), m, n)
    assert bulk.sigma == pytest.approx(0.3, rel=0.03)
    assert bulk.edge == pytest.approx(edge, rel=0.03)
    assert bulk.spikes == 3


def test_the_hard_threshold_has_the_published_constants() -> None:
    """Table IV of Gavish and Donoho gives omega(beta) to four digits."""
    ones = np.ones(5)
    for beta, omega in ((1.0, 2.858), (0.5, 2.1711), (0.1, 1.6089)):
        assert optimal_hard_threshold(ones, int(1000 * beta), 1000) == pytest.approx(
            omega, abs=2e-3
        )


def test_the_hard_threshold_recovers_a_rank() -> None:
    noise = normal(200, 300) / math.sqrt(300)
    u, v = (
        np.linalg.qr(normal(200, 4, seed=1).numpy())[0],
        np.linalg.qr(normal(300, 4, seed=2).numpy())[0],
    )
    s = np.linalg.svd(noise.numpy() + 5.0 * u @ v.T, compute_uv=False)
    assert int((s > optimal_hard_threshold(s, 200, 300)).sum()) == 4


def test_spectrum_snr_by_hand() -> None:
    s = np.array([10.0, 4.0, 3.0, 2.0, 1.0])
    threshold = (4.0 - 2.0) / 1.349 * 2.0  # square: 1 + sqrt(1)
    assert 2.0 < threshold < 3.0
    assert spectrum_snr(s, 5, 5) == pytest.approx((10 + 4 + 3) / (2 + 1) / 10)
    assert spectrum_snr(np.array([2.0, 2.0]), 2, 2) is None


@pytest.mark.parametrize("alpha", [2.0, 3.5])
def test_a_pareto_sample_gives_its_exponent_back(alpha: float) -> None:
    rng = np.random.default_rng(0)
    sample = (1.0 - rng.random(2000)) ** (-1.0 / (alpha - 1.0))
    fit = fit_power_law(sample)
    assert fit is not None
    assert abs(fit.alpha - alpha) < 4 * fit.sigma
    assert fit.distance < 0.04
    assert fit.sigma == pytest.approx((fit.alpha - 1) / math.sqrt(fit.count))


def test_the_tail_begins_where_the_power_law_does() -> None:
    rng = np.random.default_rng(1)
    tail = 5.0 * (1.0 - rng.random(1500)) ** (-1.0 / 1.5)
    fit = fit_power_law(np.concatenate([5.0 * rng.random(3000), tail]))
    assert fit is not None
    assert fit.xmin == pytest.approx(5.0, rel=0.15)
    assert fit.alpha == pytest.approx(2.5, rel=0.08)


def test_chunks_of_candidates_do_not_change_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = np.random.default_rng(2).pareto(2.0, 300) + 1
    whole = fit_power_law(sample)
    monkeypatch.setattr("svftool.numerics.power_law._CHUNK", 700)
    assert fit_power_law(sample) == whole


@pytest.mark.parametrize("values", [np.ones(100), np.arange(1.0, 10.0), np.zeros(50)])
def test_no_fit_where_there_is_nothing_to_fit(values: np.ndarray) -> None:
    assert fit_power_law(values) is None
