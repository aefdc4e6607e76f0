"""File and tensor names of any bytes: every output is written, and steers nothing."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import unicodedata
from pathlib import Path

import pytest
import torch

from svftool import CheckpointError, audit, decompose, extract, merge, open_factors
from svftool.checkpoints import SafetensorsWriter
from svftool.report import inspect as report
from svftool.report.json import to_json

RAW = os.fsdecode(b"n\xff\xfe")
"""A file name that is no UTF-8."""

UNSEEN = "".join(
    letter
    for letter in map(chr, range(sys.maxunicode + 1))
    if unicodedata.category(letter) in ("Cc", "Cf", "Zl", "Zp") and letter != "\0"
)
"""Controls, marks of direction, separators of lines: all that Unicode has."""


def saved(path: Path, scale: float = 1.0, name: str = "a.weight") -> Path:
    torch.manual_seed(0)
    tensors = {name: torch.randn(6, 5) * scale, "b.bias": torch.ones(4)}
    layout = {key: (value.dtype, tuple(value.shape)) for key, value in tensors.items()}
    with SafetensorsWriter(path, layout) as writer:
        for key, value in tensors.items():
            writer.write(key, value)
    return path


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / RAW
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("the file system takes UTF-8 alone")
    return folder


def test_places_that_are_no_utf8(place: Path) -> None:
    base = saved(place / f"base{RAW}.safetensors")
    tuned = saved(place / f"tuned{RAW}.safetensors", 1.1)
    factors = decompose(base, place / f"f{RAW}").output
    with open_factors(factors) as store, store.open_base() as found:
        assert found.path == base
    small = extract(factors, tuned, output=place / f"e{RAW}.safetensors").output
    for name in (f"m{RAW}", f"m{RAW}.safetensors", f"m{RAW}.pth"):
        assert merge(factors, [small], output=place / name, verify=True).verified


def test_reports_of_places_that_are_no_utf8(place: Path) -> None:
    base = saved(place / f"base{RAW}.safetensors")
    result = audit(base, [saved(place / f"tuned{RAW}.safetensors", 1.1)])
    report.csv_text(result).encode()
    text = to_json(report.document(result))
    assert json.loads(text)["comparisons"][0]["base"] == str(base)
    page = pytest.importorskip("svftool.report.inspect.page")
    pytest.importorskip("jinja2")
    page.page(result).encode()


def test_nothing_unseen_reaches_any_report(tmp_path: Path) -> None:
    name = f"x{UNSEEN}.weight"
    base = saved(tmp_path / "a.safetensors", name=name)
    result = audit(base, [saved(tmp_path / "b.safetensors", 1.1, name=name)])
    texts = {"csv": report.csv_text(result), "json": to_json(report.document(result))}
    pytest.importorskip("jinja2")
    from svftool.report.inspect.page import page

    texts["html"] = page(result)
    for kind, text in texts.items():
        found = set(text) & set(UNSEEN) - set("\n\t")
        assert not found, (kind, sorted(map(ord, found))[:5])
    rows = list(csv.reader(io.StringIO(texts["csv"])))
    assert len(rows) == 3
    assert any(row["name"] == name for row in json.loads(texts["json"])["comparisons"][0]["layers"])


def test_a_pickled_name_that_no_safetensors_can_hold_is_refused_first(tmp_path: Path) -> None:
    torch.save({"a\udcff.weight": torch.randn(4, 3)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="half of a surrogate pair"):
        decompose(tmp_path / "x.pth", tmp_path / "f")
    assert not (tmp_path / "f").exists()
