"""Batches that other processes load ahead of the steps."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from svftool.errors import SvftoolError, UsageError

Load = Callable[[int], Any]
"""Gives the batch of a step; it depends on the step alone, whichever process asks."""


class Ahead:
    """Loads the batches of a run, in processes of their own where there are any.

    Parameters
    ----------
    load : callable
    steps : int
        Of the whole run.
    workers : int
        Processes; with 0 each batch is loaded here when it is asked for.

    Raises
    ------
    UsageError
        If the system has no processes that begin as a copy of this one.
    """

    def __init__(self, load: Load, *, steps: int, workers: int) -> None:
        if workers and "fork" not in multiprocessing.get_all_start_methods():
            raise UsageError("--workers: this system cannot copy a process. Leave the option out")
        self._load, self._steps, self._workers = load, steps, workers
        self._coming: Iterator[Any] | None = None
        self._next = 0

    def batch(self, step: int) -> Any:
        """Return the batch of a step; the next one is expected to be asked for next.

        Raises
        ------
        SvftoolError
            As loading it here would.
        """
        if not self._workers:
            return self._load(step)
        if self._coming is None or step != self._next:
            self._coming = self._begin(step)
        self._next = step + 1
        found = next(self._coming)
        if isinstance(found, SvftoolError):
            raise found
        return found

    def close(self) -> None:
        """End the processes."""
        self._coming = None

    def _begin(self, first: int) -> Iterator[Any]:
        with warnings.catch_warnings():
            # Of more processes than cores, and of copying a process that has threads.
            warnings.simplefilter("ignore")
            loader = DataLoader(
                _Steps(self._load, first, max(first + 1, self._steps)),
                batch_size=None,
                num_workers=self._workers,
                collate_fn=_as_it_is,
                multiprocessing_context="fork",
                generator=torch.Generator(),
            )
            return iter(loader)


class _Steps(Dataset[Any]):
    """The batches of the steps from `first` to before `last`."""

    def __init__(self, load: Load, first: int, last: int) -> None:
        self._load, self._first, self._last = load, first, last

    def __len__(self) -> int:
        return self._last - self._first

    def __getitem__(self, index: int) -> Any:
        try:
            return self._load(self._first + index)
        except SvftoolError as error:
            # Raised where it is asked for: the loader would put a trace into its message.
            return error


def _as_it_is(batch: Any) -> Any:
    return batch
