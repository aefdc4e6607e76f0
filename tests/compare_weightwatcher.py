"""Print what the package weightwatcher measures on the matrices of `test_audit_parity.py`.

    pip install weightwatcher && python tests/compare_weightwatcher.py

The constants there were printed by weightwatcher 0.7.7. It is no dependency of the tests: where it
is installed, they call `measure` of this file as well.
"""

from __future__ import annotations

import logging
import warnings

import numpy as np
import torch

SHAPES = ((120, 90), (90, 300), (300, 64))
NAMES = {
    "alpha": "alpha",
    "alpha_weighted": "alpha_weighted",
    "log_alpha_norm": "log_alpha_norm",
    "log_norm": "log_norm",
    "log_spectral_norm": "log_spectral_norm",
    "D": "alpha_distance",
    "sigma": "alpha_sigma",
    "xmin": "alpha_xmin",
    "stable_rank": "stable_rank",
    "entropy": "matrix_entropy",
}
"""Weightwatcher's columns, and svftool's names of the same numbers."""


def weights() -> list[torch.Tensor]:
    """Return matrices with heavy-tailed spectra, the same on every machine."""
    rng = np.random.default_rng(0)
    found = []
    for m, n in SHAPES:
        k = min(m, n)
        u, v = (np.linalg.qr(rng.standard_normal((side, k)))[0] for side in (m, n))
        s = 3.0 * np.arange(1, k + 1) ** -0.7 * np.exp(0.05 * rng.standard_normal(k))
        found.append(torch.from_numpy((u * s) @ v.T).float())
    return found


def measure() -> list[dict[str, float]]:
    """Return weightwatcher's numbers under svftool's names, one dictionary a matrix."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    import weightwatcher

    layers = []
    for weight in weights():
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight.data.copy_(weight)
        layers.append(layer)
    watcher = weightwatcher.WeightWatcher(model=torch.nn.Sequential(*layers))
    table = watcher.analyze(min_evals=10)
    return [
        {ours: float(row[theirs]) for theirs, ours in NAMES.items()} for _, row in table.iterrows()
    ]


if __name__ == "__main__":
    for numbers in measure():
        print({name: float(f"{value:.6g}") for name, value in numbers.items()})
