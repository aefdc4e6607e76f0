"""Verdicts in words, from stated rules; see docs/metrics.md."""

from __future__ import annotations

from collections.abc import Sequence

from svftool.auditing.drift import LayerDrift

UNTOUCHED = "untouched"
ROUNDING = "rounding noise"
SPECTRUM_ONLY = "spectrum only"
GENERAL = "general change"
UNRELATED = "unrelated"
BROKEN = "broken"

VERDICTS = {
    UNTOUCHED: "not one value differs",
    ROUNDING: "the change is no larger than what rounding to the dtype makes",
    SPECTRUM_ONLY: "singular values changed, singular vectors did not: a singular value fine-tune",
    GENERAL: "singular vectors changed too: a full or low-rank fine-tune",
    UNRELATED: "almost no correlation with the base: retrained, or another model",
    BROKEN: "values that are not finite, or a matrix that became zero",
}
"""Each verdict with what it means."""

NOISE_FACTOR = 2.0
"""A change up to this many times the expected rounding noise counts as noise."""

SVF_SHARE = 0.9
"""Share of a change, rounding noise taken off, that must lie on the diagonal."""

COSINE = 0.2
"""Absolute cosine with the base below which a weight counts as unrelated."""


def layer_verdict(row: LayerDrift) -> str:
    """Judge one compared layer.

    Parameters
    ----------
    row : LayerDrift
        With its metrics; ``broken`` rows are judged where they are found.
    """
    if row.weight_drift is None:
        return row.verdict
    if row.weight_drift == 0.0:
        return UNTOUCHED
    floor = row.rounding_floor or 0.0
    if row.weight_drift <= NOISE_FACTOR * floor:
        return ROUNDING
    if row.cosine is not None and abs(row.cosine) < COSINE:
        return UNRELATED
    noise = (floor / row.weight_drift) ** 2
    if row.svf_share is not None and row.svf_share >= SVF_SHARE * (1.0 - noise):
        return SPECTRUM_ONLY
    return GENERAL


def overall_verdict(rows: Sequence[LayerDrift]) -> str:
    """Judge a whole comparison by the verdict that most of its changed matrices share."""
    judged = [row for row in rows if row.matrix is not None or row.svf_share is not None]
    if any(row.verdict == BROKEN for row in rows):
        return BROKEN
    changed = [row.verdict for row in judged if row.verdict != UNTOUCHED]
    if not changed:
        return UNTOUCHED if all(not row.weight_drift for row in rows) else GENERAL
    moved = [verdict for verdict in changed if verdict != ROUNDING] or changed
    return max(VERDICTS, key=moved.count)
