"""Texts on disk: JSONL or CSV files of texts, of prompts with completions, or of labelled texts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svftool.errors import DataError, brief, counted, shortlist
from svftool.files.texts import check_columns, read_rows, read_text
from svftool.tasks.images import encodable, is_hidden, require_encodable
from svftool.tasks.saved_datasets import is_saved_dataset, load_saved_dataset

EXPECTED = "'text', 'prompt' and 'completion', or 'messages'"
SUFFIX = ".jsonl"
TABLES = (".csv", ".tsv")
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
    turns : tuple of (str, str)
        Role and words of each message of a conversation; the body is all of them then.
    """

    prompt: str
    body: str
    complete: bool
    file: Path
    line: int
    turns: tuple[tuple[str, str], ...] = ()


class _Fault(ValueError):
    """What is wrong with one line."""


def list_texts(data: Path, *, prompts: bool = False) -> list[Text]:
    """Read a JSONL or CSV file, a folder of JSONL, or one of ``datasets.Dataset.save_to_disk``.

    Parameters
    ----------
    data : Path
        Each line (or row) has ``text``, ``prompt`` and ``completion``, or ``messages``: a list of
        objects with ``role`` and ``content``. Whatever else it has is ignored. Empty lines are
        skipped. The first line of a CSV file names its columns.
    prompts : bool
        A ``prompt`` may stand alone; it is a text then.

    Raises
    ------
    DataError
        If nothing is there, or lines are not what is expected: the first of them are named.
    """
    texts = [text for file, rows in _files(data) for text in _check(file, rows, prompts)]
    if not texts:
        raise DataError(f"{data}: no texts, expected {EXPECTED} in each line or row")
    return texts


def _files(data: Path) -> Iterator[tuple[Path, Iterator[tuple[int, Any]]]]:
    """Yield the files of a data set, and their rows with the number of the line."""
    if data.is_dir() and is_saved_dataset(data):
        yield data, _stored_rows(data)
    elif data.is_dir():
        files = sorted(f for f in data.rglob(f"*{SUFFIX}") if not is_hidden(f, data))
        yield from ((file, _lines(file)) for file in files)
    elif data.is_file():
        yield data, _rows(data) if data.suffix.lower() in TABLES else _lines(data)
    else:
        raise DataError(f"{data}: not found, expected a JSONL or CSV file, or a folder of JSONL")


def _lines(file: Path) -> Iterator[tuple[int, Any]]:
    lines = read_text(file, "JSONL").split("\n")
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _rows(file: Path) -> Iterator[tuple[int, Any]]:
    """List the rows of a table by the names of its columns, in lower case."""
    head, *rows = read_rows(file, "CSV with named columns") or [(0, [])]
    names = [name.strip().lower() for name in head[1]]
    check_columns(file, names)
    return ((line, _cells(names, row)) for line, row in rows)


class _Row(dict[str, str]):
    """Cells by the names of their columns; a short row has fewer cells than there are `names`."""

    names: Sequence[str] = ()


def _cells(names: Sequence[str], row: Sequence[str]) -> Mapping[str, str] | _Fault:
    if any(cell.strip() for cell in row[len(names) :]):
        return _Fault(
            f"{counted(len(row), 'cells')} for "
            f"{counted(len(names), 'columns')} (a text with commas stands in quotes)"
        )
    cells = _Row(zip(names, row, strict=False))
    cells.names = names
    return cells


def _stored_rows(folder: Path) -> Iterator[tuple[int, Any]]:
    """List the rows of a saved data set, the numbers of classes as their names."""
    dataset = load_saved_dataset(folder)
    named = {
        column: kind.int2str
        for column, kind in dataset.features.items()
        if hasattr(kind, "int2str")
    }
    for line, row in enumerate(dataset, 1):
        yield (
            line,
            {
                column: named[column](value) if column in named and type(value) is int else value
                for column, value in row.items()
            },
        )


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
    if isinstance(row, _Fault):
        raise row
    if isinstance(row, str):
        try:
            row = json.loads(row)
        except (ValueError, RecursionError) as error:
            raise _Fault(f"no JSON ({error})") from None
    if not isinstance(row, Mapping):
        raise _Fault(f"{_kind(row)}, not an object")
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
    if "messages" in record:
        turns = _turns(record["messages"])
        body = "\n".join(f"{role}: {words}" for role, words in turns)
        return Text("", body, False, file, line, turns)
    if prompts and "prompt" in record and "completion" not in record:
        record = {"text": record["prompt"]}
    if "prompt" in record or "completion" in record:
        prompt, body = _string(record, "prompt"), _words(record, "completion")
        name = "completion"
    else:
        prompt, body = "", _words(record, "text")
        name = "text"
    return Text(prompt, body, name == "completion", file, line)


def _turns(messages: Any) -> tuple[tuple[str, str], ...]:
    """Read the messages of a conversation in which an assistant says something."""
    if not isinstance(messages, (list, tuple)):
        raise _Fault(f"'messages' is {_kind(messages)}, not a list of messages")
    if not messages:
        raise _Fault("'messages' is empty")
    turns = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise _Fault(f"message {number} is {_kind(message)}, not an object")
        try:
            turns.append((_words(message, "role"), _string(message, "content")))
        except _Fault as fault:
            raise _Fault(f"message {number}: {fault}") from None
    if not any(role == "assistant" and words.strip() for role, words in turns):
        raise _Fault("no message of the role 'assistant', and so nothing to learn")
    return tuple(turns)


def _words(record: Mapping[str, Any], key: str) -> str:
    words = _string(record, key)
    if not words.strip():
        raise _Fault(f"{key!r} is empty")
    return words


def _kind(value: object) -> str:
    """Name the kind of a value as JSON does."""
    return _KINDS.get(type(value)) or type(value).__name__


_KINDS: Mapping[type, str] = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


def _string(record: Mapping[str, Any], key: str) -> str:
    if key not in record:
        raise _Fault(f"no {key!r} (it has {shortlist(record, _SHOWN) or 'no keys'})")
    value = record[key]
    if not isinstance(value, str):
        raise _Fault(f"{key!r} is {_kind(value)}, not a string")
    if not encodable(value):
        raise _Fault(f"{key!r} has half a surrogate pair, which no tokenizer takes")
    return value


# Texts with a class each.


@dataclass(frozen=True)
class LabelledText:
    """A text and the name of its class; `file` and `line` say where it stands."""

    text: str
    label: str
    file: Path
    line: int


def list_labelled(
    data: Path, *, text: str | None = None, label: str | None = None
) -> list[LabelledText]:
    """Read texts with a class each: JSONL, CSV, TSV, or a folder as `list_texts` takes it.

    Parameters
    ----------
    data : Path
        The first line of a CSV or TSV file names its columns.
    text : str, optional
        Column or key of the texts: ``text``, or of two columns the one that is not `label`.
    label : str, optional
        Column or key of the classes: of two columns the other one, else ``label``.

    Raises
    ------
    DataError
        If nothing is there, the columns cannot be told, or lines are not what is expected: the
        first of them are named.
    """
    found = [one for file, rows in _files(data) for one in _labelled(file, rows, text, label)]
    if not found:
        raise DataError(f"{data}: no texts, expected a text and its class in each line or row")
    require_encodable({one.label for one in found}, str(data))
    return found


def _labelled(
    file: Path, rows: Iterable[tuple[int, Any]], text: str | None, label: str | None
) -> list[LabelledText]:
    found: list[LabelledText] = []
    faults: list[str] = []
    columns: tuple[str, str] | None = None
    for line, row in rows:
        try:
            record = _record(row)
            columns = columns or _columns(file, _names(record), text, label)
            found.append(_labelled_text(file, line, record, *columns))
        except _Fault as fault:
            faults.append(f"line {line}: {fault}")
    if faults:
        expected = (
            "a text and the name of its class"
            if columns is None
            else (f"a text as {columns[0]!r} and the name of its class as {columns[1]!r}")
        )
        raise DataError(
            f"{file}: {shortlist(faults, _SHOWN)}. Expected {expected} in each line: mend these "
            "lines or remove them"
        )
    return found


def _columns(
    file: Path, names: Sequence[str], text: str | None, label: str | None
) -> tuple[str, str]:
    """Find the columns of texts and of classes among the names of the first row."""
    texts = None if text is None else _named(file, names, text, "--text-column")
    labels = None if label is None else _named(file, names, label, "--label-column")
    if texts is None:
        other = [name for name in names if name != labels]
        usual = next((name for name in other if name.lower() == "text"), None)
        texts = other[0] if usual is None and labels is not None and len(names) == 2 else usual
    if labels is None and texts is not None:
        other = [name for name in names if name != texts]
        usual = next((name for name in other if name.lower() == "label"), None)
        labels = other[0] if len(other) == 1 else usual
    if texts is None or labels is None or texts == labels:
        raise DataError(
            f"{file}: columns {shortlist([brief(name) for name in names], _SHOWN)} in the first "
            "row, expected 'text' and one of classes. Name them with --text-column and "
            "--label-column; a table begins with a row of names"
        )
    return texts, labels


def _names(record: Mapping[str, Any]) -> list[str]:
    """Return the columns there are, those that a short row lacks too."""
    return list(record.names if isinstance(record, _Row) else record)


def _named(file: Path, names: Sequence[str], asked: str, flag: str) -> str:
    for name in names:
        if name == asked or name.lower() == asked.strip().lower():
            return name
    listed = shortlist([brief(name) for name in names], _SHOWN)
    raise DataError(f"{file}: {flag} {asked!r} is no column of the first row: {listed}")


def _labelled_text(
    file: Path, line: int, record: Mapping[str, Any], text: str, label: str
) -> LabelledText:
    words = _words(record, text)
    value = record.get(label)
    # A number, as pandas writes classes, is a name like any other.
    name = str(value) if isinstance(value, int) else value
    if label not in record or not isinstance(name, str):
        kind = "missing" if label not in record else _kind(value)
        raise _Fault(f"{label!r} is {kind}, not the name of a class")
    if not name.strip():
        raise _Fault(f"{label!r} is empty")
    return LabelledText(words, name.strip(), file, line)


def list_column(data: Path, column: str) -> list[Text]:
    """Read the texts of one column or key, whatever else the rows have.

    Parameters
    ----------
    data : Path
        As for `list_labelled`.
    column : str

    Raises
    ------
    DataError
        As `list_labelled` does.
    """
    return [text for file, rows in _files(data) for text in _of_column(file, rows, column)]


def _of_column(file: Path, rows: Iterable[tuple[int, Any]], column: str) -> Iterator[Text]:
    found: str | None = None
    for line, row in rows:
        try:
            record = _record(row)
            if found is None:
                found = _named(file, _names(record), column, "--text-column")
            yield Text("", _words(record, found), False, file, line)
        except _Fault as fault:
            raise DataError(f"{file}: line {line}: {fault}, expected a text") from None
