"""Pictures of as many channels as a network takes: grey, colour, or more bands, also as arrays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from svftool.errors import DataError, system_fault
from svftool.tasks.images import (
    ARRAY_SUFFIX,
    Depth,
    ImagePath,
    depth_of,
    is_array,
    open_image,
    open_raw,
    refuse_long,
    scaled,
    to_tensor,
    upright,
)

COLOURS = 3
Target = Callable[[tuple[int, int]], list[int] | None]
"""From an image's own height and width to what it is resized to; None leaves it."""

_GREY = frozenset({"1", "L", "LA", "La"})
_FULL = {np.dtype(np.uint8): 255.0, np.dtype(np.uint16): 65535.0, np.dtype(np.bool_): 1.0}
"""What is white in an array of whole numbers; of floats it is 1."""


def load_picture(
    path: ImagePath,
    channels: int,
    *,
    target: Target,
    interpolation: str,
    short_side: int | None = None,
) -> Tensor:
    """Decode and resize one picture for a network: (channels, height, width) uint8.

    Grey becomes three equal channels where the network takes three. Nothing else is converted: a
    picture of other channels is refused, but for colours that are all grey.

    Parameters
    ----------
    path : ImagePath
        A picture, or an array of NumPy (``.npy``): (H, W), (H, W, channels) or (channels, H, W).
    channels : int
        Those of the network's first convolution.
    target : callable
        What it is resized to.
    interpolation : str
        Name of a torchvision ``InterpolationMode``.
    short_side : int, optional
        What the short side will be resized to.

    Raises
    ------
    DataError
        If the file is no picture, or one of other channels.
    """
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import resize

    mode = InterpolationMode(interpolation)
    if channels == COLOURS and not is_array(path):
        image = open_image(path, short_side=short_side)
        size = target((image.height, image.width))
        return to_tensor(image if size is None else resize(image, size, mode))
    refuse_long(path, short_side)
    bands = _array(Path(str(path)), channels) if is_array(path) else _bands(path, channels)
    size = target((bands.shape[1], bands.shape[2]))
    # Bands are resized each on its own: Pillow would take a fourth one for transparency.
    resized: Tensor = bands if size is None else resize(bands, size, mode, antialias=True)
    return resized


def _array(path: Path, channels: int) -> Tensor:
    """Read an array as (channels, H, W) uint8."""
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        system_fault(error, path)
        raise DataError(f"{path}: {error}, expected an array of numbers as .npy") from error
    shape = values.shape
    if values.ndim == 2:
        values = values[None]
    elif values.ndim == 3 and shape[0] != channels and shape[2] in (channels, 1):
        values = np.moveaxis(values, 2, 0)
    if values.ndim == 3 and values.shape[0] == 1 and channels == COLOURS:
        values = np.repeat(values, COLOURS, axis=0)
    if values.ndim != 3 or values.shape[0] != channels or not values.size:
        raise DataError(
            f"{path}: an array of {shape}, expected (height, width, {channels}) or ({channels}, "
            f"height, width): the model takes {channels} channels"
        )
    return torch.from_numpy(np.ascontiguousarray(_bytes(values, path)))


def _bytes(values: npt.NDArray[Any], path: Path) -> npt.NDArray[np.uint8]:
    if values.dtype == np.uint8:
        return values
    white = 1.0 if values.dtype.kind == "f" else _FULL.get(values.dtype)
    if white is None:
        raise DataError(
            f"{path}: values of {values.dtype}, expected uint8, uint16, or floats from 0 to 1"
        )
    return scaled(values, Depth(black=0.0, white=white), path)


def _bands(path: ImagePath, channels: int) -> Tensor:
    """Read a picture's own bands as (channels, H, W) uint8."""
    with open_raw(path) as opened:
        deep = depth_of(opened, path)
        image = upright(opened)
        mode, values = image.mode, np.asarray(image)
        if deep is not None:
            mode, values = "L", scaled(values, deep, path)
        elif mode == "P" or (channels == 1 and mode in _GREY):
            image = image.convert("RGB" if mode == "P" else "L")
            mode, values = image.mode, np.asarray(image)
    bands = values[None] if values.ndim == 2 else np.moveaxis(values, 2, 0)
    if channels == 1 and mode in ("RGB", "RGBA") and _is_grey(bands):
        bands = bands[:1]
    if bands.shape[0] != channels:
        more = f" ({ARRAY_SUFFIX} holds any number)" if channels > COLOURS else ""
        raise DataError(
            f"{path}: a picture of {bands.shape[0]} channels ({mode}), the model takes {channels}. "
            f"Convert the pictures{more}, or name another model with --model"
        )
    return torch.from_numpy(np.array(bands))


def _is_grey(bands: npt.NDArray[np.uint8]) -> bool:
    return bool((bands[0] == bands[1]).all() and (bands[0] == bands[2]).all())
