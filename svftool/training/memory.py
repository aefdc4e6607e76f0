"""What training will need of memory, from the headers of checkpoint and factors alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from svftool.attaching.lifecycle import choose_layers, matrices_of
from svftool.checkpoints import Checkpoint
from svftool.choices.regimes import lora_rank, parse_regime
from svftool.choices.training import Settings
from svftool.errors import ModelError
from svftool.factors import FactorStore
from svftool.machine import available_memory

SAID_FROM = 1 << 30
"""Bytes from which what is needed is said unasked."""
_GIB = 1 << 30
_SINGLE = 4


@dataclass(frozen=True)
class MemoryNeed:
    """What a regime holds at once on the device, in bytes; activations come on top.

    Attributes
    ----------
    regime : str
    weights : int
        The model's own tensors.
    factors : int
        Singular vectors of what is attached.
    trained : int
        Trained numbers, their gradients, the optimiser's two moments, and a copy that is kept.
    """

    regime: str
    weights: int
    factors: int
    trained: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.factors + self.trained

    def sentence(self) -> str:
        """Say it in one sentence."""
        parts = {"weights": self.weights, "factors": self.factors, "training": self.trained}
        listed = ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items() if size)
        return (
            f"memory: {self.regime} needs about {gigabytes(self.total)} ({listed}), and what a "
            "batch takes on its way through the network"
        )


def gigabytes(size: int) -> str:
    """Write bytes as people read them.

    Examples
    --------
    >>> gigabytes(3 << 29), gigabytes(3 << 20)
    ('1.50 GiB', '0.00 GiB')
    """
    return f"{size / _GIB:.2f} GiB"


def memory_need(
    regimes: Sequence[str],
    checkpoint: Checkpoint,
    store: FactorStore,
    settings: Settings,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> MemoryNeed:
    """Return what the largest of some regimes needs; nothing is read but headers.

    Parameters
    ----------
    regimes : sequence of str
    checkpoint : Checkpoint
        The base.
    store : FactorStore
        Its factors.
    settings : Settings
        Chooses the dtype of what is frozen.
    include, exclude : sequence of str
        Globs of the tensors that are attached, or get adapters.
    """
    try:
        layers = choose_layers(store, include, exclude)
    except ModelError:  # nothing is left, which is no fault where nothing is attached
        layers = []
    needs = [_need(name, checkpoint, store, layers, settings) for name in regimes]
    return max(needs, key=lambda one: one.total)


def available(device: torch.device) -> int | None:
    """Return the bytes that are free where the model will be, if that is known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory()


def _need(
    name: str,
    checkpoint: Checkpoint,
    store: FactorStore,
    layers: Sequence[str],
    settings: Settings,
) -> MemoryNeed:
    regime = parse_regime(name)
    frozen = 2 if settings.dtype == "bfloat16" else _SINGLE
    floats = [
        one for one in checkpoint.infos.values() if one.dtype.is_floating_point or one.storage
    ]
    numbers = sum(one.numel for one in floats)
    vectors = sum(one.numel for one in floats if len(one.shape) < 2)
    weights = frozen * (numbers - vectors) + _SINGLE * vectors
    if regime.full:
        return MemoryNeed(name, _SINGLE * numbers, 0, 4 * _SINGLE * numbers)
    matrices = matrices_of(store, layers)
    if regime.lora is not None:
        rank = lora_rank(regime.lora, matrices)
        adapters = sum(rank * count * (m + n) for count, m, n, _ in matrices)
        return MemoryNeed(name, weights, 0, 5 * _SINGLE * adapters)
    if regime.spectral is None:
        return MemoryNeed(name, weights, 0, 4 * _SINGLE * vectors if regime.parts else 0)
    factors = sum(count * k * (m + n) for count, m, n, k in matrices)
    trained = sum(count * regime.spectral.of(m, n, k).count for count, m, n, k in matrices)
    return MemoryNeed(name, weights, frozen * factors, 5 * _SINGLE * trained)
