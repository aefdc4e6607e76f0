from __future__ import annotations

import math

import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import HARD, normal, with_spectrum
from torch import Tensor

from svftool.errors import NumericalError
from svftool.numerics import (
    Svd,
    ThreadPool,
    decompose,
    eigen,
    fix_signs,
    lapack,
    reconstruct,
    singular_values,
    svd,
)
from svftool.numerics.tall import ALL, Tall
from svftool.numerics.threads import one_thread

RECONSTRUCTION, ORTHOGONALITY, VALUES = 1e-6, 1e-5, 1e-6


def errors(W: Tensor, result: Svd) -> tuple[float, float, float]:
    """Return the true reconstruction, orthogonality and singular value errors in float64."""
    wide = W.double()
    scale = float(wide.abs().max()) or 1.0
    wide = wide / scale
    U, S, Vh = result.U.double(), result.S.double() / scale, result.Vh.double()
    norm = float(torch.linalg.vector_norm(wide)) or 1.0
    eye = torch.eye(len(S), dtype=torch.float64)
    expected = scipy.linalg.svdvals(wide.numpy())
    off = (S - torch.from_numpy(expected[: len(S)])).abs().max() / (expected[0] or 1.0)
    return (
        float(torch.linalg.vector_norm(wide - U * S @ Vh)) / norm,
        max(float((U.mT @ U - eye).abs().max()), float((Vh @ Vh.mT - eye).abs().max())),
        float(off),
    )


def assert_within_bounds(W: Tensor, result: Svd) -> None:
    reconstruction, orthogonality, values = errors(W, result)
    assert reconstruction <= RECONSTRUCTION
    assert orthogonality <= ORTHOGONALITY
    assert values <= VALUES
    assert (result.S[1:] <= result.S[:-1]).all()
    assert (result.S >= 0).all()


def test_the_bounds_can_be_missed() -> None:
    W = normal(20, 10)
    result = svd(W)
    spoiled = Svd(result.U * (1 + 2e-6), result.S, result.Vh, "", 0.0, 0.0)
    with pytest.raises(AssertionError):
        assert_within_bounds(W, spoiled)


@pytest.mark.parametrize("shape", [(150, 60), (60, 150), (90, 90)])
@pytest.mark.parametrize("kind", HARD)
def test_hard_matrices(kind: str, shape: tuple[int, int]) -> None:
    W = HARD[kind](*shape)
    result = svd(W)
    assert_within_bounds(W, result)
    assert result.method in ("zero", "gram", "gram64")
    assert result.U.dtype == result.Vh.dtype == torch.float32
    assert result.energy == 1.0
    reconstruction, orthogonality, _ = errors(W, result)
    assert result.reconstruction_error >= reconstruction / 3
    assert result.orthogonality_error >= 0.9 * orthogonality


@pytest.mark.parametrize("kind", HARD)
def test_values_of_hard_matrices(kind: str) -> None:
    W = HARD[kind](70, 40)
    wide = W.double()
    expected = torch.from_numpy(scipy.linalg.svdvals(wide.numpy() / (wide.abs().max().item() or 1)))
    found = singular_values(W)
    assert found.dtype == torch.float64
    assert (found[1:] <= found[:-1]).all()
    top = wide.abs().max()
    assert float((found / (top or 1.0) - expected).abs().max()) <= VALUES * float(expected[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("m", [1, 2, 7])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_small_shapes_and_dtypes(m: int, n: int, dtype: torch.dtype) -> None:
    W = normal(m, n, seed=m * 10 + n).to(dtype)
    before = W.clone()
    result = svd(W)
    assert_within_bounds(W, result)
    assert (result.U.shape, result.Vh.shape) == ((m, min(m, n)), (min(m, n), n))
    assert result.S.dtype == torch.float32
    assert torch.equal(W, before)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    result = svd(torch.zeros(shape))
    assert (result.U.shape, result.Vh.shape) == ((shape[0], 0), (0, shape[1]))
    assert singular_values(torch.zeros(shape)).shape == (0,)


sides = st.integers(1, 40)


@given(m=sides, n=sides, decades=st.floats(0, 14), exponent=st.integers(-25, 25), seed=sides)
def test_any_shape_grade_and_scale(
    m: int, n: int, decades: float, exponent: int, seed: int
) -> None:
    W = with_spectrum(m, n, lambda i: 10.0 ** (exponent - decades * i / len(i)), seed)
    assert_within_bounds(W, svd(W))


@given(m=sides, n=sides, rank=sides, seed=sides)
def test_any_rank_deficiency(m: int, n: int, rank: int, seed: int) -> None:
    W = normal(m, rank, seed) @ normal(rank, n, seed + 1)
    assert_within_bounds(W, svd(W))


@given(m=sides, n=sides, seed=sides)
def test_transpose_swaps_the_factors(m: int, n: int, seed: int) -> None:
    W = normal(m, n, seed)
    torch.testing.assert_close(svd(W).S, svd(W.mT).S, rtol=1e-6, atol=1e-7)
    assert_within_bounds(W.mT, svd(W.mT))


def test_parity_with_scipy_in_float64() -> None:
    W = normal(50, 30).double()
    U, S, Vh = (torch.from_numpy(part) for part in scipy.linalg.svd(W.numpy(), full_matrices=False))
    result = svd(W, dtype=torch.float64)
    assert result.method == "lapack64"
    U, Vh = fix_signs(U, Vh)
    torch.testing.assert_close(result.U, U, rtol=0, atol=1e-12)
    torch.testing.assert_close(result.S, S, rtol=1e-13, atol=0)
    torch.testing.assert_close(result.Vh, Vh, rtol=0, atol=1e-12)


def test_views_and_expanded_tensors() -> None:
    base = normal(40, 60)
    for W in (base.mT, base[::2, 3:40:3], base[:, :1].expand(40, 9), base.double()[1::3].mT):
        assert_within_bounds(W, svd(W))


def test_largest_entry_of_each_left_vector_is_positive() -> None:
    for W in (normal(30, 12), normal(12, 30)):
        U = svd(W).U
        assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()


def test_fix_signs_keeps_the_product_and_is_stable() -> None:
    result = svd(normal(9, 6))
    flips = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0, 1.0])
    U, Vh = fix_signs(result.U * flips, result.Vh * flips[:, None])
    assert torch.equal(U, result.U)
    assert torch.equal(Vh, result.Vh)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite(bad: float) -> None:
    W = normal(6, 5)
    W[2, 1] = W[3, 3] = bad
    for call in (svd, singular_values):
        with pytest.raises(NumericalError, match="2 of 30 entries are NaN or infinite"):
            call(W)


def test_misuse() -> None:
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        svd(torch.ones(3))
    with pytest.raises(ValueError, match="rank is 0"):
        svd(torch.ones(3, 3), rank=0)


# The ladder


def test_a_first_rung_that_misses_the_bound_leads_to_the_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which matrices the first one misses depends on the order in which a processor sums."""
    first = iter([(2e-6, 0.0)])
    original = decompose.measure
    monkeypatch.setattr(decompose, "measure", lambda *a: next(first, None) or original(*a))
    W = torch.ones(600, 300)
    result = svd(W)
    assert result.method == "gram64"
    assert_within_bounds(W, result)


def test_structured_sums_stay_within_bounds_on_whatever_rung() -> None:
    W = torch.ones(600, 300)
    assert_within_bounds(W, svd(W))


def test_no_convergence_takes_the_last_rung(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise lapack.NotConverged("dstedc returned 3")

    for module in ("gram", "decompose"):
        monkeypatch.setattr(f"svftool.numerics.{module}.eigenvectors", fail, raising=False)
    monkeypatch.setattr(decompose, "eigenvalues", fail)
    for W in (normal(30, 20), normal(20, 30)):
        result = svd(W)
        assert result.method == "lapack64"
        assert_within_bounds(W, result)
        torch.testing.assert_close(singular_values(W).float(), result.S)


def test_factors_that_miss_a_bound_are_not_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompose, "measure", lambda *_: (2e-6, 0.0))
    with pytest.raises(NumericalError, match=r"reconstruction error 2.0e-06 .* expected 1e-06"):
        svd(normal(5, 4))
    monkeypatch.setattr(decompose, "measure", lambda *_: (0.0, 2e-5))
    with pytest.raises(NumericalError, match=r"orthogonality error 2.0e-05"):
        svd(normal(5, 4))


@pytest.mark.parametrize("spoil", ["U", "S", "V"])
def test_spoiled_factors_are_noticed(monkeypatch: pytest.MonkeyPatch, spoil: str) -> None:
    honest = decompose._RUNGS[0][1]

    def rung(*arguments: object) -> object:
        factors = honest(*arguments)
        getattr(factors, spoil)[..., 2] *= 1.001
        return factors

    monkeypatch.setattr(decompose, "_RUNGS", (("spoiled", rung), *decompose._RUNGS[-1:]))
    for W in (normal(200, 150), normal(30, 60)):
        assert svd(W).method == "lapack64"


@pytest.mark.parametrize("kind", HARD)
def test_the_way_of_other_devices(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU blocks are large and the eigensolver is torch's own."""
    monkeypatch.setattr(lapack, "available", lambda: False)
    monkeypatch.setattr(Tall, "on_cpu", False)
    W = HARD[kind](60, 40)
    assert_within_bounds(W, svd(W))
    torch.testing.assert_close(singular_values(W), svd(W).S.double(), rtol=1e-6, atol=float("inf"))


def test_lapack_parts_agree_with_scipy() -> None:
    G = normal(70, 70).double()
    G = G @ G.mT
    d, e, _ = lapack.tridiagonalise(G.clone())
    tridiagonal = torch.diag(d) + torch.diag(e, 1) + torch.diag(e, -1)
    expected = torch.from_numpy(scipy.linalg.eigvalsh(G.numpy()))
    torch.testing.assert_close(torch.linalg.eigvalsh(tridiagonal), expected)
    torch.testing.assert_close(lapack.tridiagonal_values(d, e), expected)
    values, rows = lapack.tridiagonal_vectors(d, e)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(
        rows @ tridiagonal @ rows.mT, torch.diag(expected), atol=1e-10, rtol=0
    )
    torch.testing.assert_close(lapack.largest_vectors(d, e, 5).abs(), rows[-5:].abs())
    with pytest.raises(lapack.NotConverged, match="dsterf returned"):
        lapack.tridiagonal_values(torch.full((3,), math.nan, dtype=torch.float64), e[:2])


def test_eigenvectors_of_a_matrix_that_is_already_tridiagonal() -> None:
    """Reflectors with tau = 0 are identities, not divisions by zero."""
    G = torch.diag(torch.arange(300.0, dtype=torch.float64) + 1)
    with ThreadPool(1) as pool:
        values, rows = eigen.eigenvectors(G.clone(), ALL, pool)
    torch.testing.assert_close(values, G.diagonal().flip(0))
    torch.testing.assert_close(rows.abs(), torch.eye(300, dtype=torch.float64).flip(0))


# Truncation and batches


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (30, 21)])
def test_truncation(shape: tuple[int, int]) -> None:
    """A third of the values or less are found by themselves, more of them with all others."""
    W = normal(*shape)
    full, kept = svd(W), svd(W, rank=7)
    torch.testing.assert_close(kept.U, full.U[:, :7], rtol=0, atol=1e-5)
    torch.testing.assert_close(kept.S, full.S[:7])
    left = W - reconstruct(kept.U, kept.S, kept.Vh)
    expected = float(left.norm() / W.norm())
    assert kept.reconstruction_error == pytest.approx(expected, rel=1e-5)
    assert kept.energy == pytest.approx(1 - expected**2, rel=1e-5)
    assert kept.rank == 7


def test_rank_from_the_spectrum() -> None:
    W = normal(25, 40)
    seen: list[Tensor] = []

    def choose(S: Tensor) -> int:
        seen.append(S)
        return int((S[0] / 2 < S).sum())

    result = svd(W, rank=choose)
    expected = torch.linalg.svdvals(W.double())
    torch.testing.assert_close(seen[0], expected, rtol=1e-9, atol=0)
    assert result.rank == int((expected > expected[0] / 2).sum())


def test_batch_is_its_matrices() -> None:
    W = torch.stack([normal(12, 7), torch.zeros(12, 7), normal(12, 7, seed=3)]).to(torch.bfloat16)
    result = svd(W)
    assert result.method == "gram+zero"
    for index, one in enumerate(W):
        alone = svd(one)
        for part in ("U", "S", "Vh"):
            assert torch.equal(getattr(result, part)[index], getattr(alone, part))
        assert torch.equal(singular_values(W)[index], singular_values(one))
    assert svd(W, rank=3).U.shape == (3, 12, 3)
    asked: list[torch.Size] = []
    svd(W, rank=lambda S: asked.append(S.shape) or 2)
    assert asked == [(3, 7)]


def test_number_of_threads_does_not_change_a_bit() -> None:
    W = normal(1300, 1040)  # above 1024, so that every step has several blocks
    results = []
    for workers in (0, 3):
        with ThreadPool(workers) as pool:
            results.append(svd(W, pool=pool))
    for part in ("U", "S", "Vh"):
        assert torch.equal(*(getattr(result, part) for result in results))


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    with pytest.raises(NumericalError):
        svd(torch.full((700, 700), math.nan))
    assert torch.get_num_threads() == before
