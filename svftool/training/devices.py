"""The device that ``--device`` names."""

from __future__ import annotations

import torch

from svftool.errors import UsageError


def pick_device(name: str) -> torch.device:
    """Read ``auto``, ``cpu``, ``cuda`` or ``cuda:1``; ``auto`` takes the first GPU if there is one.

    Raises
    ------
    UsageError
        If the name means nothing, or that GPU is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name!r}, expected auto, cpu, cuda or cuda:INDEX") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {name!r}: {torch.cuda.device_count()} GPUs are available. Use --device cpu"
        )
    return device
