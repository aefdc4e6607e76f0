"""What is computed once a picture for all regimes and folds, and that it changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from svftool.few_shot.encoder import SharedOutputs, fingerprints
from svftool.few_shot.network import FewShotNet
from svftool.few_shot.task import FewShotSegmentation, few_shot_tasks

FROZEN = {"head": ("conv1", "layer1", "layer2", "layer3"), "svf": ("conv1", "layer1"), "full": ()}


class SmallNet(nn.Module):
    """Three stages of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, 8, 3, 2, 1)
        self.layer1 = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU())
        self.layer3 = nn.Sequential(nn.Conv2d(12, 16, 3, 2, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.layer3(self.layer2(self.layer1(self.conv1(x)))).mean((2, 3))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write four classes of 5 pictures of noise with their masks."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for name in "abcd":
        (root / name).mkdir()
        for index in range(5):
            mask = np.zeros((32, 40), np.uint8)
            mask[index : index + 18, 5:30] = 255
            picture = random.integers(0, 256, (32, 40, 3), dtype=np.uint8)
            Image.fromarray(picture).save(root / name / f"{index}.jpg")
            Image.fromarray(mask).save(root / name / f"{index}.png")
    return root


def tasks(images: Path, **options: Any) -> list[FewShotSegmentation]:
    return few_shot_tasks(images, image_size=65, width=8, test_episodes=10, **options)


def network(draw: Any, regime: str) -> Any:
    net = draw.prepare(SmallNet()).model
    assert isinstance(net, FewShotNet)
    for name in FROZEN[regime]:
        net.backbone.get_submodule(name).requires_grad_(False)
    return net.eval()


def count_calls(net: Any) -> dict[str, int]:
    calls = {"conv1": 0, "layer3": 0}

    def counter(name: str) -> Any:
        def hook(module: nn.Module, given: Any, output: Tensor) -> None:
            calls[name] += len(output)

        return hook

    for name in calls:
        net.backbone.get_submodule(name).register_forward_hook(counter(name))
    return calls


def trained(task: FewShotSegmentation, regime: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    draw = task.draw(0)
    net = network(draw, regime)
    optimiser = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        loss = draw.loss(net, draw.batch(draw.order(generator)[:4], generator))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return net.state_dict(), draw.evaluate(net)


@pytest.mark.parametrize("regime", FROZEN)
def test_training_and_scores_are_those_of_a_run_that_keeps_nothing(
    images: Path, regime: str, monkeypatch: pytest.MonkeyPatch
):
    kept = tasks(images)[0]
    trained(kept, "head")  # whose outputs the next one finds
    weights, scores = trained(kept, regime)
    with monkeypatch.context() as patch:
        patch.setattr(SharedOutputs, "agreeing", lambda self, net: [])
        patch.setattr("svftool.few_shot.encoder.frozen_stages", lambda *_: 0)
        anew, expected = trained(tasks(images)[0], regime)
    for name, value in weights.items():
        torch.testing.assert_close(value, anew[name])
    assert scores == pytest.approx(expected, abs=2e-3)


def test_a_picture_goes_through_the_base_once_for_all_regimes_and_folds(images: Path):
    first, second = tasks(images, folds=[0, 1], augment="none")
    seen = {}
    for task in (first, second):
        for regime in ("head", "svf", "full"):
            draw = task.draw(0)
            net = network(draw, regime)
            calls = count_calls(net)
            draw.loss(net, draw.batch(torch.arange(draw.size), torch.Generator().manual_seed(0)))
            draw.evaluate(net)
            seen[task.facts["fold"], regime] = calls
    pictures = 20
    assert seen[0, "head"]["conv1"] <= pictures
    assert seen[0, "svf"]["conv1"] <= pictures
    assert seen[0, "svf"]["layer3"] > 0
    assert seen[1, "head"]["conv1"] + seen[0, "head"]["conv1"] <= pictures
    assert seen[1, "svf"]["conv1"] + seen[0, "svf"]["conv1"] <= pictures
    assert seen[1, "full"]["conv1"] >= pictures / 2  # nothing is frozen


@pytest.mark.parametrize("change", ["weight", "stride", "canvas"])
def test_what_is_not_the_same_base_is_not_shared(images: Path, change: str):
    task = tasks(images)[0]
    draw = task.draw(0)
    net = network(draw, "head")
    draw.evaluate(net)
    with torch.no_grad():
        if change == "weight":
            net.backbone.conv1.weight[0, 0, 0, 0] += 1e-6
    if change == "stride":
        net.backbone.conv1.dilation = (2, 2)
        net.backbone.conv1.padding = (2, 2)
    if change == "canvas":
        task.pictures.canvas = 81
    calls = count_calls(net)
    draw.evaluate(net)
    assert calls["conv1"] > 0


def test_stages_agree_up_to_the_first_that_was_trained(images: Path):
    outputs = SharedOutputs()
    net = network(tasks(images)[0].draw(0), "head")
    assert outputs.agreeing(net) == []
    outputs.learn(net)
    whole = list(fingerprints(net))
    assert len(set(whole)) == len(net.plan.stages) == 5
    with torch.no_grad():
        net.backbone.layer2[0].bias.add_(1)
    # the stem (nothing here), conv1 and layer1
    assert outputs.agreeing(net) == whole[:3]
