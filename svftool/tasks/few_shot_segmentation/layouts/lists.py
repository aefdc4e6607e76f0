"""List files of PFENet, BAM and HSNet.

Nothing in them is run: literals are parsed and never evaluated, pickles may build plain containers.
"""

from __future__ import annotations

import ast
import io
import pickle
from pathlib import Path
from typing import Any, Never

from svftool.errors import DataError

Named = tuple[str, str]
"""An image and its mask, as a list names them."""


def read_pair_list(path: Path) -> list[Named]:
    """Read a list of PFENet's or BAM's form: ``image mask`` on each line.

    Raises
    ------
    DataError
        If the file cannot be read, or lines are not two names: how many and the first few.
    """
    lines = [line.strip() for line in _text(path).splitlines()]
    names, wrong = [], []
    for number, line in enumerate(lines, start=1):
        parts = line.split()
        if len(parts) == 2:
            names.append((parts[0], parts[1]))
        elif parts:
            wrong.append(number)
    if wrong:
        raise DataError(
            f"{path}: {len(wrong)} lines are not 'image mask', the first is line {wrong[0]}: "
            f"{lines[wrong[0] - 1][:60]!r}"
        )
    return names


def read_class_files(path: Path) -> dict[int, list[Named]]:
    """Read BAM's ``sub_class_file_list``: a Python dictionary of class number to image and mask.

    The text is parsed as a literal and never evaluated.

    Raises
    ------
    DataError
        If it is not such a dictionary.
    """
    try:
        value = ast.literal_eval(_text(path).strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise DataError(
            f"{path}: not a Python literal ({type(error).__name__}), expected "
            "{class: [(image, mask), ...]}"
        ) from error
    if not _is_class_files(value):
        raise DataError(f"{path}: expected {{class: [(image, mask), ...]}}, found another literal")
    return {label: [(image, mask) for image, mask in pairs] for label, pairs in value.items()}


def read_hsnet_lines(path: Path) -> list[tuple[str, int]]:
    """Read HSNet's split of Pascal-5i: ``name__class`` on each line, classes counted from 1.

    Raises
    ------
    DataError
        If the file cannot be read or lines have another form: how many and the first few.
    """
    entries, wrong = [], []
    for line in _text(path).split():
        name, separator, label = line.rpartition("__")
        if separator and name and label.isdecimal() and 1 <= int(label) <= 20:
            entries.append((name, int(label)))
        else:
            wrong.append(line)
    if wrong or not entries:
        found = f"{len(wrong)} lines such as {wrong[0]!r}" if wrong else "nothing"
        raise DataError(f"{path}: {found}, expected 'name__class' with class 01 to 20")
    return entries


def read_hsnet_pickle(path: Path) -> dict[int, list[str]]:
    """Read HSNet's split of COCO-20i: a pickled dictionary of class (from 0) to image paths.

    Only dictionaries, lists, numbers and strings are allowed; a pickle that asks for anything to be
    imported is refused before it runs.

    Returns
    -------
    dict
        Class counted from 1, as in the label maps, to image paths.

    Raises
    ------
    DataError
        If the file is no such pickle.
    """
    try:
        value = _PlainUnpickler(io.BytesIO(path.read_bytes()), path).load()
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path}: cannot be read as a pickle ({type(error).__name__})") from error
    if not _is_class_images(value):
        raise DataError(f"{path}: expected a dictionary of class number to image paths")
    return {label + 1: list(names) for label, names in value.items()}


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler that builds plain containers and imports nothing."""

    def __init__(self, stream: io.BytesIO, path: Path) -> None:
        super().__init__(stream)
        self._path = path

    def find_class(self, module: str, name: str) -> Never:
        raise DataError(
            f"{self._path}: the pickle asks for {module}.{name}, expected plain lists; not opened"
        )

    def persistent_load(self, pid: Any) -> Never:
        raise DataError(f"{self._path}: the pickle refers to outside objects, expected plain lists")


def _is_class_files(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(label, int)
        and isinstance(pairs, list)
        and all(
            isinstance(pair, (tuple, list))
            and len(pair) == 2
            and all(isinstance(name, str) for name in pair)
            for pair in pairs
        )
        for label, pairs in value.items()
    )


def _is_class_images(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(label, int)
        and isinstance(names, list)
        and all(isinstance(name, str) for name in names)
        for label, names in value.items()
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a list ({type(error).__name__})") from error
