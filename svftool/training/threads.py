"""How many threads a network gets: a small one is done sooner, and at far less cost, on one.

The threads of a kernel wait for one another in a loop. Where a kernel takes microseconds, nearly
all of the time goes into that, and on a busy machine most of it is waiting for threads that do not
run at all.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from svftool.machine import usual_threads
from svftool.tasks.base import Draw, device_of, to_device
from svftool.training.batches import generator_for, repeatable

LEAST_WORK = 1e9
"""Floating-point operations of a batch, forward, below which a network gets one thread.

Measured with benchmarks/threads.py on two busy cores: below it two threads took 6 to 33 times the
processor time of one.
"""
EXAMPLES = 16
"""Examples of the batch that is counted, where nothing is trained."""

_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def threads_are_chosen() -> bool:
    """Whether the user has said how many threads there are: then there are as many.

    By a variable of the environment, or by `torch.set_num_threads` with another number than the
    machine's own.
    """
    return any(os.environ.get(name) for name in _VARIABLES) or (
        torch.get_num_threads() not in usual_threads()
    )


@contextmanager
def suited_threads(model: nn.Module, draw: Draw, batch_size: int = EXAMPLES) -> Iterator[None]:
    """Context in which a network that is too small for several threads runs on one.

    What is decided depends on the network, the data and `LEAST_WORK` alone.

    Parameters
    ----------
    model : nn.Module
        On the device where it runs; on a GPU nothing changes.
    draw : Draw
        What it runs on.
    batch_size : int
        Examples of the batch that is counted.
    """
    before = torch.get_num_threads()
    one = before > 1 and not threads_are_chosen() and device_of(model).type == "cpu"
    if not one or batch_work(model, draw, batch_size) >= LEAST_WORK:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def batch_work(model: nn.Module, draw: Draw, batch_size: int) -> float:
    """Count the floating-point operations of a batch, forward.

    Infinite where they cannot be counted. The model and the generators stay as they are.
    """
    size = min(batch_size, draw.size)
    # Each weight takes part at least once an example: of a large network nothing need be run.
    least = 2.0 * size * sum(one.numel() for one in model.parameters())
    return least if least >= LEAST_WORK else max(least, _counted(model, draw, size))


def _counted(model: nn.Module, draw: Draw, size: int) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    device, modes = device_of(model), [(one, one.training) for one in model.modules()]
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), repeatable(device):
            batch = draw.batch(torch.arange(size), generator_for("work"))
            model.eval()
            with counter:
                draw.loss(model, to_device(batch, device))
    except Exception:  # noqa: BLE001  (foreign code; whatever is wrong shows when it is trained)
        return math.inf
    finally:
        for module, mode in modes:
            module.training = mode
    return float(counter.get_total_flops())
