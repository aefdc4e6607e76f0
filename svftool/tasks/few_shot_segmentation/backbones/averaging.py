"""An average pool without its stride."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class DilatedAvgPool2d(nn.Module):
    """Means of the windows of an average pool around every position, not every stride-th.

    The map keeps its size, so that what is added to it still fits: the shortcuts of ResNet-D pool
    where the blocks beside them have a strided convolution. What a window counts at the border is
    what the pool counts there.

    Parameters
    ----------
    pool : nn.AvgPool2d
        Gives the windows, and what they count.

    Attributes
    ----------
    dilation : (int, int)
        Distance of a window's positions; 1 until it is set.
    padding : (int, int)
        Positions between a window's first and its own; a multiple of the dilation.
    """

    def __init__(self, pool: nn.AvgPool2d) -> None:
        super().__init__()
        self.kernel_size = _pair(pool.kernel_size)
        self.padding = _pair(pool.padding)
        self.dilation = (1, 1)
        self.count_include_pad = pool.count_include_pad
        self.divisor_override = pool.divisor_override

    def forward(self, maps: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W) means."""
        before, after = self._margins()
        sums = self._sums(F.pad(maps, _sides(before, after)), maps.shape[-2:])
        if self.divisor_override:
            return sums / self.divisor_override
        ones = maps.new_ones(1, 1, *maps.shape[-2:])
        if self.count_include_pad:
            counted = (min(before[0], after[0]), min(before[1], after[1]))
            ones = F.pad(ones, _sides(before, counted), value=1)
            after = (after[0] - counted[0], after[1] - counted[1])
            before = (0, 0)
        return sums / self._sums(F.pad(ones, _sides(before, after)), maps.shape[-2:])

    def extra_repr(self) -> str:
        """Give windows, dilation and padding as the layers of torch do."""
        return f"{self.kernel_size}, dilation={self.dilation}, padding={self.padding}"

    def _margins(self) -> tuple[tuple[int, int], tuple[int, int]]:
        high, wide = (
            (k - 1) * d - p
            for k, d, p in zip(self.kernel_size, self.dilation, self.padding, strict=True)
        )
        return self.padding, (high, wide)

    def _sums(self, padded: Tensor, size: tuple[int, ...]) -> Tensor:
        (rows, columns), (down, right) = self.kernel_size, self.dilation
        height, width = size
        windows = [
            padded[..., i * down : i * down + height, j * right : j * right + width]
            for i in range(rows)
            for j in range(columns)
        ]
        total = windows[0]
        for window in windows[1:]:
            total = total + window
        return total


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _sides(before: tuple[int, int], after: tuple[int, int]) -> tuple[int, int, int, int]:
    """Give the margins in the order of `torch.nn.functional.pad`: the last dimension first."""
    return before[1], after[1], before[0], after[0]
