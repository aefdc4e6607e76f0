"""How a CPU keeps the kernels and maps of convolutions: the channels of each pixel together.

PyTorch calls it channels last. A training step of a network of torchvision takes between 0.6 of the
time and as long as otherwise (benchmarks/layout.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from svftool.tasks.base import device_of

T = TypeVar("T")


def in_suited_layout(model: nn.Module, forward: Callable[[], T]) -> T:
    """Run a model's first pass over images, and leave its kernels in the layout that suits it.

    On a CPU that is channels last. A model that takes its maps apart with ``Tensor.view`` runs with
    the channels apart alone; what the pass raises tells it.

    Parameters
    ----------
    model : nn.Module
        The layout of its kernels changes, no number of them.
    forward : callable
        The pass, in evaluation mode and without gradients; run twice if the first one fails.

    Returns
    -------
    object
        What `forward` returned.
    """
    if device_of(model).type != "cpu":
        return forward()
    _lay_out(model, torch.channels_last)
    try:
        return forward()
    except RuntimeError:
        _lay_out(model, torch.contiguous_format)
        return forward()


def _lay_out(model: nn.Module, layout: torch.memory_format) -> None:
    # A kernel that was laid out in inference mode could not be trained.
    with torch.inference_mode(mode=False):
        convert_conv2d_weight_memory_format(model, layout)
