"""Numbers that WeightWatcher has too, against what it prints."""

from __future__ import annotations

import importlib.util

import pytest
from compare_weightwatcher import measure as watch
from compare_weightwatcher import weights

from svftool.auditing import choose_metrics
from svftool.auditing.metrics import measure
from svftool.auditing.pair import MatrixPair

# Printed by compare_weightwatcher.py with weightwatcher 0.7.7.
WATCHED = (
    {
        "alpha": 1.76,
        "alpha_weighted": 1.668,
        "log_alpha_norm": 1.79759,
        "log_norm": 1.38246,
        "log_spectral_norm": 0.94773,
        "alpha_distance": 0.0369853,
        "alpha_sigma": 0.0860525,
        "alpha_xmin": 0.0209737,
        "stable_rank": 2.72099,
        "matrix_entropy": 0.60659,
    },
    {
        "alpha": 1.74451,
        "alpha_weighted": 1.7189,
        "log_alpha_norm": 1.82088,
        "log_norm": 1.38224,
        "log_spectral_norm": 0.985319,
        "alpha_distance": 0.0445789,
        "alpha_sigma": 0.0817202,
        "alpha_xmin": 0.0183746,
        "stable_rank": 2.49415,
        "matrix_entropy": 0.592803,
    },
    {
        "alpha": 1.79003,
        "alpha_weighted": 1.66566,
        "log_alpha_norm": 1.80228,
        "log_norm": 1.36627,
        "log_spectral_norm": 0.930522,
        "alpha_distance": 0.0421239,
        "alpha_sigma": 0.101153,
        "alpha_xmin": 0.0308454,
        "stable_rank": 2.72737,
        "matrix_entropy": 0.630923,
    },
)


def ours() -> list[dict[str, float | None]]:
    metrics = choose_metrics(["all"])
    return [dict(measure(MatrixPair(weight), metrics).base) for weight in weights()]


@pytest.mark.parametrize("index", range(len(WATCHED)))
def test_the_numbers_are_weightwatchers(index: int) -> None:
    found = ours()[index]
    for name, value in WATCHED[index].items():
        assert found[name] == pytest.approx(value, rel=2e-4, abs=2e-6), name


@pytest.mark.skipif(
    importlib.util.find_spec("weightwatcher") is None, reason="weightwatcher is not installed"
)
@pytest.mark.filterwarnings("ignore")
def test_the_numbers_are_those_of_the_installed_version() -> None:
    for found, expected in zip(ours(), watch(), strict=True):
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=2e-4, abs=2e-6), name
