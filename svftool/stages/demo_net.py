"""The network of ``svftool demo``: a small convolutional classifier, in plain torch.

A copy of this file lies in the demo's folder, for ``--model digits_net.py:digits_net``.
"""

from torch import Tensor, nn


class DigitsNet(nn.Module):
    """Three convolutions, an average over the picture and a linear head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores (N, classes) of images (N, 3, 16, 16)."""
        maps = self.pool(self.conv1(images).relu())
        maps = self.pool(self.conv2(maps).relu())
        scores: Tensor = self.fc(self.conv3(maps).relu().mean((2, 3)))
        return scores


def digits_net() -> nn.Module:
    """Build the network for the six digits that it is trained on first."""
    return DigitsNet(6)
