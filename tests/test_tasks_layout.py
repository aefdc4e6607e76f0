"""The layout of kernels: channels together on a CPU, where the model runs so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pictures import write_pictures
from torch import Tensor, nn

from svftool.errors import ModelError
from svftool.tasks.classification import Classification
from svftool.tasks.layout import in_suited_layout


class Net(nn.Module):
    """Two convolutions and a head; how the map is flattened is the subclass's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, stride=8)
        self.second = nn.Conv2d(8, 4, 3, padding=1, groups=4)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.fc = nn.Linear(16, 3)

    def flatten(self, maps: Tensor) -> Tensor:
        return maps.flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.flatten(self.pool(self.second(self.first(images).relu()))))


class ViewNet(Net):
    """Runs with the channels apart alone."""

    def flatten(self, maps: Tensor) -> Tensor:
        return maps.view(len(maps), -1)


def kernels(model: nn.Module) -> list[Tensor]:
    return [one.weight for one in model.modules() if isinstance(one, nn.Conv2d)]


def together(kernel: Tensor) -> bool:
    return kernel.is_contiguous(memory_format=torch.channels_last)


def test_kernels_keep_the_channels_together(tmp_path: Path) -> None:
    draw = Classification(write_pictures(tmp_path, count=4), shots=2).draw(0)
    prepared = draw.prepare(Net())
    assert all(map(together, kernels(prepared.model)))
    for got, expected in zip(kernels(prepared.model), kernels(Net()), strict=True):
        assert torch.equal(got, expected)
        assert got.requires_grad
        assert not got.is_inference()


def test_a_model_that_needs_them_apart_gets_them_apart(tmp_path: Path) -> None:
    draw = Classification(write_pictures(tmp_path, count=4), shots=2).draw(0)
    model = draw.prepare(ViewNet()).model
    assert all(one.is_contiguous() for one in kernels(model))
    batch = draw.batch(torch.arange(4), torch.Generator())
    draw.loss(model.train(), batch).backward()
    assert all(one.grad is not None for one in kernels(model))


def test_what_the_model_says_is_said(tmp_path: Path) -> None:
    class Picky(Net):
        def flatten(self, maps: Tensor) -> Tensor:
            raise RuntimeError("not today")

    draw = Classification(write_pictures(tmp_path, count=4), shots=2).draw(0)
    with pytest.raises(ModelError, match="not today"):
        draw.prepare(Picky())


def test_both_layouts_give_the_same(tmp_path: Path) -> None:
    torch.manual_seed(1)
    images, apart, model = torch.randn(5, 3, 32, 32), Net(), Net()
    with torch.inference_mode():
        found = in_suited_layout(model, lambda: model(images))
        torch.testing.assert_close(found, apart(images))
    assert all(map(together, kernels(model)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_keeps_its_layout() -> None:
    model = Net().cuda()
    images = torch.randn(5, 3, 32, 32, device="cuda")
    in_suited_layout(model, lambda: model(images))
    assert all(one.is_contiguous() for one in kernels(model))
