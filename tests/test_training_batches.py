"""Shares of a batch: what several processes sum up is the gradient of one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import write_pictures
from PIL import Image
from torch import Tensor, nn

from svftool.tasks.base import Draw
from svftool.tasks.classification import Classification
from svftool.tasks.segmentation import Segmentation
from svftool.training import Group, Settings
from svftool.training.batches import Batches

Made = tuple[Draw, nn.Module]


class Pixels(nn.Module):
    """Logits of three classes for each pixel, or their mean."""

    def __init__(self, *, pooled: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.pooled = pooled

    def forward(self, images: Tensor) -> Tensor:
        maps = self.conv(images)
        return maps.mean((2, 3)) if self.pooled else maps


@dataclass(frozen=True)
class Simulated(Group):
    """A process whose companions are simulated: what they will say is known, or only listened to.

    Attributes
    ----------
    heard : list of float
        What the losses of the processes so far were means over.
    terms_of_all : float or None
        Their sum over all processes; None while it is not known.
    """

    heard: list[float] = field(default_factory=list)
    terms_of_all: float | None = None

    def sum(self, values: Sequence[float], device: torch.device) -> list[float]:
        self.heard.append(values[1])
        return [values[0], values[1] if self.terms_of_all is None else self.terms_of_all, 0.0]


def classification(folder: Path) -> Made:
    task = Classification(write_pictures(folder / "data", count=4), shots=3, head="keep")
    return task.draw(0), Pixels(pooled=True)


def segmentation(folder: Path) -> Made:
    random = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for index in range(9):
        labels = random.integers(0, 3, (8, 8)).astype(np.uint8)
        # So many pixels without a class that images count differently.
        labels[: index % 8] = 255
        Image.fromarray(labels).save(folder / "masks" / f"{index}.png")
        pixels = random.integers(0, 256, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
    task = Segmentation(folder, evaluation=folder, head="keep", augment="none")
    return task.draw(0), Pixels(pooled=False)


def language(folder: Path) -> Made:
    pytest.importorskip("transformers")
    from language import write_model, write_texts
    from transformers import AutoModelForCausalLM

    from svftool.tasks.language import Language

    write_model(folder / "model")
    # Of texts of unlike length each process gets another number of tokens.
    texts = write_texts(folder / "t.jsonl", [{"text": "abc def " * n} for n in range(1, 10)])
    task = Language(texts, evaluation=texts, tokenizer=folder / "model", sequence_length=48)
    return task.draw(0), AutoModelForCausalLM.from_pretrained(folder / "model")


def gradients(draw: Draw, model: nn.Module, batch_size: int, group: Group) -> list[Tensor]:
    parameters = list(model.parameters())
    settings = Settings(batch_size=batch_size, steps=4)
    batches = Batches(model, parameters, draw, settings, seed=0, group=group)
    loss, _, _ = batches.loss(1, stop=False)
    return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("make", [classification, segmentation, language])
@pytest.mark.parametrize(("batch_size", "count"), [(5, 2), (5, 3), (1, 2)])
def test_shares_sum_up_to_the_gradient_of_the_whole(
    make: Callable[[Path], Made], batch_size: int, count: int, tmp_path: Path
) -> None:
    draw, model = make(tmp_path)
    model.eval()
    expected = gradients(draw, model, batch_size, Group())
    assert any(float(value.abs().max()) > 1e-4 for value in expected)
    heard: list[float] = []
    for rank in range(count):
        gradients(draw, model, batch_size, Simulated(rank, count, heard))
    assert len(heard) == count
    parts = [
        gradients(draw, model, batch_size, Simulated(rank, count, [], sum(heard)))
        for rank in range(count)
    ]
    for values, whole in zip(zip(*parts, strict=True), expected, strict=True):
        torch.testing.assert_close(sum(values), whole, rtol=1e-4, atol=1e-6)


def test_equal_weights_would_not_do(tmp_path: Path) -> None:
    draw, model = language(tmp_path)
    model.eval()
    heard: list[float] = []
    for rank in range(2):
        gradients(draw, model, 5, Simulated(rank, 2, heard))
    assert heard[0] / heard[1] != pytest.approx(3 / 2, rel=0.05)
