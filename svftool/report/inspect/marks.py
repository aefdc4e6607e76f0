"""Small marks that table, page and figure share: bars, sparklines, colours, blocks of names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from svftool.auditing import Row
from svftool.report.text import number

__all__ = [
    "COLOURS", "bar", "block_of", "in_order", "largest_of", "number", "part_of", "sparkline",
]  # fmt: skip

COLOURS = {
    "untouched": "dim",
    "rounding noise": "dim green",
    "quantisation only": "dim green",
    "spectrum only": "cyan",
    "low rank": "blue",
    "full fine-tune": "yellow",
    "full fine-tune or mixed (screened)": "yellow",
    "mixed": "yellow",
    "changed": "yellow",
    "rearranged": "magenta",
    "unrelated": "red",
    "broken": "bold red",
    "undecided": "yellow",
}
"""Colour of each verdict on a terminal."""

_LEVELS = "▁▂▃▄▅▆▇█"
_EIGHTHS = ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")


def bar(part: float, width: int) -> str:
    """Draw a horizontal bar in eighths of a character; what is not zero can be seen.

    Examples
    --------
    >>> bar(0.5, 4), bar(1.0, 4), bar(0.0, 4), bar(1e-9, 4)
    ('██', '████', '', '▏')
    """
    if not part > 0.0:
        return ""
    eighths = max(1, round(min(1.0, part) * width * 8))
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8]


def sparkline(values: Sequence[float] | npt.NDArray[np.floating], width: int) -> str:
    """Draw a curve in one line: the largest of each stretch, against the largest of all.

    Examples
    --------
    >>> sparkline([0.0, 1.0, 2.0, 4.0], 4)
    '·▂▄█'
    """
    found = np.asarray(values, dtype=np.float64)
    if found.size == 0:
        return ""
    stretches = np.array_split(found, min(width, found.size))
    tops = [float(part.max()) for part in stretches]
    largest = max(tops)
    if largest <= 0.0:
        return "·" * len(tops)
    return "".join(
        _LEVELS[min(7, max(0, math.ceil(8 * top / largest) - 1))] if top > 0.0 else "·"
        for top in tops
    )


def largest_of(values: Iterable[float | None]) -> float:
    """Return the largest finite number, by which bars are drawn; 0 where there is none.

    Examples
    --------
    >>> largest_of([0.5, None, math.inf])
    0.5
    """
    return max((v for v in values if v is not None and math.isfinite(v)), default=0.0)


def part_of(value: float | None, largest: float) -> float:
    """Return the length of a bar, from 0 to 1; what is infinite is as long as bars are.

    Examples
    --------
    >>> part_of(0.5, 2.0), part_of(math.inf, 0.0), part_of(None, 1.0)
    (0.25, 1.0, 0.0)
    """
    size = abs(value or 0.0)
    if math.isinf(size):
        return 1.0
    return min(size / largest, 1.0) if largest > 0.0 else 0.0


def block_of(name: str) -> str:
    """Return the part of a network that a tensor belongs to: its name up to the first number.

    Examples
    --------
    >>> block_of("model.layers.11.mlp.up_proj.weight"), block_of("fc.weight"), block_of("pos")
    ('model.layers.11', 'fc', 'pos')
    """
    parts = name.split(".")
    for index, part in enumerate(parts[:-1]):
        if part.isdecimal():
            return ".".join(parts[: index + 1])
    return ".".join(parts[:-1]) or name


def in_order(rows: Sequence[Row]) -> list[Row]:
    """Sort rows as the file has them, but the blocks of one series by their numbers.

    Files are often sorted by name, so that block 10 comes before block 2.
    """
    first: dict[str, int] = {}
    keys = []
    for index, row in enumerate(rows):
        head, _, last = block_of(row.name).rpartition(".")
        series, count = (head, int(last)) if last.isdecimal() else (row.name, 0)
        keys.append((first.setdefault(series, index), count, index))
    return [rows[index] for _, _, index in sorted(keys)]
