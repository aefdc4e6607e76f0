"""Decompositions, spectra and subspaces: arrays in, arrays out, no files, no modules."""

from __future__ import annotations

from svftool.numerics.decompose import Method, singular_values, svd
from svftool.numerics.results import Svd, fix_signs, reconstruct
from svftool.numerics.spectrum import (
    effective_rank,
    energy,
    energy_rank,
    nuclear_rank,
    numerical_rank,
    participation_ratio,
    stable_rank,
)
from svftool.numerics.tall import Rank
from svftool.numerics.threads import ThreadPool
from svftool.numerics.truncation import Slack

__all__ = [
    "Method",
    "Rank",
    "Slack",
    "Svd",
    "ThreadPool",
    "effective_rank",
    "energy",
    "energy_rank",
    "fix_signs",
    "nuclear_rank",
    "numerical_rank",
    "participation_ratio",
    "reconstruct",
    "singular_values",
    "stable_rank",
    "svd",
]
