"""Text files as people and their programs write them."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from svftool.errors import DataError
from svftool.files.text_data import TextsFound, texts_in
from svftool.files.texts import read_rows, read_text
from svftool.tasks.images import list_images
from svftool.tasks.inputs import list_prompts
from svftool.tasks.texts import list_texts

ROWS = [(1, ["text", "label"]), (2, ["one, two", "a"]), (4, ["drei", "ü"])]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_table_is_read_as_spreadsheets_write_it(
    tmp_path: Path, encoding: str, end: str, separator: str
) -> None:
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    lines = [f"text{separator}label", f'"one, two"{separator}a', "", f"drei{separator}ü", ""]
    for name in ("t.csv", *(["t.tsv", "t.TSV"] if separator == "\t" else [])):
        (tmp_path / name).write_bytes((mark + end.join(lines)).encode(encoding))
        assert read_rows(tmp_path / name, "a table") == ROWS
        text = read_text(tmp_path / name, "a text")
        assert text == "\n".join(lines)


def test_commas_decide_before_semicolons_and_quotes_hold_both(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("a;b,c\n1;2,3\n")
    assert read_rows(file, "a table")[1] == (2, ["1;2", "3"])
    file.write_text('"a, b";c\n1;"2;3"\n')
    assert read_rows(file, "a table") == [(1, ["a, b", "c"]), (2, ["1", "2;3"])]
    file.write_text("text\nno; separator\n")
    assert read_rows(file, "a table")[1] == (2, ["no; separator"])
    file.write_text("")
    assert read_rows(file, "a table") == []


def test_a_cell_may_be_a_book(tmp_path: Path) -> None:
    book, before = "word " * 100_000, csv.field_size_limit()
    file = tmp_path / "t.csv"
    file.write_text(f"text,label\n{book},a\n")
    assert read_rows(file, "a table")[1][1] == [book, "a"]
    assert csv.field_size_limit() == before
    assert list_texts(file)[0].body == book


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\nc,\xe9\n", "line 2 is not UTF-8 (byte 0xe9), expected a table in UTF-8. Save"),
        (b"\x80", "line 1 is not UTF-8 (byte 0x80)"),
        (b"\xff\xfea", "line 1 is not UTF-16 (byte 0x61), expected a table in UTF-8"),
        (b"\xff\xfe\x00\xd8", "line 1 is not UTF-16"),
    ],
)
def test_what_is_no_text_is_named_by_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "t.csv"
    file.write_bytes(content)
    for read in (read_rows, read_text):
        with pytest.raises(DataError) as caught:
            read(file, "a table")
        assert str(caught.value).startswith(f"{file}: {message}")


def test_what_is_not_there_or_no_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent.*expected a table"):
        read_rows(tmp_path / "absent", "a table")
    with pytest.raises(DataError, match=r"expected a text$"):
        read_text(tmp_path, "a text")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_every_reader_of_tables_takes_them(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "t.csv"
    file.write_bytes("text;label\nwhere is it;a\n".encode(encoding))
    assert [text.body for text in list_texts(file)] == ["where is it"]
    assert [text.body for text in list_prompts([file])] == ["where is it"]
    assert texts_in(file) == TextsFound("a CSV of texts (column text)", labelled=True)
    (tmp_path / "x.png").write_bytes(b"")
    listed = tmp_path / "images.csv"
    listed.write_bytes("path;label\nx.png;a\n".encode(encoding))
    assert [(image.path.name, image.label) for image in list_images(listed)] == [("x.png", "a")]
    assert texts_in(listed) is None
