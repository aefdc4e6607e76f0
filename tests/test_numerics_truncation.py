"""Truncation with some slack: the error is the least one to 1e-6, whatever the spectrum."""

from __future__ import annotations

import pytest
import torch
from matrices import normal, with_spectrum
from torch import Tensor

from svftool.adapters.low_rank import truncate
from svftool.choices.adapters import parse_adapter_rank
from svftool.numerics import Slack, ThreadPool, decompose, svd
from svftool.numerics.tall import tall
from svftool.numerics.truncation import truncated_factors

K = 12
N = 400
SPECTRA = {
    "one over i": lambda i: 1 / (1 + i),
    "root": lambda i: (1 + i) ** -0.5,
    "geometric, into rounding of single precision": lambda i: 0.4**i + 1e-9,
    "step": lambda i: torch.where(i < 100, 1.0, 0.01),
    "step at the rank": lambda i: torch.where(i < K, 1.0, 0.01),
    "more all but equal ones than a block holds": lambda i: torch.where(
        i < 40, 1 - 1e-5 * i / 40, 0.1
    ),
    "the same, closer to the rest": lambda i: torch.where(
        i < 40, 1 - 1e-4 * i / 40, 0.5 / (1 + i / 100)
    ),
    "a few over a small flat rest": lambda i: torch.where(i < 6, 1 - i / 9, 1e-4),
    "rank above the one asked for": lambda i: torch.where(i < 3 * K, 1 / (1 + i), 0.0),
    "all equal": torch.ones_like,
    "one over i, huge": lambda i: 1e30 / (1 + i),
    "one over i, tiny": lambda i: 1e-30 / (1 + i),
}


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompose, "_LARGE", N)


def spectrum_of(name: str, m: int = N, n: int = N) -> Tensor:
    return normal(m, n) if name == "flat" else with_spectrum(m, n, SPECTRA[name]).float()


def least(D: Tensor, k: int) -> tuple[Tensor, Tensor, float]:
    U, S, Vh = torch.linalg.svd(D.double(), full_matrices=False)
    return U[:, :k] * S[:k].sqrt(), S[:k].sqrt()[:, None] * Vh[:k], float(S[k:].norm())


@pytest.mark.parametrize("name", ["flat", *SPECTRA])
def test_the_error_is_the_least_one(name: str) -> None:
    D = spectrum_of(name, *((700, 700) if name == "flat" else (N, N)))
    best = least(D, K)[2]
    with ThreadPool() as pool:
        found = truncated_factors(tall(D), K, Slack(), pool)
    assert found is not None
    small = tall(D)
    left = small.double(slice(None)) - found.U.double() * found.S @ found.V.double()
    rounding = 6e-8 * float(D.double().norm())  # of the factors, which are float32
    error = float(left.norm()) * 2.0**small.exponent
    assert error**2 <= best**2 * (1 + 2e-6) + rounding**2


@pytest.mark.parametrize("shape", [(N, 450), (450, N), (1500, N), (N, 1500), (30, 40), (5, 450)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["flat", "one over i"])
def test_stored_adapters_are_as_good_as_rounded_best_ones(
    name: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    D = spectrum_of(name, *shape)
    found = truncate("x", D, parse_adapter_rank(str(K)), dtype=dtype)
    assert found.layer is not None
    exact = float((D.double() - found.layer.change()).norm())
    assert found.rest == pytest.approx(exact, rel=1e-9)
    B, A, best = least(D, K)
    rounding = float((B.to(dtype).double() @ A.to(dtype).double() - B @ A).norm())
    assert found.rest**2 - best**2 <= 6 * rounding**2 + 2e-6 * best**2
    if dtype == torch.float32 and min(shape) > K:
        assert found.rest <= best * (1 + 1e-6)


def test_a_change_of_exactly_the_rank_leaves_rounding_alone() -> None:
    D = (normal(N, K) @ normal(K, 450, seed=1)).double()
    found = truncate("x", D, parse_adapter_rank(str(K)), dtype=torch.float32)
    assert found.error < 1e-7


def test_a_change_in_float64_is_left_as_it_is() -> None:
    D = normal(50, 40).double()
    before = D.clone()
    truncate("x", D, parse_adapter_rank("3"), dtype=torch.float32)
    assert torch.equal(D, before)


def test_ranks_below_the_changes_own_and_above_it() -> None:
    D = (normal(N, K) @ normal(K, 450, seed=1)).double()
    below = truncate("x", D, parse_adapter_rank(str(K - 4)), dtype=torch.float32)
    assert below.rest <= least(D, K - 4)[2] * (1 + 1e-6)
    above = truncate("x", D, parse_adapter_rank(str(K + 8)), dtype=torch.float32)
    assert above.error < 3e-7


def test_values_below_the_floor_are_not_waited_for() -> None:
    noise = normal(N, N, seed=2) * 1e-6
    D = normal(N, 6) @ normal(6, N, seed=1) + noise
    floor = 1.05 * float(torch.linalg.matrix_norm(noise, 2))
    with ThreadPool() as pool:
        found = truncated_factors(tall(D), K, Slack(floor=floor), pool)
    assert found is not None
    assert int((floor < found.S).sum()) == 6
    stored = truncate("x", D, parse_adapter_rank(str(K)), dtype=torch.float32, floor=floor)
    assert stored.floored
    B, A, best = least(D, 6)
    rounding = float((B.float().double() @ A.float().double() - B @ A).norm())
    assert stored.rest**2 <= best**2 * (1 + 2e-6) + 6 * rounding**2


def test_threads_do_not_change_a_bit_and_runs_repeat() -> None:
    D = spectrum_of("root", N, 550)
    results = []
    for workers in (0, 2, 2):
        with ThreadPool(workers) as pool:
            found = truncate("x", D, parse_adapter_rank(str(K)), dtype=torch.bfloat16, pool=pool)
        assert found.layer is not None
        results.append((found.rest, found.layer.B, found.layer.A))
    for other in results[1:]:
        assert other[0] == results[0][0]
        assert torch.equal(other[1], results[0][1])
        assert torch.equal(other[2], results[0][2])


def test_slack_is_used_where_it_is_given() -> None:
    D = spectrum_of("one over i")
    assert svd(D, rank=K, slack=Slack()).method == "truncated"
    assert svd(D, rank=K).method != "truncated"
    assert svd(D, rank=N // 4, slack=Slack()).method == "gram"
    assert svd(D[:200, :200], rank=K, slack=Slack()).method == "gram"


def test_more_slack_is_taken() -> None:
    """Without the test of what is missing, 1e-6 would hold by luck."""
    D = spectrum_of("root")
    best, errors = least(D, K)[2], []
    with ThreadPool() as pool:
        for excess in (1e-2, 1e-6):
            found = truncated_factors(tall(D), K, Slack(excess), pool)
            assert found is not None
            left = D.double() - found.U.double() * found.S @ found.V.double()
            errors.append(float(left.norm()) / best - 1)
    assert 1e-6 < errors[0] <= 1e-2
    assert errors[1] <= 1e-6


def test_a_hopeless_case_goes_to_the_exact_way() -> None:
    """Values that fall below what float64 squares can tell apart."""
    D = with_spectrum(N, N, lambda i: 0.1**i).float()
    with ThreadPool() as pool:
        assert truncated_factors(tall(D), K + 20, Slack(), pool) is None
    found = truncate("x", D, parse_adapter_rank(str(K + 20)), dtype=torch.float32)
    assert found.error < 3e-7
