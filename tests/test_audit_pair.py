"""The kernel against numpy in float64, on every shape, and on what it must give exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from svftool.auditing.pair import MatrixPair
from svftool.auditing.spectral import SpectralPair
from svftool.numerics import ThreadPool
from svftool.numerics.shares import change_shares
from svftool.numerics.subspace import principal_angles

SHAPES = [(2, 2), (5, 3), (3, 5), (40, 40), (64, 30), (30, 64)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def both(
    m: int, n: int, dtype: torch.dtype, size: float = 0.1
) -> tuple[torch.Tensor, torch.Tensor]:
    W = normal(m, n).to(dtype)
    return W, (W.double() + size * normal(m, n, seed=1)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_everything_agrees_with_numpy(m: int, n: int, dtype: torch.dtype) -> None:
    W, T = both(m, n, dtype)
    pair = MatrixPair(W, T)
    w, t = W.double().numpy(), T.double().numpy()
    u, s, vh = np.linalg.svd(w, full_matrices=False)
    u2, s2, vh2 = np.linalg.svd(t, full_matrices=False)
    tolerance = {"atol": 2e-7 * s[0], "rtol": 0}
    np.testing.assert_allclose(pair.base, s, **tolerance)
    np.testing.assert_allclose(pair.tuned, s2, **tolerance)
    np.testing.assert_allclose(
        pair.change_values, np.linalg.svd(t - w, compute_uv=False), **tolerance
    )
    assert pair.change_energy == pytest.approx(((t - w) ** 2).sum(), rel=1e-6)
    assert pair.inner == pytest.approx((w * t).sum(), rel=1e-6)
    np.testing.assert_allclose(pair.along, np.diag(u.T @ (t - w) @ vh.T), **tolerance)
    shares = change_shares(*(torch.from_numpy(x) for x in (u, s, vh)), torch.from_numpy(t - w))
    assert shares is not None
    assert pair.shares is not None
    for name, value in vars(shares).items():
        assert getattr(pair.shares, name) == pytest.approx(value, abs=1e-6), name
    count = min(10, m, n)
    for overlaps, mine, theirs in (
        (pair.left_overlaps, u, u2),
        (pair.right_overlaps, vh.T, vh2.T),
    ):
        assert overlaps is not None
        expected = np.abs(mine.T @ theirs[:, :count])
        np.testing.assert_allclose(overlaps.abs().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize(("m", "n"), [(40, 40), (64, 30), (30, 64)])
def test_bases_span_the_leading_subspaces(m: int, n: int, left: bool) -> None:
    W, T = both(m, n, torch.float64)
    found = MatrixPair(W, T).bases(4, left=left)
    assert found is not None
    for basis, matrix in zip(found, (W, T), strict=True):
        U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
        expected = U[:, :4] if left else Vh[:4].mT
        assert float(principal_angles(basis, expected).max()) < 1e-9


def test_many_blocks_and_threads_change_nothing() -> None:
    W, T = both(5000, 40, torch.float32)
    with ThreadPool(2) as pool:
        spread = MatrixPair(W, T, pool=pool)
        assert spread.shares is not None
        plain = MatrixPair(W, T)
        assert plain.shares is not None
        np.testing.assert_array_equal(spread.base, plain.base)
        assert spread.shares == plain.shares


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_identity_is_exact(dtype: torch.dtype) -> None:
    W = normal(30, 20).to(dtype)
    pair = MatrixPair(W, W.clone())
    assert pair.identical
    assert pair.change_energy == 0.0
    assert pair.shares is None
    np.testing.assert_array_equal(pair.base, pair.tuned)
    assert not pair.index_change.any()


def test_the_same_values_in_another_dtype_are_the_identity() -> None:
    W = normal(30, 20).bfloat16()
    assert MatrixPair(W, W.float()).identical


def test_a_change_that_is_known_exactly_is_not_rounded() -> None:
    """The difference of two bfloat16 weights has lost what an adapter's change still has."""
    W, D = normal(40, 30).bfloat16(), 1e-5 * normal(40, 30, seed=1)
    pair = MatrixPair(W, change=D)
    assert pair.change_energy == pytest.approx(float(D.square().sum()), rel=1e-9)
    assert MatrixPair(W, (W + D).bfloat16()).change_energy != pytest.approx(
        float(D.square().sum()), rel=0.1
    )


def test_values_alone_compute_no_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("singular vectors were computed")

    monkeypatch.setattr("svftool.auditing.pair.eigenvectors", refuse)
    W, T = both(20, 30, torch.float32)
    pair = MatrixPair(W, T, vectors=False)
    np.testing.assert_allclose(pair.base, np.linalg.svd(W.double(), compute_uv=False), rtol=1e-6)
    np.testing.assert_allclose(pair.tuned, np.linalg.svd(T.double(), compute_uv=False), rtol=1e-6)
    assert pair.shares is None
    assert pair.left_overlaps is None
    with pytest.raises(AssertionError, match="were computed"):
        _ = MatrixPair(W, T).shares


@pytest.mark.parametrize(("m", "n"), [(40, 40), (64, 30), (30, 64)])
def test_a_tuned_file_and_its_merged_weight_give_the_same_numbers(m: int, n: int) -> None:
    U, S, Vh = torch.linalg.svd(normal(m, n), full_matrices=False)
    after = S * (1 + 0.3 * normal(len(S), seed=3))
    spectral = SpectralPair(S, after, m=m, n=n)
    dense = MatrixPair((U * S) @ Vh, (U * after) @ Vh)
    np.testing.assert_allclose(spectral.base, dense.base, atol=1e-6)
    assert spectral.tuned is not None
    np.testing.assert_allclose(spectral.tuned, dense.tuned, atol=1e-6)
    for name in ("base_energy", "tuned_energy", "change_energy", "inner"):
        assert getattr(spectral, name) == pytest.approx(getattr(dense, name), rel=1e-7)
    assert dense.shares is not None
    assert dense.shares.svf == pytest.approx(1.0, abs=1e-9)
    assert spectral.left_overlaps is not None
    assert dense.left_overlaps is not None
    torch.testing.assert_close(spectral.left_overlaps, dense.left_overlaps.abs(), atol=1e-6, rtol=0)
    assert spectral.cka == pytest.approx(dense.cka)
    assert spectral.amplification == pytest.approx(dense.amplification)


@pytest.mark.parametrize(("m", "n"), [(8, 8), (12, 8), (8, 12)])
def test_a_rank_deficient_base_agrees_with_its_factors(m: int, n: int) -> None:
    W = normal(m, 3) @ normal(3, n, seed=1)
    T = W + normal(m, n, seed=2)
    pair = MatrixPair(W, T)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    expected = change_shares(U, S, Vh, T - W)
    assert expected is not None
    assert pair.shares is not None
    for name, value in vars(expected).items():
        assert getattr(pair.shares, name) == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("shape", [(96, 256), (256, 96), (7, 5), (300, 300)])
@pytest.mark.parametrize("vectors", [True, False])
def test_a_weight_of_zeros_has_no_energy_in_whatever_order_is_summed(
    shape: tuple[int, int], vectors: bool
) -> None:
    W = torch.randn(*shape, generator=torch.Generator().manual_seed(3))
    zeroed = MatrixPair(W, torch.zeros_like(W), vectors=vectors)
    assert zeroed.tuned_energy == 0.0
    tiny = MatrixPair(W, W * 1e-6, vectors=vectors)
    assert tiny.tuned_energy == pytest.approx(1e-12 * tiny.base_energy, rel=1e-6)
    cancelled = MatrixPair(W, change=-W.double(), vectors=vectors)
    assert cancelled.tuned_energy == 0.0
