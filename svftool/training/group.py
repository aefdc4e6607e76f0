"""The processes that train together; accelerate starts them, gives each its device and its number.

Every process holds the whole model and works on its share of each batch. What they exchange are the
gradients of the trained tensors, in flat buffers, and three numbers a step: frozen weights are
never sent, and nothing is wrapped, so that one process runs exactly as it would alone.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from svftool.errors import MissingDependencyError
from svftool.machine import pick_device
from svftool.processes import PATIENCE, Processes, before_joining, leave_processes
from svftool.progress import SILENT, Progress
from svftool.tasks.base import Draw, MeasuresTogether, Part

_Tensor = TypeVar("_Tensor", bound=Tensor)

BUCKET_BYTES = 64 << 20
"""Gradients are summed in buffers of this size."""


@dataclass(frozen=True)
class Group(Processes):
    """One process among those that train together; the first writes and reports."""

    def rows(self, size: int) -> slice:
        """Return this process's rows of a batch.

        Examples
        --------
        >>> [Group(rank, 3).rows(8) for rank in range(3)]
        [slice(0, 3, None), slice(3, 6, None), slice(6, 8, None)]
        """
        each, rest = divmod(size, self.count)
        start = self.rank * each + min(self.rank, rest)
        return slice(start, start + each + (self.rank < rest))

    def sum(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Add up a few numbers over the processes, in float64."""
        total = torch.tensor(values, dtype=torch.float64, device=device)
        with self.told_of_a_loss():
            dist.all_reduce(total)
        return total.tolist()

    def measure(
        self, draw: Draw, model: nn.Module, part: Part = "query", *, progress: Progress = SILENT
    ) -> dict[str, float]:
        """Measure a model by a draw's metrics, a share in each process where the draw can."""
        if isinstance(draw, MeasuresTogether):
            return draw.measure(model, part, processes=self, progress=progress)
        return self.once(lambda: draw.evaluate(model, part, progress=progress))

    @torch.no_grad()
    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add the gradients up over the processes, in place; one that is missing counts as zero."""
        if self.count == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets(parameters):
            gradients = [one.grad for one in bucket if one.grad is not None]
            self._exchange(gradients, lambda flat: dist.all_reduce(flat))

    @torch.no_grad()
    def copy_from_first(self, parameters: Sequence[Tensor]) -> None:
        """Give every process the first one's values, so that all start from the same bits."""
        if self.count == 1:
            return
        for bucket in _buckets(parameters):
            self._exchange([one.data for one in bucket], lambda flat: dist.broadcast(flat, src=0))

    def _exchange(self, tensors: Sequence[Tensor], send: Callable[[Tensor], object]) -> None:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with self.told_of_a_loss():
            send(flat)
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


ALONE = Group()
"""The only process."""


def _buckets(parameters: Sequence[_Tensor]) -> Iterator[list[_Tensor]]:
    """Group neighbours of one dtype up to `BUCKET_BYTES`."""
    bucket: list[_Tensor] = []
    size = 0
    for parameter in parameters:
        full = size + parameter.nbytes > BUCKET_BYTES
        if bucket and (full or bucket[0].dtype != parameter.dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.nbytes
    if bucket:
        yield bucket


@contextmanager
def joined_group(device: str) -> Iterator[tuple[Group, torch.device]]:
    """Join the processes that ``torchrun`` or ``accelerate launch`` started, if one did.

    Parameters
    ----------
    device : str
        The value of ``--device``; of several GPUs each process takes its own.

    Yields
    ------
    Group
        `ALONE` where there is no launcher; accelerate is not needed then.
    torch.device
        Where this process trains.

    Raises
    ------
    MissingDependencyError
        If there are several processes and accelerate is not installed.
    """
    chosen = pick_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE, chosen
        return
    try:
        from accelerate import PartialState
    except ImportError:
        raise MissingDependencyError(
            "accelerate", extra="train", purpose="training in several processes"
        ) from None
    before_joining()
    state = PartialState(cpu=chosen.type == "cpu", timeout=PATIENCE)
    try:
        yield Group(state.process_index, state.num_processes), state.device
    finally:
        leave_processes()


# Ctrl-C and SIGTERM during training: finish the step, keep what was trained, stop.


SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Context in which the first Ctrl-C or SIGTERM is noted instead of raised.

    A second one acts as it would have outside. In threads other than the main one, where Python
    allows no handlers, signals keep their meaning.

    Parameters
    ----------
    patient : bool
        Note every signal: a launcher passes on what the terminal has sent already, and ends by
        force what takes too long.

    Attributes
    ----------
    signum : int or None
        The signal that came, if any.
    """

    def __init__(self, *, patient: bool = False) -> None:
        self._patient = patient
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def came(self) -> bool:
        """Whether a signal has come."""
        return self.signum is not None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum if self.signum is None else self.signum
        if not self._patient:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
