"""Pieces of rich tables that several reports share."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from svftool.report.text import safe, short


def plain_table() -> Table:
    """Return a table without outer lines, as all reports draw it."""
    return Table(
        box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", title_justify="left"
    )


def by_reason(left_whole: Mapping[str, str], limit: int = 3) -> Table:
    """Group names by the reason they share, the most frequent first."""
    groups: dict[str, list[str]] = {}
    for name, reason in left_whole.items():
        groups.setdefault(reason, []).append(safe(name))
    table = plain_table()
    table.add_column("left whole", justify="right")
    table.add_column("why")
    table.add_column("such as", style="dim", overflow="ellipsis", no_wrap=True)
    for reason, names in sorted(groups.items(), key=lambda item: -len(item[1])):
        table.add_row(str(len(names)), Text(safe(reason)), Text(short(names[0], 30)))
    return table
