"""``svftool finetune --log-with``: the curves of every run in a tracker."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pictures import write_pictures
from safetensors.torch import save_file
from typer.testing import CliRunner

import svftool
from svftool.cli import app
from svftool.training.trackers import Trackers

tracking = pytest.importorskip("accelerate.tracking")
STEPS = 8

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(8, 3)

    def forward(self, images):
        return self.fc(self.conv(images).relu().mean((2, 3)))
"""


class Recorder(tracking.GeneralTracker):
    """A tracker of another's making, that keeps what it is told."""

    name = "recorder"
    requires_logging_directory = False
    runs: dict[str, Recorder] = {}  # noqa: RUF012 (all of them, for the test to see)

    def __init__(self, run_name: str) -> None:
        super().__init__()
        self.facts: dict[str, Any] = {}
        self.told: list[tuple[int, dict[str, float]]] = []
        self.finished = False
        Recorder.runs[run_name] = self

    @property
    def tracker(self) -> Recorder:
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.facts = values

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        assert step is not None
        self.told.append((step, values))

    def finish(self) -> None:
        self.finished = True


class Sulky(Recorder):
    """A tracker without which nothing works, such as a server that is away."""

    name = "sulky"

    def start(self) -> None:
        raise ConnectionError("no server at home\nand a long story")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Recorder]]:
    """Register the trackers above with accelerate, and give the runs they saw."""
    for kind in (Recorder, Sulky):
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, kind.name, kind)
    yield Recorder.runs
    Recorder.runs.clear()


@pytest.fixture
def finetune(tmp_path: Path) -> Callable[..., Any]:
    """Return a caller of ``finetune`` with everything given but what is tested."""
    (tmp_path / "net.py").write_text(MODEL)
    scope: dict[str, Any] = {}
    exec(MODEL, scope)
    save_file(scope["Net"]().state_dict(), tmp_path / "base.safetensors", {"format": "pt"})
    write_pictures(tmp_path / "data", count=8)

    def call(output: str, *options: object) -> Any:
        words = ["finetune", tmp_path / "factors", "-o", tmp_path / output]
        words += ["--data", tmp_path / "data", "--model", f"{tmp_path / 'net.py'}:Net"]
        words += ["--shots", 5, "--steps", STEPS, *options]
        return CliRunner().invoke(app, [str(word) for word in words])

    made = CliRunner().invoke(
        app, ["decompose", str(tmp_path / "base.safetensors"), "-o", str(tmp_path / "factors")]
    )
    assert made.exit_code == 0, made.stderr
    return call


def test_tensorboard_holds_the_curves_of_every_run(
    finetune: Callable[..., Any], tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    several = ["--regime", "head,svf", "--seeds", 2, "--hold-out", 0.4]
    result = finetune("runs", "--log-with", "tensorboard", *several)
    assert result.exit_code == 0, result.stderr
    logs = tmp_path / "runs-logs"
    stems = [f"{regime}-seed{seed}" for regime in ("head", "svf") for seed in (0, 1)]
    assert sorted(path.name for path in logs.iterdir()) == sorted(stems)
    for stem in stems:
        events = EventAccumulator(str(logs / stem))
        events.Reload()
        curves = {
            tag: {event.step: event.value for event in events.Scalars(tag)}
            for tag in events.Tags()["scalars"]
        }
        rates = {"lr/head"} | ({"lr/singular_values"} if stem.startswith("svf") else set())
        assert curves.keys() == rates | {
            "loss", "held_out/accuracy", "query/accuracy", "query/class_accuracy", "query/loss",
        }  # fmt: skip
        assert list(curves["loss"]) == list(curves["lr/head"]) == list(range(STEPS))
        assert curves["lr/head"][1] == pytest.approx(1e-3, rel=0.1)
        assert list(curves["query/accuracy"]) == [0, STEPS]
        assert len(curves["held_out/accuracy"]) == STEPS


def test_a_folder_by_itself_means_tensorboard(finetune: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    assert finetune("t.svf.safetensors", "--log-dir", tmp_path / "there").exit_code == 0
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["svf-seed0"]


def test_any_tracker_of_accelerate_is_told(
    finetune: Callable[..., Any], recorder: dict[str, Recorder], tmp_path: Path
) -> None:
    result = finetune("t.svf.safetensors", "--log-with", "recorder", "--seed", 3)
    assert result.exit_code == 0, result.stderr
    assert recorder.keys() == {"svf-seed3"}
    run = recorder["svf-seed3"]
    assert run.finished
    assert (run.facts["regime"], run.facts["seed"], run.facts["shots"]) == ("svf", 3, 5)
    assert [step for step, values in run.told if "loss" in values] == list(range(STEPS))
    assert run.told[0][0] == 0
    assert run.told[-1][0] == STEPS
    assert "query/accuracy" in run.told[-1][1]
    assert str(tmp_path) not in str(run.facts)


def test_a_tracker_that_is_missing_is_one_line(
    finetune: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    result = finetune("runs", "--log-with", "wandb")
    assert (result.exit_code, result.stderr) == (
        9,
        "error: --log-with wandb needs the package 'wandb', which is not installed. "
        "Install it with: pip install wandb\n",
    )
    result = finetune("runs", "--log-with", "tensorboard")
    assert result.exit_code == 9
    # From where this package came: a clone, which is what there is to install it from.
    root = Path(svftool.__file__).parents[1]
    assert f"pip install '{root}[train]'" in result.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("recorder")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--log-with", "paper"], "--log-with 'paper', expected one of"),
        (["--log-with", "sulky"], "--log-with sulky: no server at home, expected a tracker that"),
        (["--log-dir", "{}/runs/logs"], "the curves' folder is inside"),
        (["--log-dir", "{}/runs"], "the curves' folder is the same as"),
    ],
)
def test_what_cannot_be_is_said(
    finetune: Callable[..., Any], tmp_path: Path, options: list[str], message: str
) -> None:
    words = [word.format(tmp_path) for word in options]
    result = finetune("runs", "--seeds", 2, "--head", "keep", *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_accelerate_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    Trackers().check()
    with pytest.raises(Exception, match=r"pip install '.+\[train\]'"):
        Trackers(("tensorboard",)).check()
