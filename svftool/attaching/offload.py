"""Keep frozen weights in a file instead of in memory: nothing reads them while factors stand in."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import nn

from svftool.checkpoints import write_errors


@torch.no_grad()
def offload(parameter: nn.Parameter) -> None:
    """Move a parameter's values into a file that the system reads back when they are used.

    The parameter stays what it is for all who use it. The file is in the folder for temporary
    files, has no name any more, and goes when the parameter does. Parameters that are not on the
    CPU stay where they are.

    Parameters
    ----------
    parameter : Parameter
        Of a floating dtype that numpy has; changed in place.

    Raises
    ------
    ResourceError
        If the folder for temporary files has no room.
    """
    if parameter.device.type != "cpu" or not parameter.numel():
        return
    values = parameter.detach()
    layout = _dense_order(values)
    stored = values.permute(layout).contiguous()
    handle, name = tempfile.mkstemp(prefix="svftool-")
    try:
        with write_errors(Path(name)), os.fdopen(handle, "wb") as file:
            stored.numpy().tofile(file)
        mapped = torch.from_file(name, size=stored.numel(), dtype=stored.dtype)
    finally:
        Path(name).unlink()
    back = tuple(layout.index(dim) for dim in range(values.ndim))
    parameter.data = mapped.reshape(stored.shape).permute(back)


def _dense_order(values: torch.Tensor) -> tuple[int, ...]:
    """Return the dimensions from the outermost in memory to the innermost."""
    strides = values.stride()
    return tuple(sorted(range(values.ndim), key=lambda dim: -strides[dim]))
