"""Tables of named rows whose names take what width the terminal has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from svftool.report.names import Names
from svftool.report.text import plain_table

Cell = str | Text

_LEAST = 12
"""Columns that names have on the narrowest terminal."""


@dataclass
class NameTable:
    """A table whose first column holds names of tensors, or of parts of a network.

    Attributes
    ----------
    names : Names
        Of all rows.
    title : str
        Over the names.
    gap : int
        Columns between two columns.
    """

    names: Names
    title: str = "layer"
    gap: int = 2
    _columns: list[tuple[str, bool, int, str]] = field(default_factory=list)
    _rows: list[tuple[str, list[Cell]]] = field(default_factory=list)

    def column(self, title: str, *, right: bool = False, width: int = 0, style: str = "") -> None:
        """Add a column, to the right of those there are."""
        self._columns.append((title, right, width, style))

    def row(self, name: str, cells: Iterable[Cell]) -> None:
        """Add a row."""
        self._rows.append((name, list(cells)))

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        """Draw the table at the width that there is."""
        yield self._drawn(options.max_width)

    def _drawn(self, width: int) -> Table:
        table = plain_table()
        table.padding = (0, self.gap, 0, 0)
        taken = 0
        table.add_column(self.title, overflow="fold")
        for index, (title, right, least, style) in enumerate(self._columns):
            cells = [title, *(cells[index] for _, cells in self._rows)]
            size = max(
                least,
                *(Text(one).cell_len if isinstance(one, str) else one.cell_len for one in cells),
            )
            taken += size + self.gap
            table.add_column(
                title, justify="right" if right else "left", no_wrap=True, width=size, style=style
            )
        room = max(width - taken, _LEAST)
        for name, cells in self._rows:
            table.add_row(Text(self.names.fit(name, room)), *map(_plain, cells))
        return table


def _plain(cell: Cell) -> Text:
    return Text(cell) if isinstance(cell, str) else cell
