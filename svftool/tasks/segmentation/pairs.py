"""Images with their label maps: how pairs are found, read and checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from svftool.errors import DataError, shortlist
from svftool.tasks.images import SUFFIXES, image_size, open_raw
from svftool.tasks.segmentation.classes import ClassTable

MAP_SUFFIXES = frozenset({".bmp", ".gif", ".png", ".tif", ".tiff"})
"""Formats of label maps; JPEG is none of them, because it blurs labels."""

LABELS = 256
READERS = 4
_SHOWN = 5

Labels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Pair:
    """An image, its label map, and the name that both share.

    Attributes
    ----------
    name : str
        Path of the image in its folder, without the suffix.
    image, mask : Path
    """

    name: str
    image: Path
    mask: Path


def list_pairs(
    data: Path, *, images: str = "images", masks: str = "masks", mask_suffix: str = ""
) -> list[Pair]:
    """Pair the images of one folder with the label maps of another, by their names.

    Parameters
    ----------
    data : Path
        Folder that holds both.
    images, masks : str
        Their names in it; sub-folders are searched and must be alike.
    mask_suffix : str
        What the maps' names have besides, before the dot: ``_L`` for ``x.jpg`` and ``x_L.png``.

    Raises
    ------
    DataError
        If a folder is missing or empty, or an image has no map.
    """
    pictures = _files(data, images, SUFFIXES, "--images")
    maps = _files(data, masks, MAP_SUFFIXES, "--masks")
    lonely = [name for name in pictures if name + mask_suffix not in maps]
    if lonely:
        raise DataError(
            f"{data / masks}: no label map for {len(lonely)} of {len(pictures)} images "
            f"({shortlist(lonely, _SHOWN)}), expected one of the same name "
            f"({', '.join(sorted(MAP_SUFFIXES))}). Add the maps or remove the images; where the "
            "maps' names end differently give --mask-suffix"
        )
    return [Pair(name, image, maps[name + mask_suffix]) for name, image in pictures.items()]


def _files(data: Path, name: str, suffixes: frozenset[str], option: str) -> dict[str, Path]:
    folder = data / name
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder, expected {name!r} in the data. Name it with {option}"
        )
    found: dict[str, Path] = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in suffixes:
            key = file.relative_to(folder).with_suffix("").as_posix()
            if key in found:
                raise DataError(
                    f"{file}: the name of {found[key].name} too, expected each name once"
                )
            found[key] = file
    if not found:
        raise DataError(f"{folder}: no files of {', '.join(sorted(suffixes))}, expected some")
    return found


def read_labels(path: Path, table: ClassTable | None, ignore: int) -> Labels:
    """Read a label map: (height, width) uint8.

    Parameters
    ----------
    path : Path
        A palette or grey picture holds class numbers; a colour picture needs the colours of
        `table`.
    table : ClassTable or None
        Classes and their colours.
    ignore : int
        Label of pixels without a class.

    Raises
    ------
    DataError
        If it is no picture, has colours that are no class, or numbers beyond 255.
    """
    with open_raw(path) as picture:
        coloured = picture.mode in ("RGB", "RGBA")
        values = np.asarray(picture.convert("RGB") if coloured else picture)
    if coloured:
        if table is None or not table.colours:
            raise DataError(
                f"{path}: a colour picture, expected class numbers. Give the classes' colours "
                "with --classes FILE, a line of name,red,green,blue each"
            )
        return table.labels_of(values, ignore=ignore, path=path)
    if values.ndim != 2 or values.min() < 0 or values.max() >= LABELS:
        raise DataError(
            f"{path}: shape {values.shape} with values from {values.min()} to {values.max()}, "
            f"expected one class number from 0 to {LABELS - 1} a pixel"
        )
    return values.astype(np.uint8)


def survey(pairs: Sequence[Pair], read: Callable[[Path], Labels]) -> npt.NDArray[np.int64]:
    """Count the labels of every map, and hold its size against its image's.

    Parameters
    ----------
    pairs : sequence of Pair
    read : callable
        Reads a label map.

    Returns
    -------
    (N, 256) ndarray of int64
        Pixels of each label.

    Raises
    ------
    DataError
        If sizes differ, or a file cannot be read.
    """

    def look(pair: Pair) -> tuple[npt.NDArray[np.int64], str | None]:
        labels, size = read(pair.mask), image_size(pair.image)
        counts = np.bincount(labels.ravel(), minlength=LABELS).astype(np.int64)
        if labels.shape == size:
            return counts, None
        return counts, f"{pair.name} ({_size(size)}, its map {_size(labels.shape)})"

    with ThreadPoolExecutor(READERS) as pool:
        seen = list(pool.map(look, pairs))
    faults = [fault for _, fault in seen if fault is not None]
    if faults:
        raise DataError(
            f"{pairs[0].image.parent}: {len(faults)} images have another size than their maps: "
            f"{shortlist(faults, _SHOWN)}. Expected the same"
        )
    return np.stack([counts for counts, _ in seen])


def check_labels(
    pairs: Sequence[Pair], counts: npt.NDArray[np.int64], *, classes: int, ignore: int
) -> None:
    """Refuse labels outside the classes, and maps in which every pixel is ignored.

    Raises
    ------
    DataError
        Names the first of them.
    """
    known = np.zeros(LABELS, dtype=bool)
    known[:classes] = True
    known[ignore] = True
    for pair, row in zip(pairs, counts, strict=True):
        wrong = np.flatnonzero((row > 0) & ~known)
        if len(wrong):
            raise DataError(
                f"{pair.mask}: label {shortlist(wrong.tolist(), _SHOWN)}, expected 0 to "
                f"{classes - 1}, or {ignore} for pixels to ignore. Name the classes with "
                "--classes, or that label with --ignore-index"
            )
    labelled = counts.copy()
    labelled[:, ignore] = 0
    empty = [pair.name for pair, row in zip(pairs, labelled, strict=True) if not row.any()]
    if empty:
        raise DataError(
            f"{pairs[0].mask.parent}: {len(empty)} maps hold nothing but the ignored label "
            f"{ignore}: {shortlist(empty, _SHOWN)}. Remove them with their images"
        )


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
