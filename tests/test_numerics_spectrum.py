from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from svftool.errors import NumericalError
from svftool.numerics import (
    effective_rank,
    energy,
    energy_rank,
    nuclear_rank,
    numerical_rank,
    participation_ratio,
    stable_rank,
)

RANKS = (effective_rank, stable_rank, nuclear_rank, participation_ratio)
spectra = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30).map(
    lambda values: np.sort(np.array(values))[::-1]
)


@given(spectra)
def test_ranks_lie_between_one_and_the_number_of_values(s: np.ndarray) -> None:
    for rank in RANKS:
        assert 1 - 1e-9 <= rank(s) <= len(s) + 1e-9


@given(spectra, st.floats(1e-200, 1e200))
def test_ranks_do_not_depend_on_scale_and_do_not_overflow(s: np.ndarray, scale: float) -> None:
    for rank in RANKS:
        assert rank(s * scale) == pytest.approx(rank(s), rel=1e-9)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("k", [1, 5])
def test_equal_values_count_in_full_and_zeros_do_not(rank: object, k: int) -> None:
    s = np.concatenate([np.full(k, 3.0), np.zeros(4)])
    assert rank(s) == pytest.approx(k)
    assert rank(np.zeros(4)) == 0.0


def test_by_hand() -> None:
    s = np.array([2.0, 1.0])
    assert energy(s) == 5.0
    assert stable_rank(s) == 1.25
    assert nuclear_rank(s) == pytest.approx(9 / 5)
    assert participation_ratio(s) == pytest.approx(25 / 17)
    assert effective_rank(s) == pytest.approx(math.exp(math.log(3) - 2 / 3 * math.log(2)))


def test_numerical_rank_follows_the_dtype() -> None:
    s = np.array([1.0, 1e-4, 1e-9])
    assert numerical_rank(s, 100, 3) == 2
    assert numerical_rank(s, 100, 3, dtype=np.float64) == 3
    assert numerical_rank(s, 100, 3, dtype=np.float16) == 1
    assert numerical_rank(np.zeros(3), 3, 3) == 0


@given(spectra, st.floats(0.01, 1.0))
def test_energy_rank_is_the_smallest_that_keeps_the_share(s: np.ndarray, share: float) -> None:
    rank = energy_rank(s, share)
    total = np.sum(s**2)
    assert np.sum(s[:rank] ** 2) >= share * total * (1 - 1e-12)
    if rank > 1 and share < 1:
        assert np.sum(s[: rank - 1] ** 2) < share * total * (1 + 1e-12)


def test_energy_rank_of_zeros_keeps_all() -> None:
    assert energy_rank(np.zeros(3), 0.5) == 3


@pytest.mark.parametrize("function", [*RANKS, energy, lambda s: energy_rank(s, 0.5)])
def test_bad_spectra(function: object) -> None:
    with pytest.raises(NumericalError, match="NaN or infinity"):
        function(np.array([1.0, math.nan]))
    with pytest.raises(ValueError, match="one dimension"):
        function(np.ones((2, 2)))
