"""Texts on disk: JSONL or CSV files of texts or of prompts with completions."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svftool.errors import DataError, shortlist, system_fault
from svftool.tasks.images import encodable, is_hidden
from svftool.tasks.saved_datasets import is_saved_dataset, load_saved_dataset

EXPECTED = "'text', or 'prompt' and 'completion'"
SUFFIX = ".jsonl"
_SHOWN = 5


@dataclass(frozen=True)
class Text:
    """One example.

    Attributes
    ----------
    prompt : str
        What is read, and not learned; empty for a plain text.
    body : str
        What is learned: the text, or the completion.
    complete : bool
        The body is a completion, after which the model has to stop.
    file, line
        Where it stands; lines count from 1.
    """

    prompt: str
    body: str
    complete: bool
    file: Path
    line: int


class _Fault(ValueError):
    """What is wrong with one line."""


def list_texts(data: Path, *, prompts: bool = False) -> list[Text]:
    """Read a JSONL or CSV file, a folder of JSONL, or one of ``datasets.Dataset.save_to_disk``.

    Parameters
    ----------
    data : Path
        Each line (or row) has ``text``, or ``prompt`` and ``completion``; whatever else it has
        is ignored. Empty lines are skipped. The first line of a CSV file names its columns.
    prompts : bool
        A ``prompt`` may stand alone; it is a text then.

    Raises
    ------
    DataError
        If nothing is there, or lines are not what is expected: the first of them are named.
    """
    if data.is_dir() and is_saved_dataset(data):
        texts = _check(data, _stored_rows(data), prompts)
    elif data.is_dir():
        files = sorted(f for f in data.rglob(f"*{SUFFIX}") if not is_hidden(f, data))
        texts = [text for file in files for text in _check(file, _lines(file), prompts)]
    elif data.is_file():
        rows = _rows(data) if data.suffix.lower() == ".csv" else _lines(data)
        texts = _check(data, rows, prompts)
    else:
        raise DataError(f"{data}: not found, expected a JSONL or CSV file, or a folder of JSONL")
    if not texts:
        raise DataError(f"{data}: no texts, expected {EXPECTED} in each line or row")
    return texts


def _lines(file: Path) -> Iterator[tuple[int, Any]]:
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        system_fault(error, file)
        raise DataError(f"{file}: {error}, expected JSONL in UTF-8") from error
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _rows(file: Path) -> Iterator[tuple[int, Any]]:
    """List the rows of a CSV file by the names of its columns, in lower case."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream)
            names = [name.strip().lower() for name in next(reader, [])]
            rows = [(reader.line_num, row) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file}: {error}, expected CSV with named columns in UTF-8") from error
    return ((line, dict(zip(names, row, strict=False))) for line, row in rows)


def _stored_rows(folder: Path) -> Iterator[tuple[int, Any]]:
    return enumerate(load_saved_dataset(folder), 1)


def _check(file: Path, rows: Iterable[tuple[int, Any]], prompts: bool) -> list[Text]:
    texts, faults = [], []
    for line, row in rows:
        try:
            texts.append(_text(file, line, _record(row), prompts))
        except _Fault as fault:
            faults.append(f"line {line}: {fault}")
    if faults:
        raise DataError(
            f"{file}: {shortlist(faults, _SHOWN)}. Expected a JSON object with {EXPECTED} in "
            "each line: mend these lines or remove them"
        )
    return texts


def _record(row: Any) -> Mapping[str, Any]:
    if isinstance(row, str):
        try:
            row = json.loads(row)
        except (ValueError, RecursionError) as error:
            raise _Fault(f"no JSON ({error})") from None
    if not isinstance(row, Mapping):
        raise _Fault(f"{type(row).__name__}, not an object")
    return row


def text_of(file: Path, line: int, record: Mapping[str, Any], *, prompts: bool) -> Text:
    """Make a text of a row.

    Raises
    ------
    DataError
        If it is none.
    """
    try:
        return _text(file, line, record, prompts)
    except _Fault as fault:
        raise DataError(f"{file}: line {line}: {fault}, expected {EXPECTED}") from None


def _text(file: Path, line: int, record: Mapping[str, Any], prompts: bool) -> Text:
    if prompts and "prompt" in record and "completion" not in record:
        record = {"text": record["prompt"]}
    if "prompt" in record or "completion" in record:
        prompt, body = _string(record, "prompt"), _string(record, "completion")
        name = "completion"
    else:
        prompt, body = "", _string(record, "text")
        name = "text"
    if not body.strip():
        raise _Fault(f"{name!r} is empty")
    return Text(prompt, body, name == "completion", file, line)


def _string(record: Mapping[str, Any], key: str) -> str:
    if key not in record:
        raise _Fault(f"no {key!r} (it has {shortlist(record, _SHOWN) or 'no keys'})")
    value = record[key]
    if not isinstance(value, str):
        raise _Fault(f"{key!r} is {type(value).__name__}, not a string")
    if not encodable(value):
        raise _Fault(f"{key!r} has half a surrogate pair, which no tokenizer takes")
    return value
