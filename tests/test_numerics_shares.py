from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from svftool.numerics.shares import NEAR_EQUAL, change_shares, count_regular, groups

SHAPES = [(7, 7), (9, 5), (5, 9), (64, 40), (40, 64)]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(n: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(normal(n, n, seed=seed))[0]


def factors(W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U, S, Vh


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_shares_agree_with_numpy_and_sum_to_one(m: int, n: int) -> None:
    W, D = normal(m, n), normal(m, n, seed=1)
    shares = change_shares(*factors(W), D)
    u, _, vh = np.linalg.svd(W.numpy(), full_matrices=False)
    N, total = u.T @ D.numpy() @ vh.T, float((D**2).sum())
    assert shares is not None
    assert shares.svf == pytest.approx((np.diag(N) ** 2).sum() / total, abs=1e-12)
    assert shares.off_diagonal == pytest.approx(
        ((N**2).sum() - (np.diag(N) ** 2).sum()) / total, abs=1e-12
    )
    assert shares.svf + shares.off_diagonal + shares.out_of_span == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_each_kind_of_change_lands_in_its_own_share(m: int, n: int) -> None:
    W = normal(m, n)
    U, S, Vh = factors(W)
    k = len(S)
    spectrum = change_shares(U, S, Vh, (U * normal(k, seed=2)) @ Vh)
    inside = change_shares(U, S, Vh, U[:, :1] @ Vh[1:2])
    assert spectrum is not None
    assert inside is not None
    assert spectrum.svf == pytest.approx(1.0, abs=1e-12)
    assert inside.off_diagonal == pytest.approx(1.0, abs=1e-12)
    if m != n:
        away = normal(max(m, n), 1, seed=3)
        span = U if m > n else Vh.mT
        away = away - span @ (span.mT @ away)
        D = away @ Vh[:1] if m > n else U[:, :1] @ away.mT
        outside = change_shares(U, S, Vh, D)
        assert outside is not None
        assert outside.out_of_span == pytest.approx(1.0, abs=1e-12)


def test_no_change_has_no_shares() -> None:
    W = normal(4, 3)
    assert change_shares(*factors(W), torch.zeros(4, 3)) is None


@pytest.mark.parametrize(("m", "n"), [(12, 12), (16, 12), (12, 16)])
def test_repeated_singular_values_count_as_one_block(m: int, n: int) -> None:
    """Any basis of a repeated group is as good: a tune in another one still changes values only."""
    k = min(m, n)
    U, Vh = rotation(m)[:, :k], rotation(n, seed=1)[:k]
    S = torch.cat([torch.full((4,), 3.0), torch.linspace(2.0, 1.0, k - 4)]).double()
    turn = torch.block_diag(rotation(4, seed=5), torch.eye(k - 4, dtype=torch.float64))
    D = (U @ turn * normal(k, seed=6)) @ (turn.mT @ Vh)
    blocks = change_shares(U, S, Vh, D)
    naive = change_shares(U, S, Vh, D, near_equal=0.0)
    assert blocks is not None
    assert naive is not None
    assert blocks.svf == pytest.approx(1.0, abs=1e-12)
    # Control: with `near_equal` 0 equal values still form a group, slightly split ones do not.
    split = S + torch.linspace(1e-7, 0.0, k)
    single = change_shares(U, split, Vh, D, near_equal=0.0)
    assert single is not None
    assert single.svf < 0.95
    assert naive.svf == pytest.approx(1.0, abs=1e-12)


def test_a_block_does_not_claim_an_antisymmetric_change() -> None:
    """Turning left against right vectors of a repeated group is no change of singular values."""
    eye = torch.eye(2, dtype=torch.float64)
    shares = change_shares(eye, torch.ones(2), eye, torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    assert shares is not None
    assert shares.svf == 0.0
    assert shares.off_diagonal == 1.0


def test_a_change_between_null_spaces_could_have_been_made_by_svf() -> None:
    """A zero matrix has no singular vectors of its own; any change of it has some."""
    for m, n in ((6, 6), (6, 4), (4, 6)):
        U, S, Vh = factors(torch.zeros(m, n, dtype=torch.float64))
        shares = change_shares(U, S, Vh, normal(m, n))
        assert shares is not None
        assert shares.svf == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(("m", "n"), [(20, 20), (30, 20), (20, 30)])
def test_a_rank_deficient_base_gives_the_same_shares_for_any_null_basis(m: int, n: int) -> None:
    W, D, k = normal(m, 5) @ normal(5, n, seed=1), normal(m, n, seed=2), min(m, n)
    U, S, Vh = factors(W)
    left, right = rotation(k - 5, seed=3), rotation(k - 5, seed=4)
    turned = change_shares(
        torch.cat([U[:, :5], U[:, 5:] @ left], dim=1), S, torch.cat([Vh[:5], right @ Vh[5:]]), D
    )
    plain = change_shares(U, S, Vh, D)
    assert plain is not None
    assert turned is not None
    for a, b in zip(vars(plain).values(), vars(turned).values(), strict=True):
        assert a == pytest.approx(b, abs=1e-10)


def test_groups_chain_neighbours_only() -> None:
    S = torch.tensor([1.0, 1.0 - NEAR_EQUAL / 2, 1.0 - NEAR_EQUAL, 0.5])
    assert groups(S.double()) == [(0, 3), (3, 4)]
    assert groups(torch.zeros(0)) == []
    assert count_regular(torch.tensor([1.0, 0.5, 1e-6, 0.0])) == 2
    assert count_regular(torch.zeros(3)) == 0


def test_rounding_pulls_the_share_down_as_documented() -> None:
    """A 0.1 % spectral change stored in bfloat16 is half rounding noise; 1 % is hardly touched."""
    W = normal(256, 256).bfloat16().double() / 16
    U, S, Vh = factors(W)
    found = []
    for size in (1e-3, 1e-2):
        tuned = (W + (U * (S * size * normal(256, seed=7))) @ Vh).bfloat16().double()
        shares = change_shares(U, S, Vh, tuned - W)
        assert shares is not None
        found.append(shares.svf)
    assert 0.2 < found[0] < 0.6
    assert found[1] > 0.95


def test_a_random_change_has_the_share_of_chance() -> None:
    W, D = normal(300, 200), normal(300, 200, seed=1)
    shares = change_shares(*factors(W), D)
    assert shares is not None
    assert shares.svf == pytest.approx(1 / 300, rel=0.5)
    assert shares.out_of_span == pytest.approx(1 / 3, rel=0.1)
    assert math.isclose(sum(vars(shares).values()), 1.0)
