"""Weights of a merge's inputs by data: trials on a live model, kept on the way, and the choice."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svftool.choices.merging import usual_trials
from svftool.errors import FactorsError, NumericalError
from svftool.factors.spool import Spool
from svftool.machine import pick_device
from svftool.merging.weights import (
    Factors,
    Gain,
    Parts,
    WeightTrial,
    choose_trial,
    search_weights,
)
from svftool.progress import Progress, ProgressTask
from svftool.stages.combine_options import WeightsFrom
from svftool.stages.combine_result import WeightChoice, WeightScore
from svftool.stages.merge_checkpoint import MergeWork
from svftool.stages.merge_trials import TrialModel, opened_trials
from svftool.training.workspace import describe_files

_FOLDER = "weights"


def choose_weights(
    work: MergeWork, how: WeightsFrom, folder: Path, *, resume: bool, progress: Progress
) -> WeightChoice:
    """Choose the weights of a merge's inputs on examples.

    Every trial is the whole merge, as it would be written, and the task's loss on all examples; the
    inputs are taken in the order of their names, so that the order in which they are given does not
    matter. See `svftool.merging.weights` for which weights are tried and when they are taken.

    Parameters
    ----------
    work : MergeWork
        With the start weights.
    how : WeightsFrom
    folder : Path
        Losses are kept there, for a call with `resume`; see `svftool.files.output.kept_folder`.
    resume : bool
    progress : Progress

    Raises
    ------
    FactorsError, NumericalError
        If the inputs cannot be merged with the start weights.
    """
    order = _order(work)
    ordered = work.ordered(order)
    trials = how.trials or usual_trials(len(order))
    kept = _Kept(folder / _FOLDER, trials + len(order), work.target)
    kept.begin(_request(ordered, how, trials), resume=resume)
    folder = folder / _FOLDER
    with (
        opened_trials(ordered, how, folder, progress) as live,
        progress.task("weighing", total=trials + len(order), unit="trials") as task,
    ):
        scored = _Scored(live, kept, task)
        start = scored.start_metric()
        given = [one.weight for one in ordered.merge.inputs]
        tried = search_weights(scored, given, scored.parts, trials)
        choice = choose_trial(tried, scored.parts)
        metric = start if choice.chosen is tried[0] else scored.metric(choice.chosen.factors)
        # A loss may fall where probabilities become milder and answers wrong.
        worse = live.task.primary.better(start, metric)
        chosen = tried[0] if worse else choice.chosen
        without = [
            scored.without(chosen, number) if weight else None
            for number, weight in enumerate(given)
        ]
    back = [order.index(number) for number in range(len(order))]

    def shown(trial: WeightTrial, metric: float | None = None) -> WeightScore:
        weights = scored.weights(trial.factors)
        return WeightScore(
            tuple(weights[place] for place in back), scored.parts.mean(trial.losses), metric
        )

    return WeightChoice(
        data=Path(how.data),
        task=how.task,
        metric=live.task.primary.name,
        support=live.support,
        parts=len(live.parts),
        start=shown(tried[0], start),
        chosen=shown(chosen, start if worse else metric),
        best=shown(choice.best, metric if choice.best is choice.chosen else None),
        gain=choice.gain,
        without=tuple(without[place] for place in back),
        tried=tuple(map(shown, tried)),
    )


def has_trials(folder: Path) -> bool:
    """Whether losses of an interrupted search are kept in a folder."""
    return any((folder / _FOLDER).glob("0*.json"))


def _order(work: MergeWork) -> list[int]:
    """Sort the inputs by what they are, unless their order says something."""
    inputs = work.merge.inputs
    numbers = range(len(inputs))
    if work.options.heads in ("concat", "first"):
        return list(numbers)
    return sorted(numbers, key=lambda number: (str(inputs[number].path), inputs[number].weight))


def _request(work: MergeWork, how: WeightsFrom, trials: int) -> dict[str, Any]:
    """Everything that decides the losses."""
    files = json.dumps(describe_files(Path(how.data)))
    return {
        **work.facts(),
        "data": hashlib.sha256(files.encode()).hexdigest(),
        "task": how.task,
        "trials": trials,
        "model": how.model,
        "device": pick_device(how.device).type,
        "options": {name: str(value) for name, value in sorted(how.options.items())},
    }


class _Kept(Spool):
    """Losses of finished trials; their number names their file."""

    def __init__(self, folder: Path, count: int, where: Path) -> None:
        self._names = [str(number) for number in range(count)]
        super().__init__(folder, self._names, where)
        self._next = 0

    def read(self) -> dict[Factors, tuple[float, ...]]:
        """Return the losses by the factors."""
        found = self.records(_from_plain)
        self._next = len(found)
        return dict(found.values())

    def note(self, factors: Factors, losses: Sequence[float]) -> None:
        """Keep the losses of one trial."""
        self.keep(self._names[self._next], {}, {"factors": factors, "losses": _as_json(losses)})
        self._next += 1


def _as_json(losses: Sequence[float]) -> list[float] | None:
    """Return losses as JSON holds them: weights that cannot be merged have none."""
    return list(losses) if all(map(math.isfinite, losses)) else None


def _from_plain(item: Mapping[str, Any]) -> tuple[Factors, tuple[float, ...]]:
    losses = item["losses"]
    known = () if losses is None else tuple(float(one) for one in losses)
    return tuple(float(one) for one in item["factors"]), known


@dataclass
class _Scored:
    """Losses of factors, each measured once."""

    live: TrialModel
    kept: _Kept
    task: ProgressTask
    known: dict[Factors, tuple[float, ...]] = field(default_factory=dict)
    parts: Parts = field(default_factory=lambda: Parts(()))

    def __post_init__(self) -> None:
        losses, sizes = self.live.losses()
        self.parts = Parts(sizes)
        if not all(map(math.isfinite, losses)):
            raise NumericalError(
                "--weights-from: the loss of the weights given is NaN or infinite, expected a "
                "merge that works to start from. Give smaller weights, as FILE@0.3."
            )
        self.known = {
            factors: found or self._impossible for factors, found in self.kept.read().items()
        }
        start = tuple(1.0 for _ in self.live.work.merge.inputs)
        if start not in self.known:
            self.kept.note(start, losses)
        # Measured anew: what is kept was measured in the same way, to the last bit.
        self.known[start] = losses

    @property
    def _impossible(self) -> tuple[float, ...]:
        return (math.inf,) * len(self.parts.sizes)

    def weights(self, factors: Factors) -> tuple[float, ...]:
        """Return the weights of the inputs."""
        inputs = self.live.work.merge.inputs
        # Adding 0 takes the sign from a zero.
        return tuple(one.weight * two + 0.0 for one, two in zip(inputs, factors, strict=True))

    def __call__(self, factors: Factors) -> tuple[float, ...]:
        """Measure factors."""
        if factors not in self.known:
            self.known[factors] = self._measured(factors)
            self.kept.note(factors, self.known[factors])
        self.task.advance()
        return self.known[factors]

    def _measured(self, factors: Factors) -> tuple[float, ...]:
        try:
            self.live.load(self.weights(factors))
        except (FactorsError, NumericalError):
            return self._impossible
        losses, _ = self.live.losses()
        return losses if all(map(math.isfinite, losses)) else self._impossible

    def start_metric(self) -> float:
        """Return the metric of the start, with which the model comes."""
        return self.live.metric()

    def metric(self, factors: Factors) -> float:
        """Return the metric of factors that can be merged."""
        self.live.load(self.weights(factors))
        return self.live.metric()

    def without(self, trial: WeightTrial, number: int) -> Gain | None:
        """Return by how much the loss rises without an input."""
        if trial.factors[number] == 0.0:
            return None
        left = tuple(0.0 if n == number else one for n, one in enumerate(trial.factors))
        losses = self(left)
        return self.parts.gain(losses, trial.losses) if all(map(math.isfinite, losses)) else None
