"""Pictures of coloured shapes with masks, and a network small enough to learn to find them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

COLOURS = {
    "blue": (30, 30, 220),
    "green": (20, 200, 40),
    "red": (220, 20, 30),
    "yellow": (230, 220, 10),
}


class SmallNet(nn.Module):
    """Three stages of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, 16, 3, 2, 1)
        self.layer1 = nn.Sequential(nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(16, 24, 3, 2, 1), nn.ReLU())
        self.layer3 = nn.Sequential(nn.Conv2d(24, 32, 3, 2, 1), nn.ReLU())
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer3(self.layer2(self.layer1(self.conv1(x)))).mean((2, 3))


def write_shapes(root: Path) -> Path:
    """Write four classes of 8 coloured rectangles on grey noise, with their masks."""
    random = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / name).mkdir()
        for index in range(8):
            picture = random.integers(90, 160, (48, 64, 3), dtype=np.uint8)
            top, left = random.integers(4, 20), random.integers(4, 30)
            mask = np.zeros((48, 64), np.uint8)
            mask[top : top + 22, left : left + 26] = 255
            picture[mask > 0] = np.array(colour) + random.integers(-15, 16, 3)
            Image.fromarray(picture).save(root / name / f"{index}.jpg", quality=95)
            Image.fromarray(mask).save(root / name / f"{index}.png")
    return root
