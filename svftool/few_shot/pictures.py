"""Images and masks from disk, ready for the network, and kept in memory once read."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from svftool.few_shot.masks import (
    IGNORE,
    Mask,
    mask_of,
    paste_image,
    paste_mask,
    read_binary,
    read_label_map,
)
from svftool.few_shot.pool import ImageMaskPair
from svftool.tasks.images import open_image, to_tensor

# The papers' training augmentation: scale, rotate, blur, flip, crop.


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


Augment = Literal["none", "light", "strong"]

THREADS = 4

_Value = TypeVar("_Value")


class ByteCache(Generic[_Value]):
    """The most recently used values, up to a number of bytes.

    Parameters
    ----------
    capacity : int
        Bytes to keep at most.
    size_of : callable
        Bytes of one value.
    """

    def __init__(self, capacity: int, size_of: Callable[[_Value], int]) -> None:
        self._capacity = capacity
        self._size_of = size_of
        self._held: OrderedDict[Hashable, _Value] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held

    def __len__(self) -> int:
        return len(self._held)

    def find(self, key: Hashable) -> _Value | None:
        """Return the value of a key, or None where it is not kept."""
        with self._lock:
            if key not in self._held:
                return None
            self._held.move_to_end(key)
            return self._held[key]

    def get(self, key: Hashable, make: Callable[[], _Value]) -> _Value:
        """Return the value of a key, made and kept where there is none."""
        found = self.find(key)
        if found is None:
            found = make()
            self.put(key, found)
        return found

    def put(self, key: Hashable, value: _Value) -> None:
        """Keep a value; the least recently used ones go where space is short."""
        with self._lock:
            if key in self._held:
                self._bytes -= self._size_of(self._held.pop(key))
            self._held[key] = value
            self._bytes += self._size_of(value)
            while self._bytes > self._capacity and self._held:
                _, dropped = self._held.popitem(last=False)
                self._bytes -= self._size_of(dropped)


def tensor_bytes(value: Any) -> int:
    """Count the bytes of a tensor, an array, or a dictionary or tuple of them."""
    if isinstance(value, dict):
        return sum(tensor_bytes(item) for item in value.values())
    if isinstance(value, tuple):
        return sum(tensor_bytes(item) for item in value)
    return int(value.nbytes)


class Pictures:
    """Pictures and masks of one canvas size.

    Parameters
    ----------
    canvas : int
        Side of the canvases.
    memory : int
        Bytes of decoded pictures, and again of masks, to keep.
    """

    def __init__(self, canvas: int, *, memory: int = 1 << 30) -> None:
        self.canvas = canvas
        self._images: ByteCache[Tensor] = ByteCache(memory, tensor_bytes)
        self._masks: ByteCache[Mask] = ByteCache(memory, tensor_bytes)

    def images(self, pairs: Sequence[ImageMaskPair], flipped: Sequence[bool]) -> Tensor:
        """Return pictures on their canvases, some mirrored: (N, 3, canvas, canvas) uint8."""
        wanted = list(zip(pairs, flipped, strict=True))
        with ThreadPoolExecutor(THREADS) as threads:
            return torch.stack(list(threads.map(lambda each: self.image(*each), wanted)))

    def image(self, pair: ImageMaskPair, flipped: bool = False) -> Tensor:
        """Return one picture on its canvas: (3, canvas, canvas) uint8."""

        def make() -> Tensor:
            picture = to_tensor(open_image(pair.image))
            return paste_image(picture.flip(2) if flipped else picture, self.canvas)

        return self._images.get((pair.image, flipped), make)

    def mask(self, pair: ImageMaskPair, label: int, *, flipped: bool = False) -> Tensor:
        """Return the mask of a class on its canvas: (canvas, canvas) uint8 of 0, 1 and 255."""
        mask = self.truth(pair, label)
        turned = np.ascontiguousarray(mask[:, ::-1]) if flipped else mask
        return torch.from_numpy(paste_mask(turned, self.canvas))

    def truth(self, pair: ImageMaskPair, label: int) -> Mask:
        """Return the mask of a class at the picture's own size: 0, 1 and 255."""
        labels = self.labels(pair)
        if pair.label is None:
            return mask_of(labels, label)
        if label != pair.label:
            raise ValueError(f"{pair.mask} is a mask of class {pair.label}, not of {label}")
        return labels

    def labels(self, pair: ImageMaskPair) -> Mask:
        """Return what the mask's file holds: class numbers, or 0 and 1 in a binary mask."""
        reader = read_label_map if pair.label is None else read_binary
        return self._masks.get(pair.mask, lambda: reader(pair.mask))

    def distorted(
        self,
        pair: ImageMaskPair,
        label: int,
        random: np.random.Generator,
        ranges: Ranges = PAPER_RANGES,
    ) -> tuple[Tensor, Tensor]:
        """Return a class's picture and mask, scaled, rotated, blurred, flipped and cropped.

        Returns
        -------
        (3, canvas, canvas) uint8 Tensor, (canvas, canvas) uint8 Tensor
        """
        picture, mask = to_tensor(open_image(pair.image)), self.truth(pair, label)
        return distort(picture, torch.from_numpy(mask), self.canvas, random, ranges)

    def all_distorted(
        self,
        asked: Sequence[tuple[ImageMaskPair, int]],
        random: np.random.Generator,
        ranges: Ranges = PAPER_RANGES,
    ) -> tuple[Tensor, Tensor]:
        """Return pictures with the masks of their classes, each distorted in a way of its own.

        Returns
        -------
        (N, 3, canvas, canvas) uint8 Tensor, (N, canvas, canvas) uint8 Tensor
        """
        with ThreadPoolExecutor(THREADS) as threads:
            made = threads.map(
                lambda one, source: self.distorted(one[0], one[1], source, ranges),
                asked,
                random.spawn(len(asked)),
            )
            images, masks = zip(*made, strict=True)
        return torch.stack(images), torch.stack(masks)
