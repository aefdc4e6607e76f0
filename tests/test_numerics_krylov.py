from __future__ import annotations

import pytest
import torch
from matrices import normal, with_spectrum
from torch import Tensor

from svftool.numerics import ThreadPool, singular_values, svd
from svftool.numerics.krylov import BLOCK, VALUES_BOUND, krylov_factors
from svftool.numerics.tall import tall

K = 24
SPECTRA = {
    "one over i": lambda i: 1 / (1 + i),
    "root": lambda i: (1 + i) ** -0.5,
    "geometric": lambda i: 0.8**i,
    "spikes over a flat rest": lambda i: torch.where(i < 10, 50 / (1 + i), 1.0),
    "40 equal ones at the top": lambda i: torch.where(i < 40, 2.0, 1.0),
    "rank 10": lambda i: torch.where(i < 10, 1 / (1 + i), 0.0),
    "all equal": torch.ones_like,
}


@pytest.fixture(scope="module", params=SPECTRA)
def matrix(request: pytest.FixtureRequest) -> Tensor:
    return with_spectrum(900, 1000, SPECTRA[request.param]).float()


def largest_error(S: Tensor, W: Tensor) -> float:
    expected = singular_values(W)
    return float((S - expected[: len(S)]).abs().max() / expected[0])


def test_values_are_as_good_as_said(matrix: Tensor) -> None:
    result = svd(matrix, rank=K, method="randomized")
    assert result.method == "krylov"
    error = largest_error(result.S, matrix)
    assert error <= VALUES_BOUND
    assert error <= result.values_error + 2e-7  # float32 rounding of S itself
    assert result.values_error <= VALUES_BOUND
    assert (result.S[1:] <= result.S[:-1]).all()


def test_factors_are_the_best_of_their_rank(matrix: Tensor) -> None:
    result = svd(matrix, rank=K, method="randomized")
    eye = torch.eye(K, dtype=torch.float64)
    U, S, Vh = result.U.double(), result.S.double(), result.Vh.double()
    assert float((U.mT @ U - eye).abs().max()) <= 1e-5
    assert float((Vh @ Vh.mT - eye).abs().max()) <= 1e-5
    wide = matrix.double()
    left = float(torch.linalg.vector_norm(wide - U * S @ Vh) / torch.linalg.vector_norm(wide))
    values = singular_values(matrix)
    best = float((values[K:].square().sum() / values.square().sum()).sqrt())
    assert left <= best + 1e-6
    assert result.reconstruction_error == pytest.approx(left, rel=1e-4, abs=1e-6)
    assert (result.U.gather(0, result.U.abs().argmax(0, keepdim=True)) > 0).all()


def test_more_equal_values_than_a_block_holds() -> None:
    """One random block can only see BLOCK of them; the second one brings up the others."""
    W = with_spectrum(900, 900, lambda i: torch.where(i < BLOCK + 20, 2.0, 1.0 / (1 + i))).float()
    result = svd(W, rank=BLOCK + 15, method="randomized")
    assert result.method == "krylov"
    assert largest_error(result.S, W) <= VALUES_BOUND


def test_a_small_space_is_worse_and_is_refused() -> None:
    W = normal(600, 500)
    with ThreadPool() as pool:
        assert krylov_factors(tall(W), K, pool, limit=200) is None
    result = svd(W, rank=K, method="randomized")
    assert result.method in ("krylov", "gram")
    assert largest_error(result.S, W) <= VALUES_BOUND


def test_without_iterating_it_would_be_worse() -> None:
    W = with_spectrum(900, 1000, SPECTRA["root"]).float()
    basis = torch.linalg.qr(W @ torch.randn(1000, 4 * BLOCK)).Q
    sketch = torch.linalg.svdvals(basis.mT @ W)[:K]
    assert largest_error(sketch, W) > 100 * VALUES_BOUND
    assert largest_error(svd(W, rank=K, method="randomized").S, W) <= VALUES_BOUND


def test_seed_and_threads() -> None:
    W = with_spectrum(900, 1100, SPECTRA["root"]).float()
    results = []
    for workers, seed in ((0, 1), (2, 1), (0, 2)):
        with ThreadPool(workers) as pool:
            results.append(svd(W, rank=K, method="randomized", seed=seed, pool=pool))
    assert torch.equal(results[0].U, results[1].U)
    assert not torch.equal(results[0].U, results[2].U)
    torch.testing.assert_close(results[0].S, results[2].S, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 2.0**-90])
def test_dtypes_and_scale(dtype: torch.dtype, scale: float) -> None:
    if dtype == torch.float16 and scale != 1.0:
        scale = 2.0**-8
    W = (with_spectrum(640, 700, SPECTRA["one over i"]) * scale).to(dtype)
    result = svd(W, rank=12, method="randomized")
    assert result.method == "krylov"
    assert largest_error(result.S, W) <= VALUES_BOUND


def test_auto_iterates_only_where_the_rank_is_small() -> None:
    W = with_spectrum(800, 900, SPECTRA["one over i"]).float()
    assert svd(W, rank=16).method == "krylov"
    assert svd(W, rank=16, method="exact").method == "gram"
    assert svd(W, rank=200).method == "gram"
    assert svd(W[:200, :300], rank=4).method == "gram"
    assert svd(W).method == "gram"
