"""Read, compute and hand out at the same time, in bounded memory."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import TypeAlias, TypeVar

from torch import Tensor

from svftool.engine.plan import AHEAD, Job
from svftool.errors import NumericalError
from svftool.numerics import ThreadPool

_T = TypeVar("_T")
_Done: TypeAlias = "queue.SimpleQueue[tuple[Job, _T | BaseException]]"


class _Room:
    """Counts the jobs and bytes in use and makes the reader wait for room."""

    def __init__(self, size: int, places: int) -> None:
        self._free = self._size = size
        self._places = places
        self._closed = False
        self._changed = threading.Condition()

    def enter(self, size: int) -> bool:
        """Wait for room; what is larger than all there is waits to be alone. False when closed."""
        size = min(size, self._size)
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or (self._free >= size and self._places > 0)
            )
            self._free -= size
            self._places -= 1
            return not self._closed

    def leave(self, size: int) -> None:
        with self._changed:
            self._free += min(size, self._size)
            self._places += 1
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def flow(
    jobs: Sequence[Job],
    read: Callable[[str], Tensor],
    work: Callable[[Job, Tensor, ThreadPool], _T],
    *,
    size: Callable[[Job], int],
    budget: int,
    workers: int,
    in_order: bool = False,
) -> Generator[tuple[Job, _T | NumericalError], None, None]:
    """Run `work` on every job over several threads.

    Parameters
    ----------
    jobs : sequence of Job
        In the order that they are to be started.
    read : callable
        Gives the tensor of a name; called from one thread, ahead of the work.
    work : callable
        Makes the result of a job from its tensor.
    size : callable
        Bytes that a job takes from being read until the result after its own is asked for.
    budget : int
        Bytes that all jobs together may take; one that is larger runs alone.
    workers : int
        Jobs at a time; two more may be waiting, read or done.
    in_order : bool
        Hand out in the order of `jobs`: what is done before its turn waits, and takes room.

    Yields
    ------
    job : Job
    outcome : object or NumericalError
        In the order that they are done, or `in_order`. Any other error is raised.
    """
    room = _Room(budget, workers + AHEAD)
    done: _Done[_T] = queue.SimpleQueue()
    with ThreadPool(workers) as pool:

        def run(job: Job, tensor: Tensor) -> None:
            try:
                outcome: _T | BaseException = work(job, tensor, pool)
            except BaseException as exc:  # noqa: BLE001  (raised again by the caller's thread)
                outcome = exc.with_traceback(None) if isinstance(exc, NumericalError) else exc
            done.put((job, outcome))

        def read_ahead() -> None:
            for job in jobs:
                if not room.enter(size(job)):
                    return
                try:
                    pool.submit(partial(run, job, read(job.name).reshape(job.matrix)))
                except BaseException as exc:  # noqa: BLE001  (raised again by the caller's thread)
                    done.put((job, exc))
                    return

        reader = threading.Thread(target=read_ahead, name="svftool-reader", daemon=True)
        reader.start()
        try:
            for job, outcome in _outcomes(done, jobs, in_order=in_order):
                yield job, outcome
                del outcome
                room.leave(size(job))
        finally:
            room.close()
            reader.join()


def _outcomes(
    done: _Done[_T], jobs: Sequence[Job], *, in_order: bool
) -> Iterator[tuple[Job, _T | NumericalError]]:
    early: dict[str, _T | NumericalError] = {}
    for turn in jobs:
        while in_order and turn.name not in early:
            job, outcome = _next(done)
            early[job.name] = outcome
            del outcome
        yield (turn, early.pop(turn.name)) if in_order else _next(done)


def _next(done: _Done[_T]) -> tuple[Job, _T | NumericalError]:
    job, outcome = done.get()
    if isinstance(outcome, BaseException) and not isinstance(outcome, NumericalError):
        raise outcome
    return job, outcome
