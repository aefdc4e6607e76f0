"""Pieces of a benchmark, each done once, in several processes, and kept as JSON lines."""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

Line = dict[str, Any]
Unit = TypeVar("Unit")


class Journal:
    """A file of JSON lines; what is there is not done again.

    Parameters
    ----------
    path : Path
        Made with its folder where it is missing.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        written = path.read_text().splitlines() if path.exists() else []
        self.lines: list[Line] = [json.loads(line) for line in written]

    def add(self, lines: Iterable[Line]) -> None:
        """Write lines at the end."""
        lines = list(lines)
        with self.path.open("a") as stream:
            stream.writelines(json.dumps(line) + "\n" for line in lines)
        self.lines += lines


def work_off(
    units: Sequence[Unit],
    do: Callable[[Unit], list[Line]],
    journal: Journal,
    *,
    jobs: int = 1,
    minutes: float | None = None,
    then: Callable[[Unit, list[Line]], Sequence[Unit]] = lambda unit, lines: (),
) -> None:
    """Do units in order, in forked processes of one thread each; a failed one is said and left out.

    Parameters
    ----------
    units : sequence
        What to do.
    do : callable
        Does one and returns its lines for the journal.
    journal : Journal
    jobs : int
        Processes; with 1 the units are done here, with the threads that there are.
    minutes : float, optional
        After these no further unit is begun.
    then : callable
        What a finished unit makes possible; it comes first.
    """
    waiting, end = list(units), None if minutes is None else time.monotonic() + 60 * minutes
    pool = _pool(jobs) if jobs > 1 else None
    running: dict[Future[list[Line]], Unit] = {}
    while waiting or running:
        late = end is not None and time.monotonic() > end
        while waiting and not late and len(running) < jobs:
            unit = waiting.pop(0)
            running[_begin(pool, do, unit)] = unit
        if not running:
            break
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            unit = running.pop(future)
            lines = _lines(future, unit)
            journal.add(lines)
            waiting[:0] = then(unit, lines)
            left = f"{len(waiting)} waiting, {len(running)} running"
            print(f"{time.strftime('%H:%M:%S')} {unit}: {left}", file=sys.stderr, flush=True)
    if pool is not None:
        pool.shutdown()


def apart(function: Callable[..., object], *arguments: object) -> None:
    """Call a function in a process of its own: forked processes want none that has used a GPU."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(function, *arguments).result()


def _pool(jobs: int) -> ProcessPoolExecutor:
    """Forked processes share what is imported already."""
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("fork"), initializer=_one_thread)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _begin(
    pool: ProcessPoolExecutor | None, do: Callable[[Unit], list[Line]], unit: Unit
) -> Future[list[Line]]:
    if pool is not None:
        return pool.submit(do, unit)
    future: Future[list[Line]] = Future()
    try:
        future.set_result(do(unit))
    except Exception as error:  # noqa: BLE001 - as a process hands it on
        future.set_exception(error)
    return future


def _lines(future: Future[list[Line]], unit: object) -> list[Line]:
    error = future.exception()
    if error is None:
        return future.result()
    print(f"{unit}: left out", file=sys.stderr)
    traceback.print_exception(error, file=sys.stderr)
    return []
