"""The reduction of a large symmetric matrix by way of a eigen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from svftool.numerics import eigen, lapack, singular_values
from svftool.numerics.threads import ThreadPool


def symmetric(n: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    G = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return G + G.mT


def values_by_band(G: Tensor, pool: ThreadPool) -> Tensor:
    upper = G.triu() + torch.full_like(G, torch.nan).tril(-1)
    return lapack.tridiagonal_values(*eigen.banded_tridiagonal(upper, pool))


@pytest.mark.parametrize("n", [1, 2, 3, 47, 48, 49, 50, 51, 97, 150, 512, 513, 700])
def test_values_are_those_of_lapack_whatever_the_size(n: int) -> None:
    G = symmetric(n)
    expected = np.linalg.eigvalsh(G.numpy())
    found = values_by_band(G, ThreadPool()).numpy()
    assert np.abs(found - expected).max() <= 1e-14 * np.sqrt(n) * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["zero", "diagonal", "rank one", "banded", "two blocks"])
def test_reflectors_that_have_nothing_to_do(kind: str) -> None:
    n = 200
    G = symmetric(n)
    G = {
        "zero": torch.zeros_like(G),
        "diagonal": torch.diag(G.diagonal()),
        "rank one": torch.outer(G[0], G[0]),
        "banded": G.triu(-20).tril(20),
        "two blocks": torch.block_diag(G[:120, :120], G[120:, 120:]),
    }[kind]
    expected = np.linalg.eigvalsh(G.numpy())
    found = values_by_band(G, ThreadPool()).numpy()
    assert np.abs(found - expected).max() <= 1e-13 * max(1.0, np.abs(expected).max())


def test_threads_do_not_change_a_bit() -> None:
    G = symmetric(1100)
    with ThreadPool(3) as pool:
        several = values_by_band(G, pool)
    with ThreadPool() as pool:
        assert torch.equal(values_by_band(G, pool), several)


def test_large_matrices_take_this_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eigen, "_LARGE", 64)
    monkeypatch.setattr(lapack, "tridiagonalise", None)
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(90, 70, generator=generator, dtype=torch.float64)
    expected = np.linalg.svd(W.numpy(), compute_uv=False)
    assert np.allclose(singular_values(W).numpy(), expected, rtol=1e-12)
