"""A GPU that several threads share: streams, and what happens where its memory runs out."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from svftool.machine import is_out_of_memory

_T = TypeVar("_T")

# Measured on an H100, ViT-B/16: 1, 2 and 4 take 624, 476 and 429 ms, values alone 464, 364 and 326.
STREAMS = 4
"""Layers at a time: the transfers of one overlap with the work on another."""


class DoesNotFit(Exception):
    """A layer needs more memory than the whole device has free."""


class Gpu:
    """Runs layers on a device, a few at a time.

    The streams are made once: torch keeps freed memory by the stream it was used on, and a library
    keeps its work space by stream too, so that a new one for each layer would hold both as often.

    Parameters
    ----------
    device : torch.device
    streams : int
        Layers at a time.
    """

    def __init__(self, device: torch.device, streams: int = STREAMS) -> None:
        self.device = device
        self._count = streams
        self._free: queue.SimpleQueue[torch.cuda.Stream] = queue.SimpleQueue()
        self._loaded = False
        for _ in range(streams):
            self._free.put(_stream(device))
        self._alone, self._loading = threading.Lock(), threading.Lock()

    def run(self, tensor: Tensor, work: Callable[[Tensor], _T]) -> _T:
        """Run `work` on a copy of `tensor` on the device.

        Whether a layer is done there must not depend on what else is at work: one that does not
        fit beside others is tried again alone.

        Raises
        ------
        DoesNotFit
            If it does not fit alone either.
        """
        with self._streams(1) as stream:
            found = self._attempt(stream, tensor, work)
        if found is not None:
            return found[0]
        with self._alone, self._streams(self._count) as stream:
            _give_back()
            found = self._attempt(stream, tensor, work)
        if found is None:
            _give_back()
            raise DoesNotFit
        return found[0]

    def _attempt(
        self, stream: torch.cuda.Stream, tensor: Tensor, work: Callable[[Tensor], _T]
    ) -> tuple[_T] | None:
        """Return the result, or None where memory ran out; what was taken is free again then."""
        try:
            with torch.cuda.stream(stream):
                self._load_library()
                return (work(tensor.to(self.device)),)
        except (MemoryError, RuntimeError) as exc:
            if not is_out_of_memory(exc):
                raise
            return None

    def _load_library(self) -> None:
        """Have torch load its linear algebra, which two threads must not do at the same time.

        The second one would meet "lazy wrapper should be called at most once".
        """
        with self._loading:
            if not self._loaded:
                torch.linalg.eigh(torch.eye(2, dtype=torch.float64, device=self.device))
            self._loaded = True

    @contextmanager
    def _streams(self, count: int) -> Iterator[torch.cuda.Stream]:
        """Wait for so many streams and hold them; one of them is to be used."""
        taken = [self._free.get() for _ in range(count)]
        try:
            yield taken[0]
        finally:
            for stream in taken:
                self._free.put(stream)


def to_host(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU, from a device in page-locked memory.

    Fresh memory of any other kind is filled at a thirtieth of the rate: 41 against 1.3 ms for 64 MB
    on an H100.
    """
    if tensor.device.type == "cpu":
        return tensor
    try:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    except RuntimeError:  # the system does not lock as much
        return tensor.cpu()
    host.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return host


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _give_back() -> None:
    """Return what torch keeps of the device's memory to it."""
    torch.cuda.empty_cache()
