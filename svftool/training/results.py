"""What ``finetune`` found: regimes over their seeds, as dataclasses and as plain values."""

from __future__ import annotations

import json
import math
import signal
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scipy.special import stdtrit

from svftool.checkpoints import write_errors
from svftool.tasks.base import TaskMetric
from svftool.training.plan import Run
from svftool.training.trials import tuning_to_plain

RESULTS_FILE = "results.json"


@dataclass(frozen=True)
class FinetuneResult:
    """What `finetune` did.

    Attributes
    ----------
    output : Path
        A run's own file or folder, or the folder of all runs.
    task, metric : str
        The task and its primary metric.
    runs : tuple of Run
        Every run, by seed and regime.
    summary : tuple of Summary
        Every regime over its seeds.
    interrupted : Signals or None
        The signal that cut the runs short.
    setting : mapping
        What all runs have in common, as the task describes it.
    dropped : mapping of str to int
        What the base holds and a dense result does not, with bytes.
    against : str or None
        The regime that all others are held against.
    """

    output: Path
    task: str
    metric: str
    runs: tuple[Run, ...]
    summary: tuple[Summary, ...]
    interrupted: signal.Signals | None = None
    setting: Mapping[str, Any] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)
    against: str | None = None

    @property
    def compared(self) -> tuple[PairedDifference, ...]:
        """Every regime against the one that was named for it, for each number of shots."""
        if self.against is None:
            return ()
        found = []
        for shots in dict.fromkeys(run.shots for run in self.runs):
            runs = [run for run in self.runs if run.shots == shots]
            for regime in dict.fromkeys(run.regime for run in runs):
                if regime != self.against:
                    found.append(differences(runs, self.metric, regime, self.against))
        return tuple(one for one in found if one is not None)

    @property
    def has_folds(self) -> bool:
        """Whether the runs are told apart by the fold of classes that they were tested on."""
        return any("fold" in run.facts for run in self.runs)


def result_fields(result: FinetuneResult) -> dict[str, Any]:
    """Return a result as plain values, for ``results.json`` and ``--json``; no NaN or infinity."""
    leading = front(result.summary)
    higher = all(one.higher_is_better for one in result.summary)
    return {
        "task": result.task,
        "output": str(result.output),
        "setting": dict(result.setting),
        "interrupted": None if result.interrupted is None else result.interrupted.name,
        "dropped": [{"name": name, "bytes": size} for name, size in result.dropped.items()],
        "runs": [_run_fields(run) for run in result.runs],
        "summary": [{**_summary_fields(one), "front": one in leading} for one in result.summary],
        "against": None
        if result.against is None
        else {
            "reference": result.against,
            "differences": [_difference_fields(one, higher) for one in result.compared],
        },
    }


def _difference_fields(one: PairedDifference, higher: bool) -> dict[str, Any]:
    sign = 1.0 if higher else -1.0
    half = one.half
    mean = sign * one.mean
    return {
        "regime": one.regime,
        "shots": one.shots,
        "seeds": len(one.values),
        "gain": _plain(mean),
        "ci95": None if half is None else [mean - half, mean + half],
        "wins": one.wins(higher_is_better=higher),
        "by_seed": [
            {"seed": seed, "gain": _plain(sign * value)}
            for seed, value in zip(one.seeds, one.values, strict=True)
        ],
    }


def _run_fields(run: Run) -> dict[str, Any]:
    return {
        "regime": run.regime,
        "seed": run.seed,
        "shots": run.shots,
        **run.facts,
        "head_trial": run.setting.get("head_trial"),
        "metrics": {"before": _finite(run.before), "after": _finite(run.after)},
        "trainable_parameters": run.trainable_parameters,
        "learning_rates": dict(run.learning_rates),
        "tuning": None if run.tuning is None else tuning_to_plain(run.tuning),
        "kept": run.kept,
        "safeguard": None if run.safeguard is None else asdict(run.safeguard),
        "steps": run.outcome.steps,
        "step_seconds": run.outcome.step_seconds,
        "seconds": run.seconds,
        "peak_memory_bytes": run.peak_memory_bytes,
        "ending": run.outcome.ending,
        "kept_step": run.outcome.kept,
        "worse": run.worse,
        "output": None if run.output is None else str(run.output),
    }


def _summary_fields(summary: Summary) -> dict[str, Any]:
    return {
        "regime": summary.regime,
        "metric": summary.metric,
        "shots": summary.shots,
        **summary.facts,
        "seeds": summary.seeds,
        "before": summary.before if summary.measured else None,
        "mean": summary.mean if summary.measured else None,
        "gain": _plain(summary.gain),
        "higher_is_better": summary.higher_is_better,
        "by_seed": [
            {"seed": seed, "before": _plain(before), "after": _plain(after)}
            for seed, before, after in zip(
                summary.numbers, summary.starts, summary.values, strict=True
            )
        ],
        "ci95": None if summary.ci95 is None else list(summary.ci95),
        "trainable_parameters": summary.trainable_parameters,
        "step_seconds": summary.step_seconds,
        "worse": summary.worse,
    }


def common_setting(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what all runs say alike of their data and rules."""
    first, *others = settings
    return {
        name: value
        for name, value in first.items()
        if all(other.get(name) == value for other in others)
    }


def _finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    return {name: _plain(value) for name, value in metrics.items()}


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def write_results(result: FinetuneResult, path: Path) -> None:
    """Write ``results.json``."""
    with write_errors(path):
        path.write_text(json.dumps(result_fields(result), indent=2) + "\n", encoding="utf-8")


# Regimes over their seeds: the mean of a metric and its 95 % interval.


CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """One regime over its seeds.

    Attributes
    ----------
    regime, metric : str
        The regime, and the task's primary metric.
    shots : int or None
        Examples a class.
    facts : mapping of str to int or None
        What tells its task from the others; None stands for the mean over all of them.
    seeds : int
        Runs that count: those that were not interrupted, unless all were.
    before, mean : float
        Mean of the metric over the runs, before and after; NaN where nothing was measured.
    ci95 : tuple of float or None
        95 % interval of `mean`; None for one run.
    trainable_parameters : int
        Numbers that training could change.
    step_seconds : float or None
        Median over the runs of a step's wall time.
    worse : bool
        `mean` is worse than `before`.
    values : tuple of float
        The metric of every seed, whose mean is `mean`.
    numbers : tuple of int
        The seeds of `values`.
    starts : tuple of float
        The metric of every seed before training.
    higher_is_better : bool
        The metric's direction.
    """

    regime: str
    metric: str
    shots: int | None
    facts: Mapping[str, int | None]
    seeds: int
    before: float
    mean: float
    ci95: tuple[float, float] | None
    trainable_parameters: int
    step_seconds: float | None
    worse: bool
    values: tuple[float, ...] = ()
    numbers: tuple[int, ...] = ()
    starts: tuple[float, ...] = ()
    higher_is_better: bool = True

    @property
    def gain(self) -> float:
        """How much better the metric became: positive where a perplexity fell."""
        change = self.mean - self.before
        return change if self.higher_is_better else -change

    @property
    def measured(self) -> bool:
        """Whether there was a query set."""
        return not math.isnan(self.mean)


def summarise(runs: Sequence[Run], metric: TaskMetric) -> list[Summary]:
    """Sum up the runs of each task and regime, in the order in which they came.

    Where there are several tasks of the same shots, such as folds, the mean over them follows: its
    interval is that of the seeds' means, over the seeds that went through all tasks.
    """
    whole = [run for run in runs if run.outcome.ending != "interrupted"] or list(runs)
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in whole:
        groups.setdefault((run.shots, run.regime, tuple(run.facts.items())), []).append(run)
    summaries = [_summary(group, metric, group[0].facts) for group in groups.values()]
    for shots, regime in dict.fromkeys((shots, regime) for shots, regime, _ in groups):
        tasks = {facts for s, r, facts in groups if (s, r) == (shots, regime)}
        if len(tasks) > 1:
            chosen = [run for run in whole if (run.shots, run.regime) == (shots, regime)]
            seeds = [run.seed for run in chosen]
            complete = [run for run in chosen if seeds.count(run.seed) == len(tasks)]
            if complete:
                summaries.append(_summary(complete, metric, dict.fromkeys(complete[0].facts)))
    return summaries


def _summary(whole: Sequence[Run], metric: TaskMetric, facts: Mapping[str, int | None]) -> Summary:
    by_seed: dict[int, list[float]] = {}
    starts: dict[int, list[float]] = {}
    for run in whole:
        by_seed.setdefault(run.seed, []).append(run.after.get(metric.name, math.nan))
        starts.setdefault(run.seed, []).append(run.before.get(metric.name, math.nan))
    values = [statistics.fmean(ends) for ends in by_seed.values()]
    before = statistics.fmean(run.before.get(metric.name, math.nan) for run in whole)
    mean = statistics.fmean(values)
    times = [run.outcome.step_seconds for run in whole if run.outcome.step_seconds is not None]
    return Summary(
        regime=whole[0].regime,
        metric=metric.name,
        shots=whole[0].shots,
        facts=facts,
        seeds=len(values),
        before=before,
        mean=mean,
        ci95=interval(values),
        trainable_parameters=whole[0].trainable_parameters,
        step_seconds=statistics.median(times) if times else None,
        worse=metric.better(before, mean),
        values=tuple(values),
        numbers=tuple(by_seed),
        starts=tuple(statistics.fmean(starts[seed]) for seed in by_seed),
        higher_is_better=metric.higher_is_better,
    )


@dataclass(frozen=True)
class PairedDifference:
    """One regime against another, or against the start, over the same seeds.

    Attributes
    ----------
    regime : str
    reference : str or None
        The other regime; None for the start.
    values : tuple of float
        The metric of the regime less that of the reference, one a seed that both finished.
    seeds : tuple of int
        The seeds of `values`.
    shots : int or None
        Examples a class.
    """

    regime: str
    reference: str | None
    values: tuple[float, ...]
    seeds: tuple[int, ...] = ()
    shots: int | None = None

    def wins(self, *, higher_is_better: bool) -> int:
        """Count the seeds on which the regime is better; level ones are none."""
        return sum((value > 0) if higher_is_better else (value < 0) for value in self.values)

    @property
    def mean(self) -> float:
        """Mean of the differences."""
        return statistics.fmean(self.values)

    @property
    def half(self) -> float | None:
        """Half the 95 % interval of the mean; None for one seed, or infinite values."""
        ends = interval(self.values)
        return None if ends is None else (ends[1] - ends[0]) / 2

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.half is not None and abs(self.mean) > self.half


def differences(
    runs: Sequence[Run], metric: str, regime: str, reference: str | None
) -> PairedDifference | None:
    """Pair two regimes over their seeds, which had the same examples and the same start.

    Where there are several tasks, such as folds, a seed counts by its mean over those that both
    finished, and the shots are those of `runs`.

    Parameters
    ----------
    runs : sequence of Run
        Of one number of shots.
    metric : str
    regime : str
    reference : str or None
        The other regime; None for the metric before training.

    Returns
    -------
    PairedDifference or None
        None where no seed has both.

    Examples
    --------
    >>> differences([], "accuracy", "svf", "head") is None
    True
    """
    ends: dict[str, dict[tuple[Any, ...], Run]] = {}
    for run in runs:
        if run.outcome.ending != "interrupted":
            ends.setdefault(run.regime, {})[run.seed, *run.facts.items()] = run
    own = ends.get(regime, {})
    if reference is None:
        pairs = {task: (run.after[metric], run.before[metric]) for task, run in own.items()}
    else:
        other = ends.get(reference, {})
        both = [task for task in own if task in other]
        pairs = {task: (own[task].after[metric], other[task].after[metric]) for task in both}
    by_seed: dict[int, list[float]] = {}
    for (seed, *_), (value, than) in pairs.items():
        by_seed.setdefault(seed, []).append(value - than)
    if not by_seed:
        return None
    means = tuple(map(statistics.fmean, by_seed.values()))
    shots = next(iter(own.values())).shots
    return PairedDifference(regime, reference, means, tuple(by_seed), shots)


def front(summaries: Sequence[Summary]) -> list[Summary]:
    """Return the summaries that none beats with as few trained numbers, for each task.

    Of several with the same mean, the one with the fewest numbers is on the front.
    """
    found = []
    for one in summaries:
        rivals = [
            other
            for other in summaries
            if (other.shots, other.facts, other.measured) == (one.shots, one.facts, True)
        ]
        if one.measured and not any(_beats(other, one) for other in rivals):
            found.append(one)
    return found


def _beats(one: Summary, other: Summary) -> bool:
    """Whether one is no worse with no more numbers, and better in either."""
    sign = 1.0 if one.higher_is_better else -1.0
    mine, theirs = sign * one.mean, sign * other.mean
    numbers = one.trainable_parameters, other.trainable_parameters
    no_worse = mine >= theirs and numbers[0] <= numbers[1]
    return no_worse and (mine > theirs or numbers[0] < numbers[1])


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Interval of the mean by Student's t distribution; None for one value, or infinite ones.

    Examples
    --------
    >>> low, high = interval([0.84, 0.86, 0.85])
    >>> round(low, 4), round(high, 4)
    (0.8252, 0.8748)
    >>> interval([0.84]) is None
    True
    """
    # A perplexity may overflow: of infinite values there is no spread.
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    half = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)) * error
    return mean - half, mean + half
