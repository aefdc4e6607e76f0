"""Pieces of a benchmark, each done once, in several processes, and kept as JSON lines."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

Line = dict[str, Any]
Unit = TypeVar("Unit")

# Asking for a GPU otherwise begins its use, after which no process can be forked that uses one.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


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
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # the last line may have been cut
        if whole != text:
            path.write_text(whole, encoding="utf-8")
        self.lines: list[Line] = [json.loads(line) for line in whole.splitlines()]

    def add(self, lines: Iterable[Line]) -> None:
        """Write lines at the end."""
        lines = list(lines)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(line) + "\n" for line in lines)
        self.lines += lines


def work_off(
    units: Sequence[Unit],
    do: Callable[[Unit], list[Line]],
    journal: Journal,
    *,
    jobs: int = 1,
    threads: int = 1,
    minutes: float | None = None,
) -> int:
    """Do units in order, in forked processes; one that fails is said, and the others go on.

    Parameters
    ----------
    units : sequence
        What to do.
    do : callable
        Does one and returns its lines for the journal.
    journal : Journal
    jobs : int
        Processes; with 1 the units are done here, with the threads that there are.
    threads : int
        Of each process.
    minutes : float, optional
        After these no further unit is begun.

    Returns
    -------
    int
        How many failed.
    """
    failed = 0
    waiting, end = list(units), None if minutes is None else time.monotonic() + 60 * minutes
    pool = _pool(jobs, threads) if jobs > 1 else None
    running: dict[Future[list[Line]], Unit] = {}
    while waiting or running:
        late = end is not None and time.monotonic() > end
        while waiting and not late and len(running) < jobs:
            unit = waiting.pop(0)
            running[_begin(pool, do, unit)] = unit
        if not running:
            break
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            unit, error = running.pop(future), future.exception()
            left = f"{len(waiting)} waiting, {len(running)} running"
            said = f"{time.strftime('%H:%M:%S')} {unit}{': FAILED' * (error is not None)}: {left}"
            print(said, file=sys.stderr, flush=True)
            if error is not None:
                failed += 1
                traceback.print_exception(error, file=sys.stderr)
                continue
            journal.add(future.result())
    if pool is not None:
        pool.shutdown()
    return failed


def apart(function: Callable[..., object], *arguments: object) -> None:
    """Call a function in a process of its own: forked processes want none that has used a GPU."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(function, *arguments).result()


def _pool(jobs: int, threads: int) -> ProcessPoolExecutor:
    """Forked processes share what is imported already."""
    context = multiprocessing.get_context("fork")
    return ProcessPoolExecutor(jobs, context, initializer=_set_threads, initargs=(threads,))


def _set_threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)


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
