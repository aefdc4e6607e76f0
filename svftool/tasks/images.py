"""Labelled images on disk: how they and their classes are listed, and how one is decoded."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from svftool.errors import DataError, MissingDependencyError
from svftool.tasks.saved_datasets import StoredImage, is_saved_dataset, stored_images

if TYPE_CHECKING:
    from PIL.Image import Image
import os
import re
from collections.abc import Iterable, Sequence

from svftool.errors import shortlist

SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
_EXIF_ORIENTATION = 0x0112


ImagePath = Path | StoredImage
"""What can be opened as an image."""


@dataclass(frozen=True)
class LabelledImage:
    """A file, or a row of a saved data set, and the name of its class."""

    path: ImagePath
    label: str


def list_images(data: Path) -> list[LabelledImage]:
    """List the images of a folder of class folders, a CSV file of path,label, or a saved data set.

    Parameters
    ----------
    data : Path
        A folder whose sub-folders are the classes, a folder of ``datasets.Dataset.save_to_disk``,
        or a CSV file. A first row that names the
        columns ``path`` and ``label`` is a header; without one the first two columns are taken.
        Paths are relative to the CSV file's folder.

    Returns
    -------
    list of LabelledImage
        By class and path for a folder, in the order of the rows for a CSV file.

    Raises
    ------
    DataError
        If nothing is there, a class folder is empty, or a row is not a path and a label.
    """
    if data.is_dir() and is_saved_dataset(data):
        images = [LabelledImage(image, label) for image, label in stored_images(data)]
    elif data.is_dir():
        images = _list_folder(data)
    elif data.is_file():
        images = _list_csv(data)
    else:
        raise DataError(f"{data}: not found, expected a folder of class folders or a CSV file")
    if not images:
        raise DataError(f"{data}: no images, expected a folder for each class with images in it")
    _require_encodable({image.label for image in images}, str(data))
    return images


_SPLITS = frozenset(
    [
        "train",
        "training",
        "trn",
        "test",
        "testing",
        "tst",
        "val",
        "valid",
        "validation",
        "eval",
        "evaluation",
        "dev",
    ]
)


def is_hidden(file: Path, root: Path) -> bool:
    """Whether a file below `root`, or a folder on the way to it, is hidden: its name has a dot."""
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def encodable(text: str) -> bool:
    """Whether a string can be written: half a surrogate pair cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _refuse_splits(folder: Path) -> None:
    """Refuse a folder of the parts of a data set, which are no classes."""
    names = sorted(sub.name for sub in folder.iterdir() if sub.is_dir() and sub.name[:1] != ".")
    parts = {name.lower() for name in names}
    if len(parts) > 1 and parts <= _SPLITS and any(part.startswith("tr") for part in parts):
        first = next(name for name in names if name.lower().startswith("tr"))
        other = next(name for name in names if name != first)
        raise DataError(
            f"{folder}: holds {shortlist(names)}, the parts of a data set, expected a folder for "
            f"each class. Give {folder / first}, and {folder / other} with --evaluation"
        )


def _list_folder(folder: Path) -> list[LabelledImage]:
    _refuse_splits(folder)
    images = []
    for sub in sorted(folder.iterdir()):
        if not sub.is_dir() or sub.name.startswith("."):
            continue
        files = sorted(
            file
            for file in sub.rglob("*")
            if file.suffix.lower() in SUFFIXES and not is_hidden(file, folder)
        )
        if not files:
            raise DataError(
                f"{sub}: no images, expected some in each class folder "
                f"({', '.join(sorted(SUFFIXES))}). Fill the folder or remove it."
            )
        images += [LabelledImage(file, sub.name) for file in files]
    return images


def _require_encodable(names: Iterable[str], where: str) -> None:
    wrong = sorted(name for name in names if not encodable(name))
    if wrong:
        raise DataError(
            f"{where}: the class name {wrong[0]!r} has half a surrogate pair, expected text that "
            "can be written as UTF-8. Rename the class"
        )


def _list_csv(file: Path) -> list[LabelledImage]:
    rows = _rows(file)
    names = [name.strip().lower() for name in rows[0][1]] if rows else []
    path_column, label_column = 0, 1
    if "path" in names and "label" in names:
        path_column, label_column = names.index("path"), names.index("label")
        rows = rows[1:]
    images = []
    for line, row in rows:
        if len(row) <= max(path_column, label_column) or not row[label_column].strip():
            raise DataError(f"{file}: line {line}: {','.join(row)!r}, expected path,label")
        path = file.parent / row[path_column].strip()
        if not path.is_file():
            raise DataError(
                f"{file}: line {line}: {row[path_column]!r} is no file, expected an image"
            )
        images.append(LabelledImage(path, row[label_column].strip()))
    return images


def _rows(file: Path) -> list[tuple[int, list[str]]]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream)
            return [(reader.line_num, row) for row in reader if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file}: {error}, expected a CSV file of path,label in UTF-8") from error


def short_name(path: ImagePath) -> str:
    """Name an image by its file and folder, which does not tell where the data lies."""
    if isinstance(path, StoredImage):
        return f"row {path.row + 1}"
    return f"{path.parent.name}/{path.name}"


def open_image(path: ImagePath) -> Image:
    """Decode an image to RGB, turned upright by its EXIF orientation.

    Raises
    ------
    DataError
        If the file is no image, or only a part of one.
    """
    pillow = _pillow()
    from PIL import ImageOps

    try:
        with pillow.open(_content(path)) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):
                # convert("RGB") clips 16-bit values at 255 instead of scaling them.
                image = image.convert("I").point(lambda value: value / 256).convert("L")
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise whatever they meet
        raise _unreadable(path, error) from error


@contextmanager
def open_raw(path: ImagePath) -> Iterator[Image]:
    """Context with a picture in its own mode, such as a label map.

    Raises
    ------
    DataError
        If the file is no image, or only a part of one.
    """
    pillow = _pillow()
    try:
        with pillow.open(_content(path)) as opened:
            opened.load()
            yield opened
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever they meet
        raise _unreadable(path, error) from error


def image_size(path: ImagePath) -> tuple[int, int]:
    """Read (height, width) of the upright image from the file's header.

    Raises
    ------
    DataError
        If the file is no image.
    """
    try:
        with _pillow().open(_content(path)) as opened:
            width, height = opened.size
            turned = opened.getexif().get(_EXIF_ORIENTATION, 1) >= 5
    except MissingDependencyError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever they meet
        raise _unreadable(path, error) from error
    return (width, height) if turned else (height, width)


def to_tensor(image: Image) -> Tensor:
    """Copy an RGB image to a (3, height, width) uint8 tensor."""
    from torchvision.transforms.v2.functional import pil_to_tensor

    tensor: Tensor = pil_to_tensor(image)
    return tensor


def _content(path: ImagePath) -> Any:
    return path.open() if isinstance(path, StoredImage) else path


def read_bytes(path: ImagePath) -> bytes:
    """Read an image as it is stored.

    Raises
    ------
    DataError
        If it cannot be read.
    """
    try:
        content = _content(path)
        return content.read_bytes() if isinstance(content, Path) else bytes(content.getvalue())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}, expected an image") from error


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise MissingDependencyError("PIL", extra="vision", purpose="reading images") from None
    return Image


def _unreadable(path: ImagePath, error: Exception) -> DataError:
    return DataError(
        f"{path}: {type(error).__name__} while decoding, expected an image. "
        "Replace the file or remove it"
    )


# Names of the classes of labelled images.


def class_names(
    images: Sequence[LabelledImage], given: str | os.PathLike[str] | Sequence[str] | None
) -> tuple[str, ...]:
    """Return the classes in the order of the head's outputs: given, those of a file, or sorted.

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
    _require_encodable(names, where)
    if len(names) < 2:
        raise DataError(f"{where}: {len(names)} class, expected two or more ({shortlist(names)})")
    return names


def natural_order(names: Sequence[str]) -> tuple[str, ...]:
    """Sort names by the numbers in them, as timm sorts folders.

    Examples
    --------
    >>> natural_order(["1", "10", "2"])
    ('1', '2', '10')
    """

    def key(name: str) -> list[tuple[int, int, str]]:
        parts = re.findall(r"[0-9]+|[^0-9]+", name)
        numbers = [(0, int(p[:400]), "") if p[0] in "0123456789" else (1, 0, p) for p in parts]
        return [*numbers, (2, 0, name)]

    return tuple(sorted(names, key=key))


def order_warning(names: Sequence[str]) -> str | None:
    """Say where class folders were sorted as text and another tool would sort them by number."""
    if list(names) != sorted(names) or natural_order(names) == tuple(names):
        return None
    return (
        f"the classes are taken in the order {shortlist(names, 4)}, sorted as text, and the head "
        f"does not say its own; by number they are {shortlist(natural_order(names), 4)}. Give the "
        "order with --classes, if the head was trained with another"
    )


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
