"""The loss of a step's batch: of all of it, or of the share that one of several processes has."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from svftool.choices.training import Settings
from svftool.errors import UsageError
from svftool.tasks.base import Counts, Draw, SharesBatches, Smooths, Steady, to_device
from svftool.training.frozen import FrozenOutputs
from svftool.training.group import Group
from svftool.training.loading import Ahead

# Seeds derived from a run's seed, so that any step can be repeated without those before it.


def derived_seed(*parts: object) -> int:
    """Hash the parts to a seed of 63 bits.

    Examples
    --------
    >>> derived_seed(0, "batch", 1) != derived_seed(0, "batch", 2)
    True
    """
    digest = hashlib.sha256(":".join(map(str, parts)).encode(errors="surrogatepass")).digest()
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


_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Batches:
    """Loads batches by their step and runs the model on them.

    Every process draws the whole batch, so that augmentation does not depend on how many there
    are, and computes on its own rows of it.

    Parameters
    ----------
    model : nn.Module
    parameters : sequence of Parameter
        What is trained.
    draw : Draw
        Data and loss.
    settings : Settings
        Batch size and precision.
    seed : int
        Seed of the run.
    group : Group
        The processes.

    Raises
    ------
    UsageError
        If labels are to be smoothed, and the task cannot.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        draw: Draw,
        settings: Settings,
        *,
        seed: int,
        group: Group,
    ) -> None:
        self._model, self._parameters, self._draw = model, parameters, draw
        self._seed, self._ranks = seed, group
        self._device = parameters[0].device
        self._sampler = Sampler(draw, settings.examples_a_step, seed)
        self._together = min(settings.batch_size, draw.size)
        self._smoothing = settings.label_smoothing
        if self._smoothing and not isinstance(draw, Smooths):
            raise UsageError("--label-smoothing has no meaning for this task. Leave it out")
        steps = settings.step_count(draw.size)
        self._ahead = Ahead(self._load, steps=steps, workers=settings.workers)
        self._autocast = _AUTOCAST.get(settings.products)
        # Within another autocast a cache would outlive the step, and the weights that it copied.
        self._cached = settings.dtype == "float32"
        self._frozen: FrozenOutputs | None = None
        self._tried = False
        self._kept: tuple[int, Tensor, Any] | None = None

    def loss(self, step: int, stop: bool) -> tuple[Tensor, float, bool]:
        """Return the loss to go backward from, its value over the whole batch, and whether to stop.

        Parameters
        ----------
        step : int
            Chooses the examples, their augmentation and dropout.
        stop : bool
            Whether this process wants to stop after the step; one is enough.
        """
        indices, batch = self._batch(step)
        rows = self._ranks.rows(len(indices))
        with self._beginning(indices[rows]):
            if self._ranks.count > 1:
                return self._shared(batch, len(indices), step, stop)
            torch.manual_seed(derived_seed(self._seed, "step", step))
            loss = self._forward(batch)
            return loss, float(loss.detach()), stop

    def differentiate(
        self, step: int, stop: bool, backward: Callable[[Tensor], None]
    ) -> tuple[float, bool]:
        """Go backward from the loss of a step, in as many parts as it takes.

        Each part of a batch weighs as much as it has terms, so that the gradients add up to that
        of the whole batch.

        Parameters
        ----------
        step, stop
            As of `loss`.
        backward : callable
            Adds the gradient of a loss to what is there.

        Returns
        -------
        tuple of float and bool
            The loss over the whole batch, and whether to stop.
        """
        indices, batch = self._batch(step)
        if len(indices) <= self._together:
            loss, value, stop = self.loss(step, stop)
            backward(loss)
            return value, stop
        parts = [
            (rows, share, self._terms(share, rows))
            for rows in self._parts(len(indices))
            for share in [self._share(batch, rows, len(indices))]
        ]
        terms = self._over_all(sum(count for _, _, count in parts))[0]
        total = 0.0
        for number, (rows, share, count) in enumerate(parts):
            if count:
                torch.manual_seed(derived_seed(self._seed, "step", step, self._ranks.rank, number))
                with self._beginning(indices[rows]):
                    loss = self._forward(share)
                backward(loss * (count / terms))
                total += float(loss.detach()) * count
        total, stops = self._over_all(total, stop)
        return (total / terms if terms else math.nan), stops > 0

    def _parts(self, size: int) -> Iterator[slice]:
        """Cut this process's rows of a batch into parts, as many as in every other process."""
        own, count = self._ranks.rows(size), -(-size // self._together)
        for number in range(count):
            rows = Group(number, count).rows(own.stop - own.start)
            if rows.stop > rows.start:
                yield slice(own.start + rows.start, own.start + rows.stop)

    def _over_all(self, *values: float) -> list[float]:
        """Add up numbers over the processes."""
        if self._ranks.count == 1:
            return list(values)
        return self._ranks.sum(values, self._device)

    def _terms(self, share: Any, rows: slice) -> int:
        """Count what the loss of a share is the mean over."""
        return self._draw.terms(share) if isinstance(self._draw, Counts) else rows.stop - rows.start

    def close(self) -> None:
        """End the processes that load batches."""
        self._ahead.close()

    def _load(self, step: int) -> tuple[Tensor, Any]:
        indices = self._sampler.indices(step)
        return indices, self._draw.batch(indices, generator_for(self._seed, "batch", step))

    def _batch(self, step: int) -> tuple[Tensor, Any]:
        """Return the examples of a step and their batch; once loaded, it is kept for the step."""
        if self._kept is None or self._kept[0] != step:
            indices, batch = self._ahead.batch(step)
            self._kept = (step, indices, batch)
            if not self._tried:
                self._frozen, self._tried = self._find_frozen(indices[: self._together]), True
        return self._kept[1:]

    def _find_frozen(self, indices: Tensor) -> FrozenOutputs | None:
        """Keep what the frozen beginning makes of examples that look the same in every epoch."""
        if not (isinstance(self._draw, Steady) and self._draw.steady):
            return None
        return FrozenOutputs.of(
            self._model,
            lambda chosen: self._forward(self._draw.batch(chosen, generator_for(self._seed))),
            indices,
            size=self._draw.size,
            together=self._together,
        )

    def _beginning(self, indices: Tensor) -> AbstractContextManager[None]:
        return nullcontext() if self._frozen is None else self._frozen.standing_in(indices)

    def _forward(self, batch: Any) -> Tensor:
        batch = to_device(batch, self._device)
        with torch.autocast(
            self._device.type,
            self._autocast,
            enabled=self._autocast is not None,
            cache_enabled=self._cached,
        ):
            if self._smoothing and isinstance(self._draw, Smooths):
                return self._draw.smoothed_loss(self._model, batch, self._smoothing)
            return self._draw.loss(self._model, batch)

    def _shared(self, batch: Any, size: int, step: int, stop: bool) -> tuple[Tensor, float, bool]:
        """Weigh this process's mean so that the sum over all of them is that of the whole batch."""
        rows, rank = self._ranks.rows(size), self._ranks.rank
        # Other dropout in each process; in the first one as in a single process.
        torch.manual_seed(derived_seed(self._seed, "step", step, *([rank] if rank else [])))
        terms, value = 0, 0.0
        loss = sum(
            (0.0 * one.sum() for one in self._parameters), torch.zeros((), device=self._device)
        )
        if rows.stop > rows.start:
            share = self._share(batch, rows, size)
            terms = self._terms(share, rows)
            loss = self._forward(share) if terms else loss
            value = float(loss.detach()) * terms
        total, terms_of_all, stops = self._ranks.sum((value, terms, stop), self._device)
        mean = total / terms_of_all if terms_of_all else math.nan
        return loss * (terms / max(1.0, terms_of_all)), mean, stops > 0

    def _share(self, batch: Any, rows: slice, size: int) -> Any:
        if isinstance(self._draw, SharesBatches):
            return self._draw.share(batch, rows)
        return take_rows(batch, rows, size)


LOOKED_AT = 512
"""Examples of the support set whose gradient chooses entries, at most."""


def support_losses(
    draw: Draw, model: nn.Module, device: torch.device, batch_size: int, seed: int
) -> Iterator[Callable[[], Tensor]]:
    """Yield what computes the loss of each batch of the support set, once through.

    Parameters
    ----------
    draw : Draw
        Data and loss.
    model : nn.Module
        On `device`, in the mode that it is to run in.
    device : torch.device
    batch_size : int
    seed : int
        Chooses the examples, of more than 512, and their augmentation.
    """
    order = draw.order(generator_for(seed, "slope"))[:LOOKED_AT]
    for number, indices in enumerate(torch.split(order, min(batch_size, draw.size))):

        def loss(indices: Tensor = indices, number: int = number) -> Tensor:
            batch = draw.batch(indices, generator_for(seed, "slope", number))
            torch.manual_seed(derived_seed(seed, "slope", number))
            return draw.loss(model, to_device(batch, device))

        yield loss


def take_rows(batch: Any, rows: slice, size: int) -> Any:
    """Take some examples of a batch: rows of every tensor, and items of every list, of its size.

    Examples
    --------
    >>> take_rows({"x": torch.arange(4), "scale": 2.0}, slice(1, 3), 4)
    {'x': tensor([1, 2]), 'scale': 2.0}
    """
    if isinstance(batch, Tensor):
        return batch[rows] if batch.ndim and len(batch) == size else batch
    if isinstance(batch, Mapping):
        return {key: take_rows(value, rows, size) for key, value in batch.items()}
    if isinstance(batch, tuple):
        return tuple(take_rows(value, rows, size) for value in batch)
    if isinstance(batch, list) and len(batch) == size:
        return batch[rows]
    return batch
