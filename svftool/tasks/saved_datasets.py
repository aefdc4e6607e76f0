"""Folders that Hugging Face's ``datasets`` wrote with ``save_to_disk``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from svftool.errors import DataError, MissingDependencyError

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
