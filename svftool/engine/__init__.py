"""Many decompositions: plan, schedule, journal and rank rules."""

from __future__ import annotations

from svftool.engine.ranks import FULL, RankRule, parse_rank
from svftool.engine.run import Job, run_svds, run_values

__all__ = ["FULL", "Job", "RankRule", "parse_rank", "run_svds", "run_values"]
