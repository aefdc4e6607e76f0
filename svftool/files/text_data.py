"""Whether data is texts, and of which task, by its name and first row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from svftool.errors import shortlist
from svftool.files.header import parse_json
from svftool.files.texts import first_row

TEXT_TASKS = ("language", "text-classification")
"""Tasks on texts."""

TEXT_COLUMNS = ("text", "prompt", "completion")
"""What an example of ``--task language`` may consist of."""


@dataclass(frozen=True)
class TextsFound:
    """Texts where something else was expected.

    Attributes
    ----------
    what : str
        What they are.
    labelled : bool
        Whether each has a class, as far as the first row says.
    """

    what: str
    labelled: bool

    @property
    def way_out(self) -> str:
        """Which task takes them."""
        if self.labelled:
            return "Add --task text-classification, or --task language to model the texts"
        return "Add --task language"


def are_labelled(columns: Sequence[str]) -> bool:
    """Whether columns are those of texts with a class each: ``text``, and one other or ``label``.

    Examples
    --------
    >>> are_labelled(["text", "category"]), are_labelled(["prompt", "completion"])
    (True, False)
    """
    others = [column.lower() for column in columns if column.lower() != "text"]
    if len(others) == len(columns) or {"prompt", "completion"} & set(others):
        return False
    return "label" in others or (len(others) == 1 and others[0] not in _NUMBERS)


_NUMBERS = ("", "id", "idx", "index")
"""Columns that number rows, and name no class."""


def texts_in(path: Path) -> TextsFound | None:
    """Say which texts a file or folder holds, by its name and first row; None for no texts."""
    if path.is_dir():
        inside = [one for one in sorted(path.iterdir()) if not one.name.startswith(".")]
        if any(one.is_dir() for one in inside):
            return None
        return next((texts_in(one) for one in inside if one.suffix.lower() == ".jsonl"), None)
    kind = path.suffix.lower()
    if kind not in (".jsonl", ".csv", ".tsv"):
        return None
    first, cells = first_row(path)
    if kind == ".jsonl":
        return TextsFound("JSONL of texts", are_labelled(_keys(first)))
    columns = [cell.strip().lower() for cell in cells]
    named = [column for column in columns if column in TEXT_COLUMNS]
    # A header of path,label is one of images, whatever else stands beside it.
    images = "path" in columns and "label" in columns
    if not named or images:
        return None
    what = f"a {kind[1:].upper()} of texts (column {shortlist(named)})"
    return TextsFound(what, are_labelled(columns))


def _keys(line: str) -> list[str]:
    """Return the keys of a line of JSONL; none where it is no object."""
    try:
        record = parse_json(line)
    except ValueError:
        return []
    return list(record) if isinstance(record, dict) else []
