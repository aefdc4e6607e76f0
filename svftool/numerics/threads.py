"""Threads for linear algebra: every kernel runs on one, and several matrices or blocks at a time.

A BLAS that splits one product over its own threads may round differently for every number of them.
Here each product is cut into blocks whose sizes follow from the matrix alone, each block is
computed on one thread, and a pool spreads matrices and blocks over the cores. So the factors of a
matrix are the same bits on any number of cores, in any order, in any process of a group.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cache, partial
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

from svftool.numerics.lapack import doors

_A = TypeVar("_A")
_B = TypeVar("_B")

# Seconds to wait for a thread when the work has failed: it may be in a long call of LAPACK.
_PATIENCE = 1.0


@cache
def _blas_libraries() -> tuple[Any, ...]:
    """Return controllers of the BLAS libraries that numpy and scipy brought along."""
    from threadpoolctl import ThreadpoolController

    doors()  # a library must be loaded to be found
    return tuple(ThreadpoolController().select(user_api="blas").lib_controllers)


class _OneThread:
    """Holds every BLAS of the process at one thread while anyone needs it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before: tuple[int, list[int]] = (1, [])

    def enter(self) -> None:
        with self._lock:
            self._users += 1
            libraries = _blas_libraries()
            if self._users == 1:
                counts = [library.num_threads or 1 for library in libraries]
                self._before = torch.get_num_threads(), counts
                for library in libraries:
                    library.set_num_threads(1)
            torch.set_num_threads(1)  # in part a setting of the calling thread

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                before, counts = self._before
                torch.set_num_threads(before)
                for library, count in zip(_blas_libraries(), counts, strict=True):
                    library.set_num_threads(count)


_ONE_THREAD = _OneThread()


@contextmanager
def one_thread() -> Iterator[None]:
    """Hold torch and the BLAS of numpy and scipy at one thread, for the whole process."""
    _ONE_THREAD.enter()
    try:
        yield
    finally:
        _ONE_THREAD.leave()


class _Shared:
    """Blocks of one product that any thread of the pool may take."""

    def __init__(self, blocks: Sequence[Callable[[], None]]) -> None:
        self._blocks = deque(blocks)
        self._open = len(self._blocks)
        self._error: BaseException | None = None
        self._done = threading.Condition()

    def run_one(self) -> bool:
        """Run the next block; False when none is left to begin."""
        try:
            block = self._blocks.popleft()
        except IndexError:
            return False
        error: BaseException | None = None
        try:
            block()
        except BaseException as exc:  # noqa: BLE001  (raised again in the thread that shared it)
            error = exc
        with self._done:
            self._open -= 1
            if error is not None:
                self._error = self._error or error
                while self._blocks:
                    self._blocks.popleft()
                    self._open -= 1
            self._done.notify_all()
        return True

    def wait(self) -> None:
        """Return when the last block is done; raise what the first failed one raised."""
        with self._done:
            self._done.wait_for(lambda: self._open == 0)
        if self._error is not None:
            raise self._error


class Closed(RuntimeError):
    """The pool was closed while it still had work, because the run was given up."""


class ThreadPool:
    """Threads that help with the blocks of large matrices, and else take whole matrices in turn.

    Parameters
    ----------
    workers : int
        How many threads, beside the caller's. With none, `share` runs in the caller alone and
        `submit` cannot be used.
    """

    def __init__(self, workers: int = 0) -> None:
        self.workers = workers
        self._wake = threading.Condition()
        self._shared: list[_Shared] = []
        self._work: deque[Callable[[], None]] = deque()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._serve, name=f"svftool-{index}", daemon=True)
            for index in range(workers)
        ]

    def __enter__(self) -> Self:
        _ONE_THREAD.enter()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._wake:
            self._closed = True
            self._work.clear()
            self._wake.notify_all()
        for thread in self._threads:
            thread.join(None if kind is None else _PATIENCE)
        _ONE_THREAD.leave()

    def submit(self, work: Callable[[], None]) -> None:
        """Queue a whole piece of work that raises nothing; they start in this order."""
        with self._wake:
            self._work.append(work)
            self._wake.notify()

    def in_order(
        self, items: Iterable[_A], work: Callable[[_A], _B], *, size: Callable[[_A], int], room: int
    ) -> Generator[_B, None, None]:
        """Run work on items, several at a time, and hand out what it makes in their order.

        Parameters
        ----------
        items : iterable
        work : callable
            It may share blocks with this pool.
        size : callable
            Bytes that an item takes until the one after its own is asked for.
        room : int
            Bytes that all items together may take; one that is larger runs alone.

        Yields
        ------
        object
            An error that `work` raises is raised in the place of its result.
        """
        waiting: deque[tuple[int, Future[_B]]] = deque()
        held = 0

        def run(item: _A, future: Future[_B]) -> None:
            try:
                future.set_result(work(item))
            except BaseException as exc:  # noqa: BLE001  (raised again by the caller's thread)
                future.set_exception(exc)

        for item in items:
            taken = min(size(item), room)
            while waiting and (held + taken > room or len(waiting) > self.workers):
                freed, future = waiting.popleft()
                yield future.result()
                held -= freed
            future = Future()
            self.submit(partial(run, item, future))
            waiting.append((taken, future))
            held += taken
        while waiting:
            yield waiting.popleft()[1].result()

    def share(self, blocks: Sequence[Callable[[], None]]) -> None:
        """Run independent blocks, with the help of idle threads, and return when all are done."""
        if len(blocks) <= 1 or not self.workers:
            for block in blocks:
                block()
            return
        shared = _Shared(blocks)
        with self._wake:
            if self._closed:
                raise Closed
            self._shared.append(shared)
            self._wake.notify_all()
        self._finish(shared)
        shared.wait()

    def _finish(self, shared: _Shared) -> None:
        while shared.run_one():
            pass
        with self._wake:
            if shared in self._shared:
                self._shared.remove(shared)

    def _serve(self) -> None:
        torch.set_num_threads(1)
        while self._serve_one():
            pass

    def _serve_one(self) -> bool:
        with self._wake:
            self._wake.wait_for(lambda: self._closed or self._shared or self._work)
            shared = self._shared[0] if self._shared else None
            work = self._work.popleft() if self._work and shared is None else None
        if shared is not None:
            self._finish(shared)
        elif work is not None:
            work()
        return shared is not None or work is not None
