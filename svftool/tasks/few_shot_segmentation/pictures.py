"""Images and masks from disk, ready for the network, and kept in memory once read."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from svftool.tasks.few_shot_segmentation.augment import PAPER_RANGES, Ranges, distort
from svftool.tasks.few_shot_segmentation.canvas import paste_image, paste_mask
from svftool.tasks.few_shot_segmentation.masks import Mask, mask_of, read_binary, read_label_map
from svftool.tasks.few_shot_segmentation.pool import Pair
from svftool.tasks.images import open_image, to_tensor

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
        """Give the value of a key, or None where it is not kept."""
        with self._lock:
            if key not in self._held:
                return None
            self._held.move_to_end(key)
            return self._held[key]

    def get(self, key: Hashable, make: Callable[[], _Value]) -> _Value:
        """Give the value of a key, made and kept where there is none."""
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

    def images(self, pairs: Sequence[Pair], flipped: Sequence[bool]) -> Tensor:
        """Give pictures on their canvases, some mirrored: (N, 3, canvas, canvas) uint8."""
        wanted = list(zip(pairs, flipped, strict=True))
        with ThreadPoolExecutor(THREADS) as threads:
            return torch.stack(list(threads.map(lambda each: self.image(*each), wanted)))

    def image(self, pair: Pair, flipped: bool = False) -> Tensor:
        """Give one picture on its canvas: (3, canvas, canvas) uint8."""

        def make() -> Tensor:
            picture = to_tensor(open_image(pair.image))
            return paste_image(picture.flip(2) if flipped else picture, self.canvas)

        return self._images.get((pair.image, flipped), make)

    def mask(self, pair: Pair, label: int, *, flipped: bool = False) -> Tensor:
        """Give the mask of a class on its canvas: (canvas, canvas) uint8 of 0, 1 and 255."""
        mask = self.truth(pair, label)
        turned = np.ascontiguousarray(mask[:, ::-1]) if flipped else mask
        return torch.from_numpy(paste_mask(turned, self.canvas))

    def truth(self, pair: Pair, label: int) -> Mask:
        """Give the mask of a class at the picture's own size: 0, 1 and 255."""
        labels = self.labels(pair)
        if pair.label is None:
            return mask_of(labels, label)
        if label != pair.label:
            raise ValueError(f"{pair.mask} is a mask of class {pair.label}, not of {label}")
        return labels

    def labels(self, pair: Pair) -> Mask:
        """Give what the mask's file holds: class numbers, or 0 and 1 in a binary mask."""
        reader = read_label_map if pair.label is None else read_binary
        return self._masks.get(pair.mask, lambda: reader(pair.mask))

    def distorted(
        self, pair: Pair, label: int, random: np.random.Generator, ranges: Ranges = PAPER_RANGES
    ) -> tuple[Tensor, Tensor]:
        """Give the picture and the mask of a class, scaled, rotated, blurred, flipped and cropped.

        Returns
        -------
        (3, canvas, canvas) uint8 Tensor, (canvas, canvas) uint8 Tensor
        """
        picture, mask = to_tensor(open_image(pair.image)), self.truth(pair, label)
        return distort(picture, torch.from_numpy(mask), self.canvas, random, ranges)

    def all_distorted(
        self,
        asked: Sequence[tuple[Pair, int]],
        random: np.random.Generator,
        ranges: Ranges = PAPER_RANGES,
    ) -> tuple[Tensor, Tensor]:
        """Give pictures with the masks of their classes, each distorted in a way of its own.

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
