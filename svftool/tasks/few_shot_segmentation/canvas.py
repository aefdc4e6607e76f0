"""Images on square canvases: how a picture of any size becomes an input, and the way back.

The rule of PFENet and BAM: the longer side is scaled to the canvas, both sides are rounded down to
a multiple of 8, and the result is pasted into the upper left corner of a black canvas (before
normalisation) and of a canvas of 255 for the mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from svftool.tasks.few_shot_segmentation.masks import IGNORE, Mask

Alignment = Literal["content", "canvas"]


@dataclass(frozen=True)
class Placement:
    """Height and width, in pixels of the canvas, of the picture in its upper left corner."""

    height: int
    width: int


def canvas_side(image_size: int) -> int:
    """Round an image size to the nearest ``8 k + 1``, so that features of stride 8 fall on pixels.

    Examples
    --------
    >>> [canvas_side(size) for size in (96, 128, 473, 641)]
    [97, 129, 473, 641]
    """
    return max(round((image_size - 1) / 8), 1) * 8 + 1


def place(height: int, width: int, canvas: int) -> Placement:
    """Fit a picture of a size to a canvas.

    Examples
    --------
    >>> place(333, 500, 473)
    Placement(height=312, width=472)
    >>> place(375, 250, 97)
    Placement(height=96, width=64)
    """
    longer = max(height, width)
    fitted = [canvas if side == longer else side * canvas // longer for side in (height, width)]
    rows, columns = (max(side // 8, 1) * 8 for side in fitted)
    return Placement(rows, columns)


def paste_image(picture: Tensor, canvas: int) -> Tensor:
    """Scale a picture and paste it on a black canvas.

    Parameters
    ----------
    picture : (3, height, width) uint8 Tensor
    canvas : int
        Side of the canvas.

    Returns
    -------
    (3, canvas, canvas) uint8 Tensor
    """
    spot = place(picture.shape[1], picture.shape[2], canvas)
    pasted = picture.new_zeros((3, canvas, canvas))
    pasted[:, : spot.height, : spot.width] = resize_image(picture, spot.height, spot.width)
    return pasted


def paste_mask(mask: Mask, canvas: int) -> Mask:
    """Scale a mask by its nearest pixels and paste it on a canvas of ignored pixels."""
    spot = place(mask.shape[0], mask.shape[1], canvas)
    pasted = np.full((canvas, canvas), IGNORE, dtype=np.uint8)
    pasted[: spot.height, : spot.width] = resize_mask(mask, spot.height, spot.width)
    return pasted


def resize_image(picture: Tensor, height: int, width: int) -> Tensor:
    """Resize a (3, h, w) uint8 picture, smoothly and without aliasing."""
    return F.interpolate(picture[None], size=(height, width), mode="bilinear", antialias=True)[0]


def resize_mask(mask: Mask, height: int, width: int) -> Mask:
    """Resize a mask by its nearest pixels."""
    rows = (np.arange(height) * 2 + 1) * mask.shape[0] // (2 * height)
    columns = (np.arange(width) * 2 + 1) * mask.shape[1] // (2 * width)
    return np.ascontiguousarray(mask[rows[:, None], columns[None, :]])


def predict_at(
    logits: Tensor, size: tuple[int, int], canvas: int, *, alignment: Alignment = "content"
) -> npt.NDArray[np.bool_]:
    """Turn the logits of one canvas into a prediction at the picture's own size.

    Parameters
    ----------
    logits : (2, h, w) Tensor
        Background and foreground on a grid whose corners are the canvas' corner pixels.
    size : (int, int)
        Height and width of the original picture.
    canvas : int
        Side of the canvas.
    alignment : {"content", "canvas"}
        ``content`` looks up each pixel where the picture lies on the canvas. ``canvas`` is what
        PFENet and BAM do: the canvas is stretched over a square of the picture's longer side,
        although rounding to multiples of 8 has shrunk the picture on it.

    Returns
    -------
    (height, width) bool array
        True where the foreground's logit is the larger one.
    """
    difference = (logits[1] - logits[0]).double().cpu()
    spot = place(*size, canvas)
    sides = zip(size, (spot.height, spot.width), difference.shape, strict=True)
    rows, columns = (
        _interpolation(_positions(side, on_canvas, max(size), canvas, alignment), canvas, length)
        for side, on_canvas, length in sides
    )
    return (rows @ difference @ columns.T > 0).numpy()


def _positions(
    side: int, on_canvas: int, longer: int, canvas: int, alignment: Alignment
) -> npt.NDArray[np.float64]:
    """Give the canvas pixel under each pixel of one side of the picture."""
    pixels = np.arange(side, dtype=np.float64)
    if alignment == "canvas":
        return pixels * (canvas - 1) / max(longer - 1, 1)
    return (pixels + 0.5) * on_canvas / side - 0.5


def _interpolation(positions: npt.NDArray[np.float64], canvas: int, length: int) -> Tensor:
    """Make the (pixels, length) matrix that interpolates a line of features at canvas positions."""
    places = np.clip(positions * (length - 1) / (canvas - 1), 0, length - 1)
    low = np.minimum(places.astype(np.int64), max(length - 2, 0))
    share = places - low
    matrix = np.zeros((len(places), length))
    index = np.arange(len(places))
    matrix[index, low] += 1 - share
    matrix[index, np.minimum(low + 1, length - 1)] += share
    return torch.from_numpy(matrix)


def normalise(canvases: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Turn (B, 3, H, W) uint8 pictures into float32 network input: [0, 1], less mean, over std."""
    scale = 1 / (255 * torch.tensor(std, device=canvases.device))
    shift = torch.tensor(mean, device=canvases.device) / torch.tensor(std, device=canvases.device)
    return canvases.float() * scale.view(1, -1, 1, 1) - shift.view(1, -1, 1, 1)
