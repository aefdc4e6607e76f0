"""Learning rates that are chosen on the support set alone."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import write_pictures
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

import svftool.training.fold_trials
from svftool.attaching import Trainable
from svftool.errors import FactorsError
from svftool.factors import FactorStore, open_factors
from svftool.progress import Silent
from svftool.report import finetune as report
from svftool.stages.decompose import decompose
from svftool.stages.finetune import finetune
from svftool.tasks.base import Task, TaskMetric
from svftool.tasks.classification import Classification
from svftool.tasks.splits import left_out, others
from svftool.training import Journal, Run, Settings, TrainingPlan, compare
from svftool.training.fold_trials import FOLDS
from svftool.training.plan import run_from_plain, run_to_plain
from svftool.training.trials import Trial, choose
from svftool.training.tune import FACTORS

ACCURACY = TaskMetric("accuracy", higher_is_better=True)
PERPLEXITY = TaskMetric("perplexity", higher_is_better=False)


class SmallNet(nn.Module):
    """Convolution, mean and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.conv(images).relu().mean((2, 3)))


class Loud(Silent):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def save(run: Run, trainable: Trainable, task: Task) -> Path:
    return Path(run.stem)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FactorStore]:
    """Yield the factors of a `SmallNet`."""
    save_file(SmallNet().state_dict(), tmp_path / "base.safetensors", metadata={"format": "pt"})
    decompose(tmp_path / "base.safetensors", tmp_path / "factors")
    with open_factors(tmp_path / "factors") as opened:
        yield opened


@pytest.fixture
def plan(tmp_path: Path, store: FactorStore) -> Callable[..., TrainingPlan]:
    """Return a factory of plans for a few steps on coloured pictures."""
    data = write_pictures(tmp_path / "data", count=6)

    def make(
        *, shots: int = 4, regimes: tuple[str, ...] = ("svf",), **settings: Any
    ) -> TrainingPlan:
        return TrainingPlan(
            build=SmallNet,
            store=store,
            tasks=[Classification(data, shots=shots, head="new", augment="none")],
            regimes=regimes,
            seeds=[0],
            settings=Settings(**{"steps": 3, "tune_lr": True} | settings),
            device=torch.device("cpu"),
        )

    return make


def right_by_rate(
    monkeypatch: pytest.MonkeyPatch, right: Callable[[float], int]
) -> list[tuple[int, int]]:
    """Have each trial find the class of as many pictures as `right` makes of its factor.

    Gives (steps, size) of each.
    """
    seen = []

    def trained(
        model: nn.Module, groups: Any, draw: Any, settings: Settings, **options: Any
    ) -> Any:
        from svftool.training.loop import train

        count = right(settings.learning_rate("head") / Settings().learning_rate("head"))
        seen.append((settings.step_count(draw.size), draw.size))
        outcome = train(model, groups, draw, settings, **options)
        draw.judged = lambda *_: (torch.zeros(6), torch.arange(6) < count)
        return outcome

    monkeypatch.setattr("svftool.training.fold_trials.train", trained)
    return seen


def falling_from(best: float) -> Callable[[float], int]:
    """All six of the pictures at one factor, one fewer for every further one."""
    return lambda factor: 6 - abs(round(math.log(factor / best, 3)))


@pytest.mark.parametrize("best", [FACTORS[0], FACTORS[-1]])
def test_the_rate_with_the_best_score_trains_the_whole_support_set(
    plan: Callable[..., TrainingPlan], monkeypatch: pytest.MonkeyPatch, best: float
) -> None:
    wanted = Settings().learning_rate("head") * best
    seen = right_by_rate(monkeypatch, falling_from(best))
    runs, _ = compare(plan(regimes=("head", "svf")), save)
    for run in runs:
        assert run.tuning is not None
        assert run.tuning.factor == best
        assert run.learning_rates["head"] == wanted
        tried = [trial.factor for trial in run.tuning.trials]
        assert tried == pytest.approx(sorted([*FACTORS, best * best]))
        assert all(len(trial.scores) == FOLDS for trial in run.tuning.trials)
        assert run.outcome.steps == 3
    assert runs[1].learning_rates["singular_values"] == pytest.approx(
        Settings().learning_rate("singular_values") * best
    )
    # Every regime has as many trials, all as long as the run, on half of its 12 pictures.
    assert seen == [(3, 6)] * (2 * (len(FACTORS) + 1) * FOLDS)


@pytest.mark.parametrize(("missed", "chosen"), [((0, 1), 1.0), ((1, 1), 3.0)])
def test_a_single_example_moves_no_rate(
    plan: Callable[..., TrainingPlan],
    monkeypatch: pytest.MonkeyPatch,
    missed: tuple[int, int],
    chosen: float,
) -> None:
    folds = itertools.cycle(missed)
    right_by_rate(monkeypatch, lambda factor: 6 - next(folds) * (factor < 2))
    loud = Loud()
    (run,) = compare(plan(regimes=("head",)), save, progress=loud)[0]
    assert run.tuning is not None
    assert run.tuning.factor == pytest.approx(chosen)
    share = sum(missed) / 12  # of the pictures, that the default misses and the best rate does not
    default = next(trial for trial in run.tuning.trials if trial.factor == 1.0)
    assert default.error == pytest.approx(math.sqrt(share * (1 - share) / 11))
    luck = "1.0000 with x 3: within a standard error"
    assert any(luck in note for note in loud.notes) == (chosen == 1.0)


@pytest.mark.parametrize(
    ("best", "beyond", "chosen"),
    [
        (1 / 9, [1 / 9, 1 / 27], 1 / 9),
        (27.0, [9.0, 27.0, 81.0], 27.0),
        (243.0, [9.0, 27.0, 81.0, 243.0], 243.0),
    ],
)
def test_where_an_end_is_best_the_next_rate_is_tried(
    plan: Callable[..., TrainingPlan],
    monkeypatch: pytest.MonkeyPatch,
    best: float,
    beyond: list[float],
    chosen: float,
) -> None:
    right_by_rate(monkeypatch, falling_from(best))
    (run,) = compare(plan(regimes=("head",)), save)[0]
    assert run.tuning is not None
    assert run.tuning.factor == pytest.approx(chosen)
    tried = [trial.factor for trial in run.tuning.trials]
    assert tried == pytest.approx(sorted([*FACTORS, *beyond]))


def test_where_all_rates_diverge_smaller_ones_are_tried(
    plan: Callable[..., TrainingPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = right_by_rate(monkeypatch, lambda factor: 6 if factor < 0.2 else 0)
    inner = svftool.training.fold_trials.train

    def trained(*given: Any, **options: Any) -> Any:
        outcome = inner(*given, **options)
        diverged = given[3].learning_rate("head") > Settings().learning_rate("head") / 5
        return replace(outcome, ending="diverged") if diverged else outcome

    monkeypatch.setattr("svftool.training.fold_trials.train", trained)
    (run,) = compare(plan(regimes=("head",)), save)[0]
    assert run.tuning is not None
    assert run.tuning.factor == pytest.approx(1 / 9)
    assert len(seen) == (len(FACTORS) + 2) * FOLDS


def test_trials_do_not_touch_the_query_set(plan: Callable[..., TrainingPlan]) -> None:
    chosen, looked = plan(), []
    draw_of = chosen.tasks[0].draw

    class Guarded:
        """A draw that tells of every look at its query set."""

        def __init__(self, draw: Any) -> None:
            self._draw = draw

        def __getattr__(self, name: str) -> Any:
            return getattr(self._draw, name)

        def subdivide(self, count: int, seed: int) -> Any:
            support = set(self._draw._support.indices)
            folds = self._draw.subdivide(count, seed)
            for fold in folds:
                measured = set(fold._parts["query"].indices)
                assert set(fold._support.indices) == support - measured
                assert measured < support
            return folds

        def evaluate(self, model: nn.Module, part: str = "query", **options: Any) -> Any:
            looked.append(part)
            raise RuntimeError("the query set was looked at")

    chosen.tasks[0].draw = lambda seed: Guarded(draw_of(seed))
    loud = Loud()
    with pytest.raises(RuntimeError, match="looked at"):
        compare(chosen, save, progress=loud)
    # The first look came when the rates were chosen already.
    assert looked == ["query"]
    assert len(loud.notes) == 1
    assert "learning rates x" in loud.notes[0]


def test_the_choice_repeats_alone_and_in_company(plan: Callable[..., TrainingPlan]) -> None:
    company, _ = compare(plan(regimes=("head", "svf"), steps=8), save)
    torch.rand(7)
    alone, _ = compare(plan(steps=8), save)
    assert alone[0].tuning == company[1].tuning
    assert alone[0].after == company[1].after
    assert run_from_plain(run_to_plain(alone[0])) == alone[0]


def test_one_shot_keeps_the_default_and_says_so(plan: Callable[..., TrainingPlan]) -> None:
    loud = Loud()
    tuned, _ = compare(plan(shots=1), save, progress=loud)
    plain, _ = compare(plan(shots=1, tune_lr=False), save)
    assert tuned[0].tuning is not None
    assert (tuned[0].tuning.factor, tuned[0].tuning.trials) == (1.0, ())
    assert tuned[0].learning_rates == plain[0].learning_rates
    assert tuned[0].after == plain[0].after
    assert plain[0].tuning is None
    assert loud.notes == [
        "svf, seed 0: nothing of the support set can be left out to choose by: "
        "the default learning rates are kept"
    ]


def test_trials_that_are_noted_are_not_repeated(
    plan: Callable[..., TrainingPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, whole = Journal(tmp_path / "kept"), compare(plan(), save)[0][0]
    seen = right_by_rate(monkeypatch, falling_from(FACTORS[-1]))
    count = (len(FACTORS) + 1) * FOLDS
    stop = count - 3

    class Cut(Journal):
        """Loses its power after some trials."""

        def note(self, name: str, value: Any) -> None:
            super().note(name, value)
            if len(seen) == stop:
                raise RuntimeError("cut")

    with pytest.raises(RuntimeError, match="cut"):
        compare(plan(), save, journal=Cut(journal.folder))
    assert len(seen) == stop
    runs, _ = compare(plan(), save, journal=journal)
    assert len(seen) == count
    assert runs[0].tuning is not None
    assert runs[0].tuning.factor == FACTORS[-1]
    assert whole.tuning is not None
    assert [trial.factor for trial in runs[0].tuning.trials] == [*FACTORS, 9.0]
    again, _ = compare(plan(), save, journal=journal)
    assert again == runs
    assert len(seen) == count


def test_trials_of_an_older_version_count_and_broken_ones_are_refused(
    plan: Callable[..., TrainingPlan], tmp_path: Path
) -> None:
    journal = Journal(tmp_path / "kept")
    name = "svf-seed0-rates"
    factors = (1 / 9, *FACTORS, 9.0)
    scores = {f"{fold}: {factor:.3g}": 0.5 for factor in factors for fold in range(FOLDS)}
    journal.note(name, {**scores, "0: 3": 0.75, "1: 9": None})
    (run,) = compare(plan(), save, journal=journal)[0]
    assert run.tuning is not None
    assert (run.tuning.factor, len(run.tuning.trials)) == (3.0, len(FACTORS) + 1)
    assert {trial.error for trial in run.tuning.trials} == {None}
    journal = Journal(tmp_path / "broken")
    journal.note(name, {"0: 1": [0.5, 7]})
    with pytest.raises(FactorsError, match=r"broken.*Start anew without --resume"):
        compare(plan(), save, journal=journal)


def test_a_rate_that_diverges_is_not_chosen() -> None:
    trials = [Trial(1.0, (0.5, 0.5)), Trial(3.0, (0.6, 0.5)), Trial(9.0, (1.0, None))]
    assert choose(trials, ACCURACY) == 3.0
    assert choose(trials, PERPLEXITY) == 1.0
    assert choose([Trial(1.0, (None,))], ACCURACY) is None
    equal = [Trial(factor, (0.5, 0.5)) for factor in (1 / 9, 1 / 3, 1.0, 3.0, 9.0)]
    assert choose(equal, ACCURACY) == 1.0
    assert choose([equal[0], *equal[3:]], ACCURACY) == 3.0
    assert choose([equal[1], equal[3]], ACCURACY) == 1 / 3


def test_every_class_stays_in_training() -> None:
    labels = [0] * 5 + [1] * 2 + [2] + [3] * 3
    folds = left_out(labels, 3, seed=4)
    assert folds == left_out(labels, 3, seed=4)
    assert folds != left_out(labels, 3, seed=5)
    assert sorted(index for fold in folds for index in fold) == [0, 1, 2, 3, 4, 5, 6, 8, 9, 10]
    for fold in folds:
        kept = others(fold, len(labels))
        assert {labels[index] for index in kept} == {0, 1, 2, 3}
        assert sorted((*kept, *fold)) == list(range(len(labels)))
    assert left_out([0, 1, 2], 2, seed=0) == []


def test_results_hold_every_trial(store: FactorStore, tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "pictures", count=4)
    code = tmp_path / "net.py"
    code.write_text(
        "from collections import OrderedDict\nfrom torch import nn\n\n\ndef make():\n"
        "    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 8, 3), relu=nn.ReLU(),\n"
        "        pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(8, 3)))\n"
    )
    result = finetune(
        store.path,
        data=data,
        output=tmp_path / "runs",
        model=f"{code}:make",
        regimes=["head", "svf"],
        settings=Settings(steps=2, tune_lr=True),
        shots=2,
        device="cpu",
    )
    found = report.document(result)["runs"]
    for run in found:
        tuning = run["tuning"]
        assert (tuning["metric"], tuning["steps"], tuning["kept"]) == ("accuracy", 2, None)
        assert len(tuning["trials"]) >= len(FACTORS)
        for trial in tuning["trials"]:
            assert trial["score"] == pytest.approx(sum(trial["scores"]) / FOLDS)
        assert run["learning_rates"]["head"] == pytest.approx(1e-3 * tuning["factor"])
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report.view(result))
    shown = console.export_text()
    for run in found:
        factor = run["tuning"]["factor"]
        assert f"{run['regime']}: learning rates x {factor:.3g}, chosen on the support set" in shown
