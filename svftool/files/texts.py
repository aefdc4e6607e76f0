"""Text files and tables that people bring: their encodings and separators."""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Sequence
from pathlib import Path

from svftool.errors import DataError, brief, shortlist, system_fault

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_LONGEST = (1 << 31) - 1
"""Characters of a cell; the csv module takes 131,072 if it is not told."""


def read_text(path: Path, what: str) -> str:
    """Read a text file in UTF-8, or in UTF-16 that begins with its mark.

    Parameters
    ----------
    path : Path
    what : str
        What it should be, for errors.

    Raises
    ------
    DataError
        If it is not there or no such text: the first line that is none is named.
    """
    return _decoded(path, what).replace("\r\n", "\n").replace("\r", "\n")


def read_rows(path: Path, what: str) -> list[tuple[int, list[str]]]:
    """Read a table of separated values: the rows that are not empty, with the number of their line.

    A ``.tsv`` file is separated by tabs. Of any other one the first row decides: commas, else
    semicolons or tabs, as spreadsheets write them.

    Parameters
    ----------
    path : Path
    what : str
        What it should be, for errors.

    Raises
    ------
    DataError
        As `read_text`, or if a cell in quotes does not end well.
    """
    text = _decoded(path, what)
    known = csv.field_size_limit(_LONGEST)
    try:
        stream = io.StringIO(text, newline="")
        delimiter = "\t" if path.suffix.lower() == ".tsv" else _delimiter(stream)
        stream.seek(0)
        reader = csv.reader(stream, delimiter=delimiter)
        return [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise DataError(f"{path}: {error}, expected {what} in UTF-8") from error
    finally:
        csv.field_size_limit(known)


def first_row(path: Path, most: int = 1 << 16) -> tuple[str, list[str]]:
    """Read the first line of a text file, and its cells as `read_rows` separates them.

    What is no text is read as far as it can be: this is for telling what a file holds.

    Parameters
    ----------
    path : Path
    most : int
        Bytes to read.
    """
    with path.open("rb") as stream:
        content = stream.read(most)
    encoding = "utf-16" if content.startswith(_UTF16) else "utf-8-sig"
    line = next(iter(content.decode(encoding, "replace").splitlines()), "")
    held = io.StringIO(line)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else _delimiter(held)
    return line, next(iter(csv.reader([line], delimiter=delimiter)), [])


def check_columns(path: Path, names: Sequence[str]) -> None:
    """Refuse a table in which two columns have one name: either could be meant.

    Raises
    ------
    DataError
        Names them.
    """
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise DataError(
            f"{path}: two columns or more are named {shortlist(map(brief, twice))}, expected each "
            "name once. Rename or remove one"
        )


def _delimiter(stream: io.StringIO) -> str:
    for delimiter in ",;\t":
        stream.seek(0)
        rows = csv.reader(stream, delimiter=delimiter)
        if len(next((row for row in rows if row), [])) > 1:
            return delimiter
    return ","


def _decoded(path: Path, what: str) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        system_fault(error, path)
        raise DataError(f"{path}: {error}, expected {what}") from error
    name, encoding = "UTF-8", "utf-8-sig"
    if content.startswith(_UTF16):
        name = encoding = "UTF-16"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}: line {line} is not {name} (byte 0x{content[error.start]:02x}), expected "
            f"{what} in UTF-8. Save the file as UTF-8"
        ) from error
