"""Masks on disk and on square canvases: maps of class numbers, binary masks, what each holds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from svftool.errors import DataError
from svftool.progress import SILENT, Progress
from svftool.tasks.images import class_numbers, open_raw

if TYPE_CHECKING:
    from PIL.Image import Image

IGNORE = 255
"""Label of pixels that count neither for nor against a prediction."""

Mask = npt.NDArray[np.uint8]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def read_label_map(path: Path) -> Mask:
    """Read a map of class numbers.

    Parameters
    ----------
    path : Path
        A grey or indexed image (VOC's palette files are indexed: their numbers are the classes), or
        an SBD ``.mat`` file of class segmentation.

    Returns
    -------
    (height, width) uint8 array
        Class numbers; 0 is background, 255 is ignored.

    Raises
    ------
    DataError
        If the file is no mask, or has colours or transparent pixels instead of numbers.
    """
    if path.suffix == ".mat":
        return _read_sbd(path)
    with _opened(path) as picture:
        return class_numbers(picture, path)


def read_binary(path: Path) -> Mask:
    """Read a mask of one class: 1 where the picture shows an object, which is not black, else 0.

    In grey and colour pictures the object is at least half bright in some channel. An indexed one
    is taken by the colours of its palette, of which any that is not black is an object's. What is
    transparent is not shown; where nothing else is, the object is what is not transparent.

    Returns
    -------
    (height, width) uint8 array

    Raises
    ------
    DataError
        If the file is no image.
    """
    with _opened(path) as picture:
        return _shown(picture).astype(np.uint8)


def _shown(picture: Image) -> npt.NDArray[np.bool_]:
    """Find the pixels that an image shows and that are not black."""
    mode = picture.mode
    if mode not in _DEEP and ("transparency" in picture.info or mode in _WITH_ALPHA):
        pixels = np.asarray(picture.convert("RGBA"))
        seen = pixels[..., 3] >= _HALF
        # An alpha channel that hides everything, or nothing, says nothing.
        if seen.any() and not seen.all():
            return _of_visible(pixels[..., :3].max(axis=2), seen, mode)
    values = np.asarray(picture if mode in _PLAIN else picture.convert("RGB"))
    bright = np.nan_to_num(values if values.ndim == 2 else values.max(axis=2))
    return np.asarray(bright >= _least(float(bright.max(initial=0)), mode))


def _of_visible(bright: Mask, seen: npt.NDArray[np.bool_], mode: str) -> npt.NDArray[np.bool_]:
    """Find what is not black among the pixels that can be seen; all of them where all are black."""
    brightest = float(bright[seen].max())
    least = _least(brightest, mode) if mode in _INDEXED or brightest <= 1 else _NEARLY_BLACK
    found = seen & (bright >= least)
    return found if found.any() else seen


def _least(brightest: float, mode: str) -> float:
    """Return what counts as bright in a mask, by the brightest value in it."""
    if mode in _INDEXED:
        return _NEARLY_BLACK if brightest >= _COLOURS_FROM else 1.0
    if brightest <= 1.0:
        return 0.5
    within = _NEARLY_BLACK < brightest < _HALF or brightest > IGNORE
    return brightest / 2 if within else _HALF


_INDEXED = frozenset({"P", "PA"})
_WITH_ALPHA = frozenset({"LA", "La", "PA", "RGBA", "RGBa"})
_DEEP = frozenset({"I", "F", "I;16", "I;16B", "I;16L", "I;16N"})
_PLAIN = _DEEP | {"1", "L", "RGB"}
_HALF = 128.0
_NEARLY_BLACK = 16.0
"""Below it is what compression leaves of black."""
_COLOURS_FROM = 64.0
"""A palette without brighter colours is a ramp of grey whose steps are numbers."""


def mask_of(mask: Mask, label: int) -> Mask:
    """Turn a map of class numbers into a mask of one class.

    Parameters
    ----------
    mask : (height, width) uint8 array
        Class numbers, 255 for ignored pixels.
    label : int
        The class.

    Returns
    -------
    (height, width) uint8 array
        1 for the class, 255 kept, 0 elsewhere.

    Examples
    --------
    >>> mask_of(np.array([[0, 3, 7, 255]], dtype=np.uint8), 3)
    array([[  0,   1,   0, 255]], dtype=uint8)
    """
    return np.where(mask == IGNORE, IGNORE, mask == label).astype(np.uint8)


def class_areas(mask: Mask) -> dict[int, int]:
    """Count the pixels of each class in a map, background and ignored pixels left out."""
    counts = np.bincount(mask.ravel(), minlength=IGNORE + 1)
    return {int(c): int(counts[c]) for c in np.flatnonzero(counts[1:IGNORE]) + 1}


def mapped(
    work: Callable[[_Item], _Result],
    items: Sequence[_Item],
    *,
    description: str,
    progress: Progress = SILENT,
) -> list[_Result]:
    """Apply `work` to every item on a few threads, in order, with progress."""
    threads = min(4, os.cpu_count() or 1)
    results = []
    with (
        ThreadPoolExecutor(threads) as pool,
        progress.task(description, total=len(items), unit="files") as task,
    ):
        for result in _in_order(pool, work, items):
            results.append(result)
            task.advance()
    return results


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[[_Item], _Result], items: Sequence[_Item]
) -> Iterable[_Result]:
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _opened(path: Path) -> Iterator[Image]:
    if not path.is_file():
        raise DataError(f"{path}: not found, expected a mask")
    with open_raw(path) as picture:
        yield picture


def _read_sbd(path: Path) -> Mask:
    from scipy.io import loadmat

    try:
        segmentation = loadmat(str(path))["GTcls"]["Segmentation"][0, 0]
    except Exception as error:
        raise DataError(
            f"{path}: no GTcls.Segmentation ({type(error).__name__}), expected an SBD class file"
        ) from error
    return np.asarray(segmentation, dtype=np.uint8)


# Images on square canvases: how a picture of any size becomes an input, and the way back.


Alignment = Literal["content", "canvas"]


@dataclass(frozen=True)
class CanvasPlacement:
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


def place(height: int, width: int, canvas: int) -> CanvasPlacement:
    """Fit a picture of a size to a canvas.

    Examples
    --------
    >>> place(333, 500, 473)
    CanvasPlacement(height=312, width=472)
    >>> place(375, 250, 97)
    CanvasPlacement(height=96, width=64)
    """
    longer = max(height, width)
    fitted = [canvas if side == longer else side * canvas // longer for side in (height, width)]
    rows, columns = (max(side // 8, 1) * 8 for side in fitted)
    return CanvasPlacement(rows, columns)


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
    """Return the canvas pixel under each pixel of one side of the picture."""
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
