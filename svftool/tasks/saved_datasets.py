"""Folders that Hugging Face's ``datasets`` wrote with ``save_to_disk``."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from svftool.errors import DataError, MissingDependencyError, shortlist
from svftool.files.text_data import TEXT_COLUMNS, TextsFound, are_labelled

_ONE, _SEVERAL = "state.json", "dataset_dict.json"


def is_saved_dataset(path: Path) -> bool:
    """Whether a path is a folder of ``save_to_disk``, by the files that lie there."""
    return (path / _ONE).is_file() or (path / _SEVERAL).is_file()


def load_saved_dataset(folder: Path) -> Any:
    """Open one split that ``save_to_disk`` wrote; its columns stay on disk until they are read.

    Raises
    ------
    MissingDependencyError
        If ``datasets`` is not installed.
    DataError
        If the folder holds several splits, or cannot be read.
    """
    try:
        import datasets
    except ImportError:
        raise MissingDependencyError("datasets", extra="datasets", purpose=str(folder)) from None
    if (folder / _SEVERAL).is_file():
        splits = sorted(sub.name for sub in folder.iterdir() if (sub / _ONE).is_file())
        raise DataError(
            f"{folder}: several splits ({', '.join(splits)}), expected one. "
            f"Name it: {folder / (splits or ['train'])[0]}"
        )
    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:
        raise DataError(
            f"{folder}: {type(error).__name__}: {error}, expected a folder of "
            "datasets.Dataset.save_to_disk"
        ) from error


@dataclass(frozen=True)
class StoredImage:
    """An image in a saved data set, which is read when it is opened.

    Attributes
    ----------
    dataset : object
        A ``datasets.Dataset`` whose image column is not decoded.
    column : str
        That column.
    row : int
    folder : Path
        Where the data set lies, for messages.
    """

    dataset: Any
    column: str
    row: int
    folder: Path

    def __str__(self) -> str:
        return f"{self.folder}: row {self.row + 1}"

    def open(self) -> BytesIO | Path:
        """Return the encoded image, or its file where the data set holds only the name."""
        cell = self.dataset[self.row][self.column] or {}
        content, path = cell.get("bytes"), cell.get("path")
        if content is not None:
            return BytesIO(content)
        if path is None:
            raise DataError(f"{self}: no image, expected one in column {self.column!r}")
        return Path(path)


def stored_images(folder: Path) -> list[tuple[StoredImage, str]]:
    """List the images of a saved data set with the names of their classes.

    The columns are found by their types, ``Image`` and ``ClassLabel``; labels of another type
    are taken from a column named ``label``.

    Raises
    ------
    DataError
        If there is no column of images, or none of labels.
    MissingDependencyError
        If ``datasets`` is not installed.
    """
    dataset = load_saved_dataset(folder)
    import datasets

    features = dataset.features
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    labels = labels or [name for name in features if name == "label"]
    if not images and any(name in TEXT_COLUMNS for name in features):
        raise DataError(
            f"{folder}: texts (columns {shortlist(features)}), expected a column of images. "
            f"{TextsFound('', are_labelled(list(features))).way_out}"
        )
    if not images or not labels:
        raise DataError(
            f"{folder}: columns {shortlist(features)}, expected one of images and one of labels. "
            "Cast them to datasets.Image and datasets.ClassLabel"
        )
    column, label = images[0], labels[0]
    raw = dataset.cast_column(column, datasets.Image(decode=False))
    named = getattr(features[label], "int2str", str)
    return [
        (StoredImage(raw, column, row, folder), named(value))
        for row, value in enumerate(dataset[label])
    ]
