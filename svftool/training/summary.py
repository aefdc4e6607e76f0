"""Mean and 95 % interval of a metric over the seeds of a regime."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from scipy import stats

CONFIDENCE = 0.95


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Interval of the mean by Student's t distribution; None for fewer than two values.

    Examples
    --------
    >>> low, high = interval([0.84, 0.86, 0.85])
    >>> round(low, 4), round(high, 4)
    (0.8252, 0.8748)
    >>> interval([0.84]) is None
    True
    """
    if len(values) < 2:
        return None
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * error
    return mean - half, mean + half
