"""Names of files: what they say of their contents, and which of them are refused."""

from __future__ import annotations

import os
from pathlib import Path

from svftool.errors import UsageError

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".th", ".tar", ".ckpt")
WEIGHT_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)

TUNED_SUFFIX = ".svf.safetensors"
"""How the name of a tuned file ends."""


def is_tuned_name(path: Path) -> bool:
    """Tell whether a file of this name is a tuned file.

    Examples
    --------
    >>> is_tuned_name(Path("birds.svf.safetensors")), is_tuned_name(Path("birds.safetensors"))
    (True, False)
    """
    return path.name.endswith(TUNED_SUFFIX)


def check_dense_name(path: Path, *, tuned: bool = False) -> None:
    """Refuse the name of a tuned file for other weights.

    Parameters
    ----------
    path : Path
        What is to be written.
    tuned : bool
        A tuned file is written.

    Raises
    ------
    UsageError
        Says which name would do.
    """
    stem = path.with_suffix("")
    if stem.suffix != ".svf" or path.suffix not in WEIGHT_SUFFIXES or tuned:
        return
    expected = f"for dense weights one such as {path.with_name(stem.stem + path.suffix)}"
    if not is_tuned_name(path):
        expected += f", for a tuned file {stem}.safetensors"
    raise UsageError(f"{path}: the name of a tuned file, and none is written, expected {expected}")


FACTORS_FILE = "svf_config.json"
"""What makes a folder a factor checkpoint."""

TUNED_KEY = "svftool"
"""Metadata of a safetensors file that makes it a tuned file."""

EXACT_KEY = "svftool.exact"
"""Metadata of a safetensors file that makes it an exact delta."""


def real(path: Path) -> Path:
    """Return the absolute path with all links followed.

    Unlike `Path.resolve` it raises nothing for links that lead in a circle, which Python answers
    with a RuntimeError before 3.13; opening such a path says what is wrong.
    """
    return Path(os.path.realpath(path))


def check_predictions_name(path: Path, *, folder: bool | None = None) -> None:
    """Refuse a name that says nothing of how predictions are written.

    Parameters
    ----------
    path : Path
        What is to be written.
    folder : bool or None
        Whether it is a folder of pictures; None where that is not known yet.

    Raises
    ------
    UsageError
        If the suffix is neither ``.jsonl`` nor ``.csv``, or one for a folder.
    """
    table = path.suffix in (".jsonl", ".csv")
    if folder and table:
        raise UsageError(f"{path}: maps are pictures, expected the name of a folder for them")
    if not table and (folder is False or path.suffix in (".json", ".tsv", ".txt", ".xlsx")):
        raise UsageError(f"{path}: expected a name that ends in .jsonl or .csv")


def is_plain_name(name: object) -> bool:
    """Tell whether `name` is that of a weight file in the same folder, without looking there.

    Examples
    --------
    >>> is_plain_name("model-00001-of-00002.safetensors"), is_plain_name("../model.safetensors")
    (True, False)
    """
    if not isinstance(name, str) or any(char in name for char in "/\\:\0"):
        return False
    return not name.startswith(".") and name.endswith(WEIGHT_SUFFIXES)
