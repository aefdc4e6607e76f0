"""Rows and comparisons with their verdicts put in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from svftool.auditing.compare import Found, compare_spectra, compare_vectors
from svftool.auditing.metrics import Measured, Metric
from svftool.auditing.results import Comparison, Row
from svftool.auditing.verdicts import (
    UNTOUCHED,
    Verdict,
    judge,
    judge_all,
    judge_codes,
    judge_tensor,
)
from svftool.checkpoints import tensor_digest


def judged_row(row: Row, found: Found | None) -> Row:
    """Put in what was found; nothing is found of what the fine-tune's file does not hold."""
    if found is None:
        return replace(row, verdict=Verdict(UNTOUCHED, "high", "not in the fine-tune's file"))
    verdict = None
    if found.evidence is not None:
        verdict = judge(found.evidence) if row.is_matrix else judge_tensor(found.evidence)
    return replace(
        row,
        measured=found.measured,
        evidence=found.evidence,
        curves=found.curves,
        verdict=verdict,
        leading=found.leading,
    )


def as_in_base(row: Row, metrics: Sequence[Metric]) -> Row:
    """Put in what is true of a tensor that the fine-tune's file leaves as it is in the base.

    It has the metrics of a tensor that both files hold with equal values: a fine-tune has the same
    numbers whether its file holds what it did not change or not.
    """
    one = torch.ones(1)
    if row.is_matrix:
        change = compare_spectra(one, one, sides=None, metrics=metrics).measured.change
    else:
        change = compare_vectors(one, one).measured.change
    return replace(judged_row(row, None), measured=Measured(change=change))


def judged_codes(row: Row, base: Tensor, tuned: Tensor) -> Row:
    """Compare two tensors of one dtype and shape by their bytes."""
    verdict = judge_codes(equal=tensor_digest(base) == tensor_digest(tuned))
    return replace(row, verdict=verdict, by_bytes=True)


def judged(one: Comparison) -> Comparison:
    """Put the verdict on the whole into a comparison."""
    known = [(row, row.verdict) for row in one.rows if row.verdict is not None]
    verdict = judge_all(
        [(verdict, row.evidence) for row, verdict in known if row.is_matrix],
        [verdict for row, verdict in known if not row.is_matrix],
        [row.verdict for row in one.codes if row.verdict is not None],
        not_compared=len(one.coverage.not_compared),
    )
    return replace(one, verdict=verdict)
