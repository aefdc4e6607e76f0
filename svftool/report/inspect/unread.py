"""Tensors that were not compared: lists under the heading that each belongs to, and a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from svftool.auditing import Comparison, Unread
from svftool.errors import counted
from svftool.report.text import plain_table, safe, shape

MOST_LINES = 20
"""Tensors without a counterpart beyond which they are gathered by blocks."""

_SIGNS = {"of another shape": "~", "only in the base": "-", "only in the fine-tune": "+"}
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
    found = {what: items for what, items in unread(one) if what in _SIGNS}
    lines = [(_SIGNS[what], item) for what, items in found.items() for item in items]
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
    legend = [f"{_SIGNS[what]}: {what}" for what in found]
    if table.row_count < len(lines):
        legend.append("gathered by their names (--all lists each)")
    yield Text("; ".join(legend), "dim")


def _add_blocks(table: Table, lines: Sequence[tuple[str, Unread]]) -> None:
    for (sign, block), items in _gathered(lines).items():
        name = items[0].name if len(items) == 1 else f"{block}.*"
        count = counted(len(items), "tensors")
        sides = (count if sign != other else "" for other in ("+", "-"))
        colour = _COLOURS[sign]
        table.add_row(Text(sign, colour), Text(safe(name), colour), *sides, Text())


def _gathered(lines: Sequence[tuple[str, Unread]]) -> dict[tuple[str, str], list[Unread]]:
    """Gather tensors by as many first parts of their names as leave few enough groups."""
    longest = max(item.name.count(".") for _, item in lines)
    groups: dict[tuple[str, str], list[Unread]] = {}
    for depth in range(max(longest, 1), 0, -1):
        groups = {}
        for sign, item in lines:
            block = ".".join(item.name.split(".")[:depth])
            groups.setdefault((sign, block), []).append(item)
        if len(groups) <= MOST_LINES:
            break
    return groups


def _rest(item: Unread) -> str:
    """Return what a reason says beside what sign and shapes say."""
    if item.reason in ("not in the base", "not in the fine-tune"):
        return ""
    if item.in_two_shapes:
        return "stored transposed" if item.reason.endswith("stored transposed") else ""
    return safe(item.reason)
