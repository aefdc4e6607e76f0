"""Seeds derived from a run's seed, so that any step can be repeated without those before it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from svftool.tasks import Draw


def derived_seed(*parts: object) -> int:
    """Hash the parts to a seed of 63 bits.

    Examples
    --------
    >>> derived_seed(0, "batch", 1) != derived_seed(0, "batch", 2)
    True
    """
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator_for(*parts: object) -> torch.Generator:
    """Return a generator on the CPU that is seeded by `derived_seed`."""
    return torch.Generator().manual_seed(derived_seed(*parts))


class Sampler:
    """Full batches from an endless row of shuffled epochs; batch t depends on the seed and t alone.

    Parameters
    ----------
    draw : Draw
        Gives the order of an epoch.
    batch_size : int
        At most this many examples; a smaller support set is a batch of its own.
    seed : int
        Seed of the run.
    """

    def __init__(self, draw: Draw, batch_size: int, seed: int) -> None:
        self.batch_size = min(batch_size, draw.size)
        self._draw = draw
        self._seed = seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def indices(self, step: int) -> Tensor:
        """Examples of the batch of a step: (batch_size,) int64."""
        size, start = self._draw.size, step * self.batch_size
        epoch, position = divmod(start, size)
        first = self._epoch_order(epoch)[position : position + self.batch_size]
        missing = self.batch_size - len(first)
        return torch.cat([first, self._epoch_order(epoch + 1)[:missing]]) if missing else first

    def _epoch_order(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            self._order = self._draw.order(generator_for(self._seed, "order", epoch))
            self._epoch = epoch
        return self._order


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Context in which the global generators are ours, and cuDNN picks kernels that repeat."""
    devices = [device] if device.type == "cuda" else []
    cudnn = torch.backends.cudnn
    with (
        torch.random.fork_rng(devices=devices),
        cudnn.flags(enabled=True, benchmark=False, deterministic=True),
    ):
        yield
