"""What ``predict`` reads: pictures and texts without labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svftool.errors import DataError, shortlist
from svftool.files.texts import read_rows, read_text
from svftool.tasks.images import SUFFIXES, is_hidden, pictures_in
from svftool.tasks.texts import SUFFIX as JSONL
from svftool.tasks.texts import TABLES, Text, list_column, list_texts, text_of

TEXTS = (JSONL, *TABLES, ".txt")
"""How files of texts are called; any other file is read as plain lines too."""


@dataclass(frozen=True)
class Picture:
    """A picture without a label.

    Attributes
    ----------
    path : Path
    name : str
        Its place below what was given, without the suffix.
    """

    path: Path
    name: str


def list_pictures(inputs: Sequence[Path]) -> list[Picture]:
    """List picture files, and those in folders and the folders below them.

    Raises
    ------
    DataError
        If an input is not there, or a folder holds no picture.
    """
    found = []
    for place in inputs:
        if place.is_dir():
            files = pictures_in(place, place)
            if not files:
                raise DataError(f"{place}: no pictures, expected {', '.join(sorted(SUFFIXES))}")
            found += [
                Picture(file, file.relative_to(place).with_suffix("").as_posix()) for file in files
            ]
        else:
            found.append(Picture(_existing(place), place.stem))
    return found


def unlike_names(pictures: Sequence[Picture]) -> None:
    """Refuse pictures whose maps would have one name.

    Raises
    ------
    DataError
        Names the first pair.
    """
    seen: dict[str, Path] = {}
    for one in pictures:
        if one.name in seen:
            raise DataError(
                f"{one.path}: the name of {seen[one.name]} too, expected each name once for the "
                "maps. Give the folder that holds both, or one after the other"
            )
        seen[one.name] = one.path


def list_prompts(inputs: Sequence[Path], *, column: str | None = None) -> list[Text]:
    """Read texts from JSONL, CSV, plain lines, and folders of such files.

    Parameters
    ----------
    inputs : sequence of Path
        JSONL and CSV have ``text``, or ``prompt`` with or without ``completion``. Of any other
        file every line that is not empty is a text.
    column : str, optional
        Column or key of the texts in JSONL and CSV, in place of ``text`` and ``prompt``.

    Raises
    ------
    DataError
        If an input is not there, holds no texts, or is not what its suffix says.
    """
    return [text for place in inputs for text in _texts(place, column)]


def _texts(place: Path, column: str | None) -> list[Text]:
    if place.is_dir():
        files = [
            file
            for file in sorted(place.rglob("*"))
            if file.suffix.lower() in TEXTS and not is_hidden(file, place)
        ]
        if not files:
            raise DataError(f"{place}: no texts, expected {', '.join(TEXTS)}")
        return [text for file in files for text in _texts(file, column)]
    suffix = _existing(place).suffix.lower()
    if column is not None and suffix in (JSONL, *TABLES):
        return list_column(place, column)
    if suffix == JSONL:
        return list_texts(place, prompts=True)
    texts = list(_table(place) if suffix in TABLES else [])
    if suffix not in TABLES:
        texts = [
            Text("", line.rstrip("\r"), False, place, number)
            for number, line in enumerate(read_text(place, "texts").split("\n"), 1)
            if line.strip()
        ]
    if not texts:
        raise DataError(f"{place}: no texts, expected some")
    return texts


def _table(file: Path) -> Iterator[Text]:
    head, *rows = read_rows(file, "a table of texts") or [(0, [])]
    names = [name.strip().lower() for name in head[1]]
    if not {"text", "prompt"} & set(names):
        raise DataError(
            f"{file}: columns {shortlist(names)}, expected a column 'text', or 'prompt'"
        )
    for line, row in rows:
        yield text_of(file, line, _filled(dict(zip(names, row, strict=False))), prompts=True)


def _filled(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row without the columns of other kinds of rows, which are empty in it."""
    known = {name: row[name] for name in ("text", "prompt", "completion") if row.get(name)}
    return known or row


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise DataError(f"{file}: no such file or folder, expected an input. Check the path.")
    return file
