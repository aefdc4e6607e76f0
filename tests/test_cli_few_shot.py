"""``svftool finetune --task few-shot-segmentation`` on real images, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from svftool import decompose
from svftool.cli import app
from svftool.factors import read_tuned

SMALL = ["--image-size", "49", "--width", "16", "--test-episodes", "10", "--select-episodes", "5"]


@pytest.fixture(scope="module")
def factors(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("factors") / "f"
    decompose(data / "checkpoints" / "resnet18_to_layer3.safetensors", folder)
    return folder


def run(data: Path, factors: Path, out: Path, *options: str, images: Path | None = None) -> Any:
    arguments = ["finetune", str(factors), "-o", str(out), "--task", "few-shot-segmentation"]
    arguments += ["--model", f"{data / 'models.py'}:resnet18_to_layer3"]
    arguments += ["--data", str(images or data / "images" / "voc20_pairs"), "-q"]
    return CliRunner().invoke(app, [*arguments, *SMALL, *options])


def test_a_short_run_on_real_images(data: Path, factors: Path, tmp_path: Path):
    result = run(
        data, factors, tmp_path / "t", "--fold", "1,2", "--shots", "1", "--test-shots", "2",
        "--regime", "head,svf", "--steps", "4", "--batch-size", "2", "--swap-supports", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert [(r["regime"], r["fold"], r["shots"]) for r in told["runs"]] == [
        ("head", 1, 1), ("svf", 1, 1), ("head", 2, 1), ("svf", 2, 1),
    ]  # fmt: skip
    for one in told["runs"]:
        assert set(one["metrics"]["after"]) == {
            f"{part}{name}{shots}"
            for part in ("", "base_")
            for name in ("miou", "fb_iou")
            for shots in ("", "_2shot")
        } | {"swapped_miou"}
        before = one["metrics"]["before"]
        assert before["swapped_miou"] < before["miou"]
        assert 0.05 < one["metrics"]["before"]["miou"] < 0.7
    assert told["setting"]["dataset"] == "pascal-5i pairs"
    assert told["setting"]["image_size"] == 49
    tuned = read_tuned(tmp_path / "t" / "fold1-1shot-svf-seed0.svf.safetensors")
    assert tuned.task == "few-shot-segmentation"
    assert {name.partition(".")[0] for name in tuned.S} == {"layer2", "layer3"}
    assert all(name.startswith("host.") for name in tuned.whole)
    assert tuned.training["data"]["novel_classes"] == ["Bus", "Car", "Cat", "Chair", "Cow"]
    moved = [float((tuned.S[n] - tuned.S_base[n]).abs().max()) for n in tuned.S]
    assert min(moved) > 0
    head = load_file(tmp_path / "t" / "fold1-1shot-head-seed0.svf.safetensors")
    assert not any(name.endswith(".S") for name in head)


def test_the_table_is_in_the_papers_form(data: Path, factors: Path, tmp_path: Path):
    result = run(
        data, factors, tmp_path / "t", "--fold", "0", "--host", "pfenet", "--regime", "svf",
        "--steps", "1", "--batch-size", "1", "--select-on", "last", "--remove-novel",
        "--overlays", str(tmp_path / "seen"), "--overlay-count", "2",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    words = " ".join(result.stdout.split())
    assert "1-shot mIoU, % (1 seed)" in words
    assert "pascal-5i pairs, pfenet host, 49 px" in words
    assert "last weights taken; training images that hold novel classes removed" in words
    written = sorted(path.relative_to(tmp_path / "seen") for path in tmp_path.glob("seen/*/*"))
    assert [str(path) for path in written] == [
        f"fold0-1shot-{run}-seed0/{name}.png"
        for run in ("before", "svf")
        for name in ("0000-Aero", "0001-Bicycle")
    ]


def test_adapters_follow_dilated_layers_and_their_host_is_scored(
    data: Path, factors: Path, tmp_path: Path
):
    pytest.importorskip("peft")
    result = run(
        data, factors, tmp_path / "t", "--regime", "lora:2", "--steps", "2", "--batch-size", "2",
        "--select-on", "last", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    metrics = json.loads(result.stdout)["runs"][0]["metrics"]
    # Two steps leave a new host undecided; what stands in for it before training is better.
    assert abs(metrics["after"]["miou"] - metrics["before"]["miou"]) > 0.02


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--fold", "7"], 6, "fold 7 does not exist, expected 0 to 3"),
        (["--fold", "a"], 2, "--fold 'a', expected whole numbers"),
        (["--shots", "0"], 2, "--shots is 0, expected at least 1"),
        (["--shots", "99"], 6, "with fewer than 100 images: "),
        (["--features", "layer2,layer9"], 7, "has no module layer9, expected some of"),
        (["--hold-out", "0.5"], 2, "--hold-out has no meaning for --task few-shot-segmentation"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(
    data: Path, factors: Path, tmp_path: Path, options: list[str], code: int, message: str
):
    result = run(data, factors, tmp_path / "t", *options, "--steps", "1")
    assert result.exit_code == code, result.stderr
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "t").exists()


def test_options_of_this_task_mean_nothing_to_another(data: Path, factors: Path, tmp_path: Path):
    arguments = ["finetune", str(factors), "-o", str(tmp_path / "t"), "--host", "bam"]
    arguments += ["--data", str(data / "images" / "cifar10" / "train")]
    arguments += ["--model", f"{data / 'models.py'}:resnet18_to_layer3"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "--host has no meaning for --task classification" in result.stderr


def test_broken_pairs_are_refused_in_one_line(data: Path, factors: Path, tmp_path: Path):
    images = tmp_path / "images"
    for name in "abcd":
        (images / name).mkdir(parents=True)
        for index in range(2):
            pixels = np.full((20, 20, 3), 100, np.uint8)
            Image.fromarray(pixels).save(images / name / f"{index}.jpg")
    result = run(data, factors, tmp_path / "t", "--steps", "1", images=images)
    assert result.exit_code == 6
    assert "images without a mask: 8 of 8" in " ".join(result.stderr.split())
