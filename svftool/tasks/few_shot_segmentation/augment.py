"""The papers' training augmentation: scale, rotate, blur, flip, crop."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from svftool.tasks.few_shot_segmentation.masks import IGNORE

FILL = (124, 116, 104)
"""ImageNet's mean colour, around the edges of turned and small pictures."""
KEPT_SHARE = 0.85
"""Of the object, in a crop that is accepted at once."""
TRIES = 30


@dataclass(frozen=True)
class Ranges:
    """How far pictures are distorted.

    Attributes
    ----------
    scale : (float, float)
        Factor of size.
    degrees : float
        Rotation to either side, for half of the pictures.
    longest : float
        Pictures whose longer side is more than so many canvases are first scaled down to it.
    """

    scale: tuple[float, float]
    degrees: float = 10.0
    longest: float = 1.06


PAPER_RANGES = Ranges(scale=(0.9, 1.1))
"""Of PFENet, BAM and SVF on Pascal-5i; a picture of VOC (500 pixels) keeps its size at 473."""
COCO_RANGES = Ranges(scale=(0.8, 1.25))


def distort(
    picture: Tensor, mask: Tensor, canvas: int, random: np.random.Generator, ranges: Ranges
) -> tuple[Tensor, Tensor]:
    """Distort a picture and its mask alike.

    Parameters
    ----------
    picture : (3, height, width) uint8 Tensor
    mask : (height, width) uint8 Tensor
        255 is ignored.
    canvas : int
        Side of the result.
    random : Generator
        Source of all choices.
    ranges : Ranges
        How far.

    Returns
    -------
    (3, canvas, canvas) uint8 Tensor, (canvas, canvas) uint8 Tensor
        The crop is drawn again, up to 30 times, where it loses more than 15 % of the object.
    """
    picture, mask = _scaled(picture, mask, canvas, random, ranges)
    if random.random() < 0.5:
        picture, mask = _rotated(picture, mask, random.uniform(-ranges.degrees, ranges.degrees))
    if random.random() < 0.5:
        picture = _blurred(picture)
    if random.random() < 0.5:
        picture, mask = picture.flip(2), mask.flip(1)
    return _cropped(*_padded(picture, mask, canvas), canvas, random)


def _scaled(
    picture: Tensor, mask: Tensor, canvas: int, random: np.random.Generator, ranges: Ranges
) -> tuple[Tensor, Tensor]:
    height, width = mask.shape
    factor = min(1.0, ranges.longest * canvas / max(height, width)) * random.uniform(*ranges.scale)
    size = (max(round(height * factor), 1), max(round(width * factor), 1))
    scaled = F.interpolate(picture[None], size=size, mode="bilinear", antialias=True)[0]
    return scaled, F.interpolate(mask[None, None], size=size, mode="nearest-exact")[0, 0]


def _rotated(picture: Tensor, mask: Tensor, degrees: float) -> tuple[Tensor, Tensor]:
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import rotate

    turned = rotate(picture, degrees, InterpolationMode.BILINEAR, fill=list(FILL))
    return turned, rotate(mask[None], degrees, InterpolationMode.NEAREST, fill=[IGNORE])[0]


def _blurred(picture: Tensor) -> Tensor:
    from torchvision.transforms.v2.functional import gaussian_blur

    blurred: Tensor = gaussian_blur(picture, [5, 5])
    return blurred


def _padded(picture: Tensor, mask: Tensor, canvas: int) -> tuple[Tensor, Tensor]:
    height, width = mask.shape
    missing = max(canvas - height, 0), max(canvas - width, 0)
    if not any(missing):
        return picture, mask
    size = height + missing[0], width + missing[1]
    top, left = missing[0] // 2, missing[1] // 2
    wide = torch.tensor(FILL, dtype=torch.uint8).view(3, 1, 1).repeat(1, *size)
    wide[:, top : top + height, left : left + width] = picture
    ignored = torch.full(size, IGNORE, dtype=torch.uint8)
    ignored[top : top + height, left : left + width] = mask
    return wide, ignored


def _cropped(
    picture: Tensor, mask: Tensor, canvas: int, random: np.random.Generator
) -> tuple[Tensor, Tensor]:
    height, width = mask.shape
    object_size = int((mask == 1).sum())
    top = left = 0
    for _ in range(TRIES):
        top = int(random.integers(height - canvas + 1))
        left = int(random.integers(width - canvas + 1))
        inside = mask[top : top + canvas, left : left + canvas]
        if int((inside == 1).sum()) >= KEPT_SHARE * object_size:
            break
    window = slice(top, top + canvas), slice(left, left + canvas)
    return picture[:, *window].contiguous(), mask[window].contiguous()
