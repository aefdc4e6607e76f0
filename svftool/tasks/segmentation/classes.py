"""Classes of a segmentation data set: their names, and their colours where maps are coloured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from svftool.errors import DataError, shortlist

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
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: {error}, expected a text file of class names") from error
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
        raise DataError(f"{file}: {len(names)} class, expected two or more")
    if colours and len([n for n in colours.values() if n is not None]) != len(names):
        raise DataError(f"{file}: colours missing or given twice, expected one for each class")


def _unpacked(key: int) -> Colour:
    return key >> 16, key >> 8 & 255, key & 255
