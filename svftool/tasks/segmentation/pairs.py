"""Images with their label maps: how pairs are found, read and checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from svftool.errors import DataError, counted, shortlist
from svftool.files.texts import read_text
from svftool.tasks.at_once import images_at_once
from svftool.tasks.images import (
    LABELS,
    SUFFIXES,
    class_numbers,
    image_size,
    open_raw,
    pictures_in,
    require_encodable,
    require_opaque,
)
from svftool.tasks.views import Decoded

if TYPE_CHECKING:
    from PIL.Image import Image

LOGITS_AT_ONCE = 1 << 26
"""Numbers that evaluation enlarges at once, at most."""

# Classes of a segmentation data set: their names, and their colours where maps are coloured.


FILE = "classes.txt"
"""Looked for in the data folder."""

IGNORED = "ignore"
"""Name of a line whose colour is no class."""

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class ClassTable:
    """What a class file says.

    Attributes
    ----------
    names : tuple of str
        By class number.
    colours : mapping of colour to int or None
        Class number of each red, green and blue; None stands for pixels to ignore. Empty where
        the file has none.
    """

    names: tuple[str, ...]
    colours: Mapping[Colour, int | None] = field(default_factory=lambda: MappingProxyType({}))

    def labels_of(
        self, picture: npt.NDArray[np.uint8], *, ignore: int, path: Path
    ) -> npt.NDArray[np.uint8]:
        """Turn a (height, width, 3) uint8 picture to class numbers: (height, width) uint8.

        Raises
        ------
        DataError
            If a colour is no class.
        """
        keys = picture.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.uint32)
        found, inverse = np.unique(keys, return_inverse=True)
        colours = [_unpacked(int(key)) for key in found]
        unknown = [colour for colour in colours if colour not in self.colours]
        if unknown:
            raise DataError(
                f"{path}: colour {shortlist(unknown, 5)} is no class, expected those of the class "
                f"file. Add a line for it, with the name {IGNORED!r} if it is none"
            )
        labels = [self.colours[colour] for colour in colours]
        numbers = np.array([ignore if n is None else n for n in labels], dtype=np.uint8)
        return numbers[inverse].reshape(picture.shape[:2])


def read_classes(file: Path) -> ClassTable:
    """Read a class file: a name a line, or ``name,red,green,blue``.

    A first line that names the columns is a header. The line with the name ``ignore`` gives a
    colour of pixels to leave out.

    Raises
    ------
    DataError
        If it cannot be read, or says nothing clear.
    """
    lines = read_text(file, "a text file of class names").splitlines()
    rows = [
        (number, [cell.strip() for cell in line.split(",")])
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if rows and [cell.lower() for cell in rows[0][1][1:]] in (["r", "g", "b"], list(_CHANNELS)):
        rows = rows[1:]
    names: list[str] = []
    colours: dict[Colour, int | None] = {}
    for number, cells in rows:
        colour = _colour(cells[1:], file, number)
        ignored = colour is not None and cells[0].lower() == IGNORED
        if colour is not None:
            colours[colour] = None if ignored else len(names)
        if not ignored:
            names.append(cells[0])
    require_encodable(names, str(file))
    _check(file, names, colours)
    return ClassTable(tuple(names), MappingProxyType(colours))


_CHANNELS = ("red", "green", "blue")


def _colour(cells: Sequence[str], file: Path, line: int) -> Colour | None:
    if not cells:
        return None
    values = [int(cell) for cell in cells if cell.isdecimal() and int(cell) < 256]
    if len(cells) != 3 or len(values) != 3:
        raise DataError(
            f"{file}: line {line}: {','.join(cells)!r}, expected red,green,blue from 0 to 255"
        )
    return values[0], values[1], values[2]


def _check(file: Path, names: Sequence[str], colours: Mapping[Colour, int | None]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{file}: {shortlist(twice)} twice, expected each class once")
    if len(names) < 2:
        raise DataError(f"{file}: {counted(len(names), 'classes')}, expected two or more")
    if colours and len([n for n in colours.values() if n is not None]) != len(names):
        raise DataError(f"{file}: colours missing or given twice, expected one for each class")


def _unpacked(key: int) -> Colour:
    return key >> 16, key >> 8 & 255, key & 255


MAP_SUFFIXES = frozenset({".bmp", ".gif", ".png", ".tif", ".tiff"})
"""Formats of label maps; JPEG is none of them, because it blurs labels."""

READERS = 4
_SHOWN = 5

Labels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ImagePair:
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
) -> list[ImagePair]:
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
            f"{data / masks}: no label map for {counted(len(lonely), 'images', of=len(pictures))} "
            f"({shortlist(lonely, _SHOWN)}), expected one of the same name "
            f"({', '.join(sorted(MAP_SUFFIXES))}). Add the maps or remove the images; where the "
            "maps' names end differently give --mask-suffix"
        )
    return [ImagePair(name, image, maps[name + mask_suffix]) for name, image in pictures.items()]


def _files(data: Path, name: str, suffixes: frozenset[str], option: str) -> dict[str, Path]:
    folder = data / name
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder, expected {name!r} in the data. Name it with {option}"
        )
    found: dict[str, Path] = {}
    for file in pictures_in(folder, folder):
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
        if picture.mode not in ("RGB", "RGBA") or table is None or not table.colours:
            return _numbers(picture, path)
        if picture.mode == "RGBA":
            require_opaque(picture, path)
        return table.labels_of(np.asarray(picture.convert("RGB")), ignore=ignore, path=path)


def _numbers(picture: Image, path: Path) -> Labels:
    if picture.mode in ("RGB", "RGBA"):
        raise DataError(
            f"{path}: a colour picture, expected class numbers. Give the classes' colours "
            "with --classes FILE, a line of name,red,green,blue each"
        )
    return class_numbers(picture, path)


def survey(pairs: Sequence[ImagePair], read: Callable[[Path], Labels]) -> npt.NDArray[np.int64]:
    """Count the labels of every map, and hold its size against its image's.

    Parameters
    ----------
    pairs : sequence of ImagePair
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

    def look(pair: ImagePair) -> tuple[npt.NDArray[np.int64], str | None]:
        labels, size = read(pair.mask), image_size(pair.image)
        counts = np.bincount(labels.ravel(), minlength=LABELS).astype(np.int64)
        if labels.shape == size:
            return counts, None
        return counts, f"{pair.name} ({_size(size)}, its map {_size(labels.shape)})"

    with ThreadPoolExecutor(READERS) as pool:
        seen = list(pool.map(look, pairs))
    faults = [fault for _, fault in seen if fault is not None]
    if faults:
        have, maps = ("has", "its map") if len(faults) == 1 else ("have", "their maps")
        raise DataError(
            f"{pairs[0].image.parent}: {counted(len(faults), 'images')} {have} another size than "
            f"{maps}: {shortlist(faults, _SHOWN)}. Expected the same"
        )
    return np.stack([counts for counts, _ in seen])


def check_labels(
    pairs: Sequence[ImagePair], counts: npt.NDArray[np.int64], *, classes: int, ignore: int
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
            f"{pairs[0].mask.parent}: {counted(len(empty), 'maps')} "
            f"{'holds' if len(empty) == 1 else 'hold'} nothing but the ignored label "
            f"{ignore}: {shortlist(empty, _SHOWN)}. Remove them with their images"
        )


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


@dataclass(frozen=True)
class Pairs:
    """Pairs of images and label maps, and what is kept of them in memory."""

    pairs: Sequence[ImagePair]
    images: Decoded
    maps: Decoded


@dataclass(frozen=True)
class Chosen:
    """Some of the pairs."""

    source: Pairs
    indices: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def at(self, positions: Sequence[int]) -> Chosen:
        """Return those at positions of `indices`."""
        return Chosen(self.source, tuple(self.indices[position] for position in positions))

    def take(self, positions: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Images and label maps at positions of `indices`, as they are kept."""
        indices = [self.indices[position] for position in positions]
        return self.source.images.load(indices), self.source.maps.load(indices)

    def batches(
        self, classes: int, device: torch.device
    ) -> Iterator[tuple[list[int], list[Tensor], list[Tensor]]]:
        """Every pair in order, in batches of one size: positions, images, label maps."""
        positions: list[int] = []
        images: list[Tensor] = []
        maps: list[Tensor] = []
        for position in range(len(self)):
            (image,), (labels,) = self.take([position])
            room = min(
                LOGITS_AT_ONCE // max(1, classes * labels.numel()),
                images_at_once(image.shape[-2] * image.shape[-1], device),
            )
            other = bool(images) and (image.shape, labels.shape) != (images[0].shape, maps[0].shape)
            if images and (other or len(images) >= max(1, room)):
                yield positions, images, maps
                positions, images, maps = [], [], []
            positions.append(position)
            images.append(image)
            maps.append(labels)
        if images:
            yield positions, images, maps
