"""Matrices that are hard on a singular value decomposition, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Spectrum = Callable[[Tensor], Tensor]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orthonormal(m: int, k: int, g: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(m, k, generator=g, dtype=torch.float64)).Q


def with_spectrum(m: int, n: int, spectrum: Spectrum, seed: int = 0) -> Tensor:
    """Return a float64 matrix with the singular values that `spectrum` makes of 0, 1, 2, ..."""
    g, k = generator(seed), min(m, n)
    values = spectrum(torch.arange(k, dtype=torch.float64))
    return orthonormal(m, k, g) * values @ orthonormal(n, k, g).mT


def normal(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=generator(seed))


def _duplicate_columns(m: int, n: int) -> Tensor:
    W = normal(m, n)
    W[:, 1::3] = W[:, :1]
    return W


def _zero_rows(m: int, n: int) -> Tensor:
    W = normal(m, n)
    W[(m + 2) // 3 :] = 0
    return W


def _single_entry(m: int, n: int) -> Tensor:
    W = torch.zeros(m, n)
    W[m // 2, n // 2] = -3.0
    return W


def _scaled(m: int, n: int, *, rows: bool) -> Tensor:
    side = torch.rand(m if rows else n, generator=generator(7))
    factor = 10.0 ** (-6.0 * side)
    return normal(m, n) * (factor[:, None] if rows else factor)


def _low_rank(m: int, n: int, rank: int) -> Tensor:
    return normal(m, rank) @ normal(rank, n, seed=1)


HARD: dict[str, Callable[[int, int], Tensor]] = {
    "random": normal,
    "low rank, rounded": lambda m, n: _low_rank(m, n, 3),
    "half rank, float64": lambda m, n: (
        _low_rank(m, n, 1).double()
        + with_spectrum(m, n, lambda i: torch.where(i < len(i) / 2, 1.0, 0.0))
    ),
    "two values": lambda m, n: with_spectrum(
        m, n, lambda i: torch.where(i < len(i) / 2, 2.0, 1.0)
    ).float(),
    "all equal": lambda m, n: with_spectrum(m, n, torch.ones_like).float(),
    "identity": lambda m, n: torch.eye(m, n),
    "graded to 1e-12": lambda m, n: with_spectrum(m, n, lambda i: 10.0 ** (-12 * i / len(i))),
    "graded to 1e-6": lambda m, n: with_spectrum(m, n, lambda i: 10.0 ** (-6 * i / len(i))).float(),
    "one over i": lambda m, n: with_spectrum(m, n, lambda i: 1 / (1 + i)).float(),
    "spike": lambda m, n: with_spectrum(m, n, lambda i: torch.where(i < 1, 1e6, 1.0)).float(),
    "cliff": lambda m, n: with_spectrum(
        m, n, lambda i: torch.where(i < len(i) / 2, 1.0, 1e-5)
    ).float(),
    "one tiny": lambda m, n: with_spectrum(
        m, n, lambda i: torch.where(i < len(i) - 1, 1.0, 1e-7)
    ).float(),
    "Hilbert": lambda m, n: 1.0 / (torch.arange(m)[:, None] + torch.arange(n) + 1.0),
    "ones": torch.ones,
    "duplicate columns": _duplicate_columns,
    "zero rows": _zero_rows,
    "single entry": _single_entry,
    "scaled rows": lambda m, n: _scaled(m, n, rows=True),
    "scaled columns": lambda m, n: _scaled(m, n, rows=False),
    "huge": lambda m, n: normal(m, n) * 1e30,
    "tiny": lambda m, n: normal(m, n) * 1e-30,
    "subnormal": lambda m, n: normal(m, n) * 1e-42,
    "beyond float32": lambda m, n: normal(m, n).double() * 1e200,
    "zero": torch.zeros,
}
