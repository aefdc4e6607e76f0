"""The processes that share one command under ``torchrun``; a single one needs no launcher."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from typing import TypeVar

import torch.distributed as dist

from svftool.errors import ResourceError, SvftoolError

T = TypeVar("T")
PATIENCE = timedelta(days=7)
"""How long a process waits for the others: layers may take hours, a lost one breaks the link."""


@dataclass(frozen=True)
class Processes:
    """One process among those of the command.

    Attributes
    ----------
    rank : int
        Number of this process, from 0.
    count : int
        How many there are, on all machines.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process does what is done once."""
        return self.rank == 0

    @property
    def one_machine(self) -> bool:
        """Whether all processes are known to be on this machine, as ``torchrun`` says."""
        return self.count == 1 or os.environ.get("LOCAL_WORLD_SIZE") == str(self.count)

    def gather(self, value: T) -> list[T]:
        """Exchange a value with the others; also a meeting point.

        Raises
        ------
        ResourceError
            If another process was lost.
        """
        if self.count == 1:
            return [value]
        values: list[T | None] = [None] * self.count
        with self.told_of_a_loss():
            dist.all_gather_object(values, value)
        return [one for one in values if one is not None]

    def meet(self) -> None:
        """Wait until every process is here."""
        self.gather(self.rank)

    def once(self, work: Callable[[], T]) -> T:
        """Run `work` in the first process; all return its result or raise its error.

        Raises
        ------
        ResourceError
            If another process was lost.
        """
        if self.count == 1:
            return work()
        outcome = [_outcome(work) if self.first else (None, None)]
        with self.told_of_a_loss():
            dist.broadcast_object_list(outcome, src=0)
        value, failure = outcome[0]
        if failure is not None:
            failure.reported_elsewhere = not self.first
            raise failure
        return value  # type: ignore[return-value]

    def together(self, work: Callable[[], T]) -> T:
        """Run `work` in every process; where it fails in one, all raise, and one says why."""
        if self.count == 1:
            return work()
        value, failure = _outcome(work)
        failures = self.gather((failure,))
        found = [rank for rank, (one,) in enumerate(failures) if one is not None]
        if found:
            raised = failure or failures[found[0]][0] or SvftoolError()
            raised.reported_elsewhere = self.rank != found[0]
            raise raised
        return value  # type: ignore[return-value]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return any(self.gather(flag))

    @contextmanager
    def told_of_a_loss(self) -> Iterator[None]:
        """Context in which a broken link to the others ends with what to do.

        Raises
        ------
        ResourceError
            In place of the link's own error.
        """
        try:
            yield
        except RuntimeError as error:
            raise ResourceError(
                f"process {self.rank}: another of the {self.count} processes was lost. "
                "What is finished is kept; run the same command again with --resume."
            ) from error


ALONE = Processes()
"""The only process."""


def _outcome(work: Callable[[], T]) -> tuple[T | None, SvftoolError | None]:
    try:
        return work(), None
    except SvftoolError as error:
        return None, error


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """Join the processes that ``torchrun`` started, if it did.

    Yields
    ------
    Processes
        A single one where there is no launcher.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    if dist.is_initialized():  # by a caller that shares more than this
        yield Processes(dist.get_rank(), count)
        return
    before_joining()
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Processes(dist.get_rank(), count)
    finally:
        leave_processes()


def before_joining() -> None:
    """Import the module of torch whose defaults hold for ever the group that there is by then.

    ``DistributedDataParallel`` imports it, and would do so after the group is made.
    """
    import_module("torch.distributed.nn")


def leave_processes() -> None:
    """End the group of processes together with the threads that sent its messages.

    Those threads end with the last reference to the group. A model that
    ``DistributedDataParallel`` wraps holds one, in a cycle. A thread that outlives the group and
    frees a tensor while the interpreter ends aborts the process. After an error the frames of its
    traceback hold the model, and nothing is to be collected.
    """
    if sys.exc_info()[0] is None:
        gc.collect()
    dist.destroy_process_group()
