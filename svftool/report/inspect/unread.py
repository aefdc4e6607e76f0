"""Tensors that were not compared: lists under the heading that each belongs to, and a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from svftool.auditing import Comparison, Unread
from svftool.report.inspect.marks import block_of
from svftool.report.text import plain_table, safe, shape

MOST_LINES = 20
"""Tensors without a counterpart beyond which they are gathered by blocks."""

_COLOURS = {"-": "red", "+": "green", "~": "yellow"}


def unread(one: Comparison) -> list[tuple[str, list[Unread]]]:
    """List them; one that both sides have, in two shapes, is listed once."""
    shaped = [item for item in one.unmatched_base if item.in_two_shapes]
    lists = (
        ("of another shape", shaped),
        ("only in the base", [x for x in one.unmatched_base if not x.in_two_shapes]),
        ("only in the fine-tune", [x for x in one.unmatched_tuned if not x.in_two_shapes]),
        ("left out", list(one.left_out)),
    )
    return [(what, items) for what, items in lists if items]


def unmatched(one: Comparison, *, every: bool = False) -> Iterator[RenderableType]:
    """Draw a table of what has no counterpart: ``-`` base only, ``+`` fine-tune only, ``~`` both.

    Parameters
    ----------
    one : Comparison
    every : bool
        A line a tensor, however many there are.
    """
    signs = {"of another shape": "~", "only in the base": "-", "only in the fine-tune": "+"}
    lines = [(signs[what], item) for what, items in unread(one) if what in signs for item in items]
    if not lines:
        return
    yield ""
    table = plain_table()
    table.add_column("", no_wrap=True)
    table.add_column("not in both", overflow="fold")
    table.add_column("base", overflow="fold")
    table.add_column("fine-tune", overflow="fold")
    table.add_column("", overflow="fold")
    if len(lines) > MOST_LINES and not every:
        _add_blocks(table, lines)
    else:
        for sign, item in lines:
            sides = ("" if one is None else shape(one) or "number" for one in item.shapes)
            name, why = Text(safe(item.name), _COLOURS[sign]), Text(_rest(item), "dim")
            table.add_row(Text(sign, _COLOURS[sign]), name, *sides, why)
    yield table
    gathered = "; gathered by blocks, --all lists each" if table.row_count < len(lines) else ""
    yield Text(f"-: only in the base; +: only in the fine-tune; ~: two shapes{gathered}", "dim")


def _add_blocks(table: Table, lines: Sequence[tuple[str, Unread]]) -> None:
    counts: dict[tuple[str, str], list[Unread]] = {}
    for sign, item in lines:
        counts.setdefault((sign, block_of(item.name)), []).append(item)
    for (sign, block), items in counts.items():
        name = items[0].name if len(items) == 1 else f"{block}.*"
        count = f"{len(items)} tensors" if len(items) > 1 else "1 tensor"
        sides = (count if sign != other else "" for other in ("+", "-"))
        colour = _COLOURS[sign]
        table.add_row(Text(sign, colour), Text(safe(name), colour), *sides, Text())


def _rest(item: Unread) -> str:
    """Return what a reason says beside what sign and shapes say."""
    if item.reason in ("not in the base", "not in the fine-tune"):
        return ""
    if item.in_two_shapes:
        return "stored transposed" if item.reason.endswith("stored transposed") else ""
    return safe(item.reason)
