"""Many decompositions: what they cost, who does them, how they run, and rank rules."""

from __future__ import annotations

from svftool.choices.ranks import FULL, RankRule, parse_rank
from svftool.engine.plan import (
    PROCESS_BYTES,
    Job,
    budget,
    job_bytes,
    parts,
    peak_memory,
    seconds,
    share,
)
from svftool.engine.run import run_layers, run_svds, run_values

__all__ = [
    "FULL",
    "PROCESS_BYTES",
    "Job",
    "RankRule",
    "budget",
    "job_bytes",
    "parse_rank",
    "parts",
    "peak_memory",
    "run_layers",
    "run_svds",
    "run_values",
    "seconds",
    "share",
]
