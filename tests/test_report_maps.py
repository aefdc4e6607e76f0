"""The page of a large model: blocks in their order, maps and table that do not grow with it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from svftool.auditing import AuditResult, Comparison, Curves, Measured, Row
from svftool.report.inspect.maps import direction_map, heat_map
from svftool.report.inspect.marks import in_order
from svftool.report.inspect.page import LINES, page


def row(name: str, drift: float | None = 0.1) -> Row:
    base = np.linspace(2.0, 1.0, 30)
    along = np.full(30, drift or 0.0)
    return Row(
        name,
        view="matrix",
        matrix=(30, 40),
        shape=(30, 40),
        dtype=("float32",),
        measured=Measured(
            {"weight_drift": drift}, {"effective_rank": 20.0}, {"effective_rank": 21.0}
        ),
        curves=Curves(base, base + along, along),
    )


def experts(count: int) -> list[Row]:
    return [row(f"layers.{i // 64}.experts.{i % 64}.w.weight", i / count) for i in range(count)]


def rects(drawing: str) -> Sequence[str]:
    return re.findall(r"<rect[^>]*>", drawing)


def test_blocks_come_by_their_numbers_and_the_rest_as_in_the_file() -> None:
    names = ["stem.w", *(f"model.layers.{i}.{x}" for i in (0, 1, 10, 11, 2) for x in "ba"), "head"]
    found = [one.name for one in in_order([row(name) for name in names])]
    blocks = [f"model.layers.{i}.{x}" for i in (0, 1, 2, 10, 11) for x in "ba"]
    assert found == ["stem.w", *blocks, "head"]
    assert [one.name for one in in_order([row("b.w"), row("a.w")])] == ["b.w", "a.w"]


def test_neighbours_share_a_column_that_shows_the_largest() -> None:
    rows = [row(f"layers.{i}.w", 0.9 if i == 7 else 0.1) for i in range(10)]
    assert len(rects(heat_map(rows, ["weight_drift"], most=10))) == 10
    merged = heat_map(rows, ["weight_drift"], most=5)
    shades = [float(one) for one in re.findall(r"--v:([\d.]+)", merged)]
    assert shades == pytest.approx([1 / 9, 1 / 9, 1 / 9, 1.0, 1 / 9], abs=1e-3)
    assert "layers.6.w and the next 1, the largest: weight drift 0.9" in merged
    shades = [float(one) for one in re.findall(r"--v:([\d.]+)", direction_map(rows, most=5))]
    assert np.array(shades).reshape(5, -1).argmax(axis=0).tolist() == [3] * (len(shades) // 5)


def test_the_page_of_very_many_matrices_stays_small() -> None:
    rows = experts(1500)
    one = Comparison(Path("a"), Path("b"), ("checkpoint", "checkpoint"), tuple(rows))
    text = page(AuditResult((one,), ("weight_drift",)))
    assert len(text) < 5_000_000
    assert text.count('<td class="name">') == LINES
    assert f"and {1500 - LINES} more matrices" in text
    series = page(AuditResult((one,) * 4, ("weight_drift",)))
    assert len(series) < 2 * len(text)
    few = Comparison(Path("a"), Path("b"), ("checkpoint", "checkpoint"), tuple(rows[:20]))
    assert "more matrices" not in page(AuditResult((few,), ("weight_drift",)))
