"""How much of a training is kept, by what it does to examples that were left out."""

from __future__ import annotations

import csv
import io
import json
import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import write_pictures
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

from svftool.attaching import Trainable
from svftool.choices.training import Settings, check_safeguard
from svftool.errors import UsageError
from svftool.factors import FactorStore, open_factors
from svftool.progress import Silent
from svftool.report import finetune as report
from svftool.stages.decompose import decompose
from svftool.tasks.base import Task
from svftool.tasks.classification import Classification
from svftool.training import Journal, Run, TrainingPlan, compare, summarise
from svftool.training.kept import SHARES, Judged, Safeguard, SharedWay, choose_share, decide
from svftool.training.plan import run_from_plain, run_to_plain
from svftool.training.results import FinetuneResult, result_fields
from svftool.training.safeguard import Way, suited_head_rate

STEPS, RATE = 12, 0.02


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


class Saved:
    """Remembers what each run wrote."""

    def __init__(self) -> None:
        self.tensors: dict[str, dict[str, Tensor]] = {}

    def __call__(self, run: Run, trainable: Trainable, task: Task) -> Path:
        values = trainable.singular_values() | trainable.whole_tensors()
        self.tensors[run.stem] = {name: one.clone() for name, one in values.items()}
        return Path(run.stem)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FactorStore]:
    """Yield the factors of a `SmallNet`."""
    folder = tmp_path_factory.mktemp("net")
    save_file(SmallNet().state_dict(), folder / "base.safetensors", metadata={"format": "pt"})
    decompose(folder / "base.safetensors", folder / "factors")
    with open_factors(folder / "factors") as opened:
        yield opened


@pytest.fixture
def plan(tmp_path: Path, store: FactorStore) -> Callable[..., TrainingPlan]:
    """Return a factory of plans: the head does not know the colours yet, so training helps."""
    data = write_pictures(tmp_path / "data", count=8)

    def make(
        *, shots: int = 4, regimes: tuple[str, ...] = ("svf",), mixed: bool = False, **settings: Any
    ) -> TrainingPlan:
        source = mixed_up(data, tmp_path / "mixed.csv") if mixed else data
        chosen = {"steps": STEPS, "lr": RATE, "head_lr": RATE, "safeguard": "always"} | settings
        return TrainingPlan(
            build=SmallNet,
            store=store,
            tasks=[Classification(source, shots=shots, head="keep", augment="none")],
            regimes=regimes,
            seeds=[0],
            settings=Settings(**chosen),
            device=torch.device("cpu"),
        )

    return make


def mixed_up(data: Path, target: Path) -> Path:
    """Write a list in which a picture's class says nothing of its colour: nothing can be learnt."""
    files = sorted(data.rglob("*.png"))
    rows = [(str(file), "abc"[index % 3]) for index, file in enumerate(files)]
    with target.open("w", newline="") as stream:
        csv.writer(stream).writerows([("path", "label"), *rows])
    return target


def the(runs: list[Run]) -> tuple[Run, Safeguard]:
    (run,) = runs
    assert run.safeguard is not None
    return run, run.safeguard


def test_training_that_hurts_leaves_the_start_and_says_so(
    plan: Callable[..., TrainingPlan],
) -> None:
    saved, loud = Saved(), Loud()
    chosen = plan(mixed=True, lr=0.2, head_lr=0.2)
    runs, _ = compare(chosen, saved, progress=loud)
    run, found = the(runs)
    assert (run.kept, found.share, run.outcome.steps) == ("start", 0.0, 0)
    assert run.after == run.before
    assert any("the start is kept" in note and "--safeguard never" in note for note in loud.notes)
    start = SmallNet().state_dict()
    assert torch.equal(saved.tensors[run.stem]["fc.weight"], start["fc.weight"])
    result = FinetuneResult(
        Path("out"), "classification", "accuracy", tuple(runs),
        tuple(summarise(runs, chosen.tasks[0].primary)),
    )  # fmt: skip
    (plain,) = result_fields(result)["runs"]
    assert plain["kept"] == "start"
    assert plain["safeguard"]["share"] == 0.0
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report.view(result))
    assert "svf: kept the start" in console.export_text()


def test_training_that_helps_is_kept(plan: Callable[..., TrainingPlan]) -> None:
    runs, _ = compare(plan(), Saved())
    run, found = the(runs)
    assert run.kept in {"part", "end"}
    assert run.outcome.steps == STEPS
    assert run.after["loss"] < run.before["loss"]
    assert found.examples == 12
    assert [one.share for one in found.trials] == list(SHARES)
    # Two trials of half as many steps: as much as the run itself.
    assert found.steps == STEPS


def test_a_part_of_the_way_lies_between_start_and_end(
    plan: Callable[..., TrainingPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Saved()
    compare(plan(safeguard="never", regimes=("head",)), whole)
    monkeypatch.setattr("svftool.training.kept.choose_share", lambda *_, **__: 0.25)
    part = Saved()
    runs, _ = compare(plan(regimes=("head",)), part)
    assert the(runs)[0].kept == "part"
    start, end = SmallNet().state_dict(), whole.tensors["head-seed0"]
    for name, value in part.tensors["head-seed0"].items():
        torch.testing.assert_close(value, start[name] + 0.25 * (end[name] - start[name]))


def test_all_of_it_is_the_unguarded_run_bit_for_bit(
    plan: Callable[..., TrainingPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    free, guarded = Saved(), Saved()
    compare(plan(safeguard="never"), free)
    monkeypatch.setattr("svftool.training.kept.choose_share", lambda *_, **__: 1.0)
    compare(plan(), guarded)
    for name, value in free.tensors["svf-seed0"].items():
        assert torch.equal(value, guarded.tensors["svf-seed0"][name]), name


def test_the_query_set_takes_no_part(plan: Callable[..., TrainingPlan]) -> None:
    decided = []
    for count in (1, 40):
        chosen = plan()
        task: Any = chosen.tasks[0]
        draw_of = task.draw

        def draw(seed: int, draw_of: Any = draw_of, count: int = count) -> Any:
            found = draw_of(seed)
            query = found._parts["query"]
            found._parts["query"] = query.at(range(min(count, len(query))))
            return found

        task.draw = draw
        decided.append(the(compare(chosen, Saved())[0])[1])
    assert decided[0] == decided[1]


def test_one_example_a_class_keeps_the_start(plan: Callable[..., TrainingPlan]) -> None:
    runs, _ = compare(plan(shots=1), Saved())
    run, found = the(runs)
    assert run.kept == "start"
    assert "one example a class" in found.why
    assert not found.trials


def test_a_run_that_was_cut_short_goes_on_from_its_trials(
    plan: Callable[..., TrainingPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, resumed = Saved(), Saved()
    expected, _ = compare(plan(), straight)
    journal = Journal(tmp_path / "journal")
    from svftool.training import fold_trials, safeguard

    trained, calls = safeguard.train, [0]

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            signal.raise_signal(signal.SIGINT)
        return trained(*arguments, **options)

    for module in (fold_trials, safeguard):  # of the trials, and of the run
        monkeypatch.setattr(module, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(plan(), resumed, journal=journal)
    # The first trial is not repeated: the second, and the run.
    runs, _ = compare(plan(), resumed, journal=journal)
    assert calls[0] == 4
    assert the(runs)[1] == the(expected)[1]
    for name, value in straight.tensors["svf-seed0"].items():
        assert torch.equal(value, resumed.tensors["svf-seed0"][name]), name
    again = compare(plan(), resumed, journal=journal)[0][0]
    assert again.safeguard == runs[0].safeguard
    assert calls[0] == 4


def test_a_trial_that_diverges_keeps_the_start() -> None:
    found = decide([[], [Judged([1.0] * 3, 1)] * (len(SHARES) + 1)], 10, new_head=False)
    assert found.kept == "start"
    assert "diverged" in found.why


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_losses_that_are_not_finite_are_no_gain(bad: float) -> None:
    fold = [Judged([1.0, 1.2], 0), *[Judged([bad, 0.1], 1)] * len(SHARES)]
    for new_head in (True, False):
        found = decide([fold, fold], 10, new_head=new_head)
        assert found.share == 0.0
        assert "finite" in found.why


def test_a_loss_that_falls_while_fewer_are_right_is_no_gain() -> None:
    start, after = Judged([2.0, 2.1, 1.9], 2), Judged([1.0, 1.2, 0.9], 1)
    fold = [start, *[after] * len(SHARES)]
    assert decide([fold, fold], 10, new_head=True).share == 0.0
    same = [start, *[replace(after, right=2)] * len(SHARES)]
    assert decide([same, same], 10, new_head=True).share == SHARES[0]


@pytest.mark.parametrize("factor", [1.0, 100.0])
def test_the_rate_of_a_new_head_goes_by_the_size_of_its_weights(factor: float) -> None:
    weight = nn.Parameter(factor * torch.randn(3, 50))
    groups = {"head": [weight, nn.Parameter(torch.zeros(3))], "norm": [nn.Parameter(torch.ones(3))]}
    suited = suited_head_rate(Settings(), groups, 100)
    size = float(weight.detach().square().mean().sqrt())
    # Half of the peak rate, over 100 steps of a cosine, is as far as the weights are large.
    assert suited.learning_rate("head") * 50 == pytest.approx(size)
    assert suited.learning_rate("norm") == Settings().learning_rate("norm")
    given = suited_head_rate(Settings(head_lr=0.3), groups, 100)
    assert given.learning_rate("head") == 0.3


def test_a_head_of_zeros_keeps_the_default_rate() -> None:
    groups = {"head": [nn.Parameter(torch.zeros(3, 50))]}
    assert suited_head_rate(Settings(), groups, 100) == Settings()


def test_the_smallest_share_as_good_as_the_best() -> None:
    def shared(*gains: float) -> list[SharedWay]:
        return [SharedWay(share, gain, 0.1) for share, gain in zip(SHARES, gains, strict=True)]

    assert choose_share(shared(0.02, 0.2, 0.5, 0.58, 0.3), new_head=True) == 0.5
    assert choose_share(shared(0.02, 0.05, 0.07, 0.09, 0.02), new_head=True) == 0.0
    assert choose_share(shared(0.02, 0.05, 0.15, 0.3, 0.9), new_head=True) == 1.0
    assert choose_share(shared(-1, -1, -1, -1, -1), new_head=True) == 0.0


def test_a_head_of_the_checkpoint_is_trained_unless_that_does_harm() -> None:
    def shared(right: int, *gains: float) -> list[SharedWay]:
        return [
            SharedWay(share, gain, 0.1, right) for share, gain in zip(SHARES, gains, strict=True)
        ]

    # What is new to a head: half of the examples cannot show what all of them bring.
    assert choose_share(shared(-1, 0.02, 0.0, -0.05, -0.1, -0.19), new_head=False) == 1.0
    assert choose_share(shared(0, -1, -1, -1, -1, -1), new_head=False) == 1.0
    assert choose_share(shared(-1, 0.02, 0.0, -0.1, -0.3, -0.5), new_head=False) == 0.5
    assert choose_share(shared(-1, -1, -1, -1, -1, -1), new_head=False) == 0.0


def test_ends_of_the_way_are_met_bit_for_bit() -> None:
    one = nn.Parameter(torch.randn(7))
    start = one.detach().clone()
    way = Way([one])
    with torch.no_grad():
        one.add_(torch.randn(7) * 1e-3)
    end = one.detach().clone()
    way.go(0.5)
    assert not torch.equal(one, start)
    assert not torch.equal(one, end)
    way.go(1.0)
    assert torch.equal(one, end)
    way.go(0.0)
    assert torch.equal(one, start)


def test_only_runs_with_the_defaults_are_judged_unasked() -> None:
    assert Settings().guarded
    for given in ({"steps": 5}, {"epochs": 2}, {"lr": 1e-3}, {"head_lr": 1e-3}):
        assert not Settings(**given).guarded  # type: ignore[arg-type]
        assert Settings(**given, safeguard="always").guarded  # type: ignore[arg-type]
    assert not Settings(safeguard="never").guarded


def test_tasks_that_cannot_be_judged_refuse_always() -> None:
    check_safeguard("always", "text-classification")
    check_safeguard("auto", "language")
    with pytest.raises(UsageError, match=r"--safeguard always.*language"):
        check_safeguard("always", "language")


def test_a_run_is_read_back_as_it_was(plan: Callable[..., TrainingPlan]) -> None:
    run = compare(plan(), Saved())[0][0]
    assert run_from_plain(json.loads(json.dumps(run_to_plain(run)))).safeguard == run.safeguard
    old = asdict(replace(run, output=None))
    del old["safeguard"]
    assert run_from_plain(json.loads(json.dumps(old))).safeguard is None
