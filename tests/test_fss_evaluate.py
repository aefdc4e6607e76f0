"""``evaluate`` of few-shot segmentation comes to what ``finetune`` reported, or says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import shapes
from safetensors.torch import save_file
from typer.testing import CliRunner

from svftool.cli import app

TRAINING = ["--select-on", "last", "--steps", "4", "--batch-size", "3"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with pictures and the factors of a small network."""
    work = tmp_path_factory.mktemp("work")
    (work / "pairs").mkdir()
    shapes.write_shapes(work / "pairs")
    save_file(shapes.SmallNet().state_dict(), work / "base.safetensors", {"format": "pt"})
    told(invoke("decompose", work / "base.safetensors", "-o", work / "factors", "--json"))
    return work


def invoke(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def told(result: Any) -> Any:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def rules(work: Path, *options: object) -> list[object]:
    words = ["--data", work / "pairs", "--task", "few-shot-segmentation", "--json"]
    return [*words, "--model", f"{shapes.__file__}:SmallNet", "--test-episodes", 16, *options]


def train(work: Path, output: str, *options: object) -> dict[str, Any]:
    """Train one run and give what is said of it."""
    small = ["--image-size", 49, "--width", 16]
    words = ["finetune", work / "factors", "-o", work / output, *TRAINING, *small]
    run: dict[str, Any] = told(invoke(*words, *rules(work, *options)))["runs"][0]
    return run


def tuned(work: Path, run: dict[str, Any], *options: object) -> Any:
    words = ["evaluate", work / "factors", "--tuned", run["output"]]
    return invoke(*words, *rules(work, *options))


@pytest.mark.parametrize(
    "options",
    [
        ["--start", "blank"],
        ["--mean", "0.2", "0.3", "0.4", "--std", "0.5", "0.5", "0.5"],
        ["--host", "bam", "--base-steps", "3", "--seed", "5", "--remove-novel"],
        ["--host", "pfenet", "--fold", "2"],
    ],
    ids=lambda options: options[0] + options[1],
)
def test_a_tuned_file_is_measured_by_the_rules_it_was_trained_with(
    work: Path, options: list[str], request: pytest.FixtureRequest
) -> None:
    run = train(work, request.node.callspec.id, *options)
    again = told(tuned(work, run))["runs"][0]
    assert again["metrics"] == pytest.approx(run["metrics"]["after"], abs=1e-6)
    assert again["seed"] == run["seed"]


def test_a_tuned_host_does_not_fit_another(work: Path) -> None:
    run = train(work, "near")
    for options in (["--start", "blank"], ["--width", 24]):
        result = tuned(work, run, *options)
        assert result.exit_code == 7
        assert "of the head. Give the options that it was trained with" in result.stderr


def test_classes_that_were_trained_on_are_no_novel_ones(work: Path) -> None:
    run = train(work, "fold3", "--fold", 3)
    assert "novel classes were base" not in tuned(work, run).stderr
    words = " ".join(tuned(work, run, "--fold", "0,3").stderr.split())
    assert words.count("1 of the novel classes were base classes in training: blue.") == 1
    assert "it was trained with --fold 3" in words


def test_a_dense_checkpoint_brings_its_whole_host_or_none(work: Path) -> None:
    run = train(work, "dense", "--regime", "full", "--host", "pfenet")
    dense, small = work / "dense", ["--image-size", 49]
    # What it was trained with stands in its metadata, or is given.
    for fitting in (["--host", "pfenet", "--width", 16, *small], small):
        measured = told(invoke("evaluate", dense, *rules(work, *fitting)))["runs"][0]["metrics"]
        assert measured == pytest.approx(run["metrics"]["after"], abs=1e-6)
    for options in (["--width", 24], ["--host", "bam"]):
        result = invoke("evaluate", dense, *rules(work, *options, *small))
        assert result.exit_code == 7
        assert "of the head. Give the options that it was trained with" in result.stderr
    # The base has no host: the nearest prototype stands in.
    base = told(invoke("evaluate", work / "base.safetensors", *rules(work, *small)))
    assert base["runs"][0]["metrics"] == pytest.approx(run["metrics"]["before"], abs=1e-6)


def test_bam_is_tested_with_other_numbers_of_supports(work: Path) -> None:
    several = ["--host", "bam", "--base-steps", 3, "--shots", 2, "--test-shots", "1,3"]
    run = train(work, "several", *several)
    assert {"miou", "miou_1shot", "miou_3shot"} <= run["metrics"]["after"].keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "pfenet", "--start", "nearest"], "--start has no meaning for --host pfenet"),
        (["--base-steps", "5"], "--base-steps has no meaning for --host baseline"),
    ],
)
def test_options_of_another_host_are_refused(work: Path, options: list[str], message: str) -> None:
    result = invoke(
        "finetune", work / "factors", "-o", work / "no", *TRAINING, *rules(work, *options)
    )
    assert result.exit_code == 2
    assert message in result.stderr


def test_measuring_needs_no_images_to_choose_weights_by(work: Path, tmp_path: Path) -> None:
    for name in shapes.COLOURS:
        (tmp_path / "few" / name).mkdir(parents=True)
        for picture in sorted((work / "pairs" / name).iterdir())[:6]:  # 3 images, 3 masks
            (tmp_path / "few" / name / picture.name).write_bytes(picture.read_bytes())
    where = [*rules(work, "--image-size", 49), "--data", tmp_path / "few"]
    trained = invoke("finetune", work / "factors", "-o", tmp_path / "run", *where)
    assert trained.exit_code == 6
    assert "--select-on last" in trained.stderr
    measured = told(invoke("evaluate", work / "base.safetensors", *where))["runs"][0]["metrics"]
    assert set(measured) == {"miou", "fb_iou"}
