"""Masks on disk: maps of class numbers, binary masks, and what each holds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from svftool.errors import DataError, MissingDependencyError
from svftool.progress import SILENT, Progress

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
        If the file is no mask, or has colours instead of numbers.
    """
    if path.suffix == ".mat":
        return _read_sbd(path)
    pixels, mode = _read(path)
    if pixels.ndim != 2 or mode not in {"P", "L", "1", "I;16", "I"}:
        raise DataError(
            f"{path}: a colour image ({mode}), expected a map of class numbers (grey or indexed)"
        )
    if pixels.max(initial=0) > IGNORE:
        raise DataError(f"{path}: class number {pixels.max()}, expected at most {IGNORE}")
    return pixels.astype(np.uint8)


def read_binary(path: Path) -> Mask:
    """Read a mask of one class: 1 where any channel is at least half bright, else 0.

    Returns
    -------
    (height, width) uint8 array

    Raises
    ------
    DataError
        If the file is no image.
    """
    pixels, mode = _read(path)
    if mode in {"LA", "RGBA", "PA"}:
        pixels = pixels[..., :-1]
    least = 1 if mode in {"P", "1"} or pixels.max(initial=0) == 1 else 128
    bright = pixels >= least
    return np.asarray(bright.any(axis=2) if bright.ndim == 3 else bright, dtype=np.uint8)


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


def _read(path: Path) -> tuple[npt.NDArray[np.integer], str]:
    try:
        from PIL import Image
    except ImportError:
        raise MissingDependencyError("PIL", extra="vision", purpose="reading masks") from None
    try:
        with Image.open(path) as image:
            return np.asarray(image), image.mode
    except Exception as error:
        if not path.is_file():
            raise DataError(f"{path}: not found, expected a mask") from error
        raise DataError(f"{path}: cannot be read as a mask ({type(error).__name__})") from error


def _read_sbd(path: Path) -> Mask:
    from scipy.io import loadmat

    try:
        segmentation = loadmat(str(path))["GTcls"]["Segmentation"][0, 0]
    except Exception as error:
        raise DataError(
            f"{path}: no GTcls.Segmentation ({type(error).__name__}), expected an SBD class file"
        ) from error
    return np.asarray(segmentation, dtype=np.uint8)
