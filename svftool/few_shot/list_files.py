"""Files that lists name, found below a data set's folder wherever the list was written."""

from __future__ import annotations

import ast
import io
import pickle
import pickletools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Never

from svftool.errors import DataError, counted, shortlist
from svftool.few_shot.masks import class_areas, mapped, read_label_map
from svftool.files.texts import read_text
from svftool.progress import SILENT, Progress
from svftool.tasks.images import image_size


@dataclass(frozen=True)
class Listed:
    """An image and its map of class numbers, as a list names them."""

    image: Path
    mask: Path


class Relocator:
    """Find listed paths below a folder, whatever folder stood before them on the list's machine.

    BAM's lists hold absolute paths. The number of leading parts to drop is found once, for the
    first path that exists, and tried first for all that follow.

    Parameters
    ----------
    roots : sequence of Path
        Folders to look below, in order.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = tuple(roots)
        self._known: list[tuple[Path, int]] = []

    def find(self, listed: str) -> Path | None:
        """Return the file that `listed` means, or None where there is none."""
        parts = tuple(part for part in PurePosixPath(listed).parts if part not in {"/", "."})
        if ".." in parts or not parts:
            return None
        for root, dropped in self._known:
            path = root.joinpath(*parts[dropped:])
            if len(parts) > dropped and path.is_file():
                return path
        for root in self._roots:
            for dropped in range(len(parts)):
                path = root.joinpath(*parts[dropped:])
                if path.is_file():
                    self._known.append((root, dropped))
                    return path
        return None


def locate(names: Iterable[tuple[str, str]], relocator: Relocator, source: Path) -> list[Listed]:
    """Find every image and mask that a list names.

    Parameters
    ----------
    names : iterable of (str, str)
        Image and mask, as they are listed.
    relocator : Relocator
        Where to look.
    source : Path
        The list, for the message.

    Returns
    -------
    list of Listed
        In the order of the list.

    Raises
    ------
    DataError
        If files are missing: how many, and the first few.
    """
    found, missing = [], []
    for image_name, mask_name in names:
        image, mask = relocator.find(image_name), relocator.find(mask_name)
        missing += [n for n, p in ((image_name, image), (mask_name, mask)) if p is None]
        if image is not None and mask is not None:
            found.append(Listed(image, mask))
    if missing:
        raise DataError(
            f"{source}: names {counted(len(missing), 'files')} not in the data folder: "
            f"{shortlist(missing, limit=3)}"
        )
    if not found:
        raise DataError(f"{source}: names no images, expected one image and mask a line")
    return found


def scan(
    files: Sequence[Listed], *, classes: int, progress: Progress = SILENT
) -> list[dict[int, int]]:
    """Count the pixels of each class in every mask, and hold sizes and numbers against the rest.

    Parameters
    ----------
    files : sequence of Listed
        Images with their masks.
    classes : int
        How many classes there are, numbered from 1.
    progress : Progress
        Told of the masks that are read.

    Returns
    -------
    list of dict
        Pixels by class number, one dictionary a file.

    Raises
    ------
    DataError
        If sizes differ or numbers are no classes: how many masks, and the first few.
    """

    def look(file: Listed) -> tuple[dict[int, int], bool]:
        mask = read_label_map(file.mask)
        return class_areas(mask), mask.shape == image_size(file.image)

    looked = mapped(look, files, description="reading masks", progress=progress)
    differing = [file.image for file, (_, same) in zip(files, looked, strict=True) if not same]
    if differing:
        raise sizes_differ(differing)
    highest = [max(areas, default=0) for areas, _ in looked]
    beyond = [f"{f.mask} ({n})" for f, n in zip(files, highest, strict=True) if n > classes]
    if beyond:
        raise DataError(
            f"{counted(len(beyond), 'masks', 'hold')} numbers above {classes}, expected classes "
            f"numbered 1 to {classes} without gaps, 0 for background and 255 for ignored pixels: "
            f"{shortlist(beyond, limit=3)}. Renumber the masks"
        )
    return [areas for areas, _ in looked]


def sizes_differ(images: Sequence[Path]) -> DataError:
    """Make the error of images whose masks have another size."""
    return DataError(
        f"images whose masks have another size: {len(images)}, expected the same size: "
        f"{shortlist(images, limit=3)}"
    )


# List files of PFENet, BAM and HSNet.


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
            f"{path}: {counted(len(wrong), 'lines', 'are')} not 'image mask', the first is line "
            f"{wrong[0]}: {lines[wrong[0] - 1][:60]!r}"
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
        found = f"{counted(len(wrong), 'lines')} such as {wrong[0]!r}" if wrong else "nothing"
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
        raw = path.read_bytes()
        _check_memo(raw, path)
        value = _PlainUnpickler(io.BytesIO(raw), path).load()
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path}: cannot be read as a pickle ({type(error).__name__})") from error
    if not _is_class_images(value):
        raise DataError(f"{path}: expected a dictionary of class number to image paths")
    return {label + 1: list(names) for label, names in value.items()}


def _check_memo(raw: bytes, path: Path) -> None:
    """Refuse numbers of remembered objects that no pickler counts to: each takes memory at once."""
    for code, number, _ in pickletools.genops(raw):
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(number or 0) > len(raw):
            raise DataError(f"{path}: the pickle numbers an object {number}, expected plain lists")


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
    return read_text(path, "a list")
