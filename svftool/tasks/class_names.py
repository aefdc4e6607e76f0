"""Names of the classes of labelled images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from svftool.errors import DataError, shortlist
from svftool.tasks.images import LabelledImage


def class_names(
    images: Sequence[LabelledImage], given: str | os.PathLike[str] | Sequence[str] | None
) -> tuple[str, ...]:
    """Give the classes in the order of the head's outputs: given, those of a file, or sorted.

    Raises
    ------
    DataError
        If the file is not readable, repeats a name, or there are fewer than two classes.
    """
    where = "the data"
    if given is None:
        names = tuple(sorted({image.label for image in images}))
    elif isinstance(given, (str, os.PathLike)):
        names, where = _read_classes(Path(given)), str(given)
    else:
        names = tuple(given)
    if len(names) < 2:
        raise DataError(f"{where}: {len(names)} class, expected two or more ({shortlist(names)})")
    return names


def _read_classes(file: Path) -> tuple[str, ...]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: {error}, expected a text file of class names") from error
    names = tuple(line.strip() for line in lines if line.strip())
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{file}: {shortlist(twice)} twice, expected each class once")
    return names


def check_labels(images: Sequence[LabelledImage], classes: Sequence[str], source: object) -> None:
    """Refuse images of classes that are not known.

    Raises
    ------
    DataError
        Names the classes, and `source`, where the images are from.
    """
    unknown = sorted({image.label for image in images} - set(classes))
    if unknown:
        raise DataError(
            f"{source}: unknown class {shortlist(unknown)}, expected one of {shortlist(classes)}"
        )
