"""Numbers, names, paths and tables as people read them in a terminal."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

_UNSEEN = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
"""Unicode's categories of controls, of marks that steer the text, surrogates, line separators."""


def is_unseen(letter: str) -> bool:
    """Whether a character steers a terminal or the order of the text and is not seen itself."""
    return unicodedata.category(letter) in _UNSEEN


def safe(text: str) -> str:
    r"""Replace characters that are not seen, which a tensor or file name may carry, by escapes.

    Examples
    --------
    >>> safe("a\x1b[31mb"), safe("a\u2028b")
    ('a\\x1b[31mb', 'a\\u2028b')
    """
    if text.isprintable():
        return text
    return "".join(
        letter.encode("unicode_escape").decode() if is_unseen(letter) else letter for letter in text
    )


_LONGEST_WORD = 400


def one_line(message: str) -> str:
    """Return a message as a terminal can show it: safe, on one line, without endless names.

    Examples
    --------
    >>> len(one_line("tensor " + "x" * 5000))
    188
    """
    return re.sub(
        rf"\S{{{_LONGEST_WORD},}}", lambda word: f"{word[0][:120]}…{word[0][-60:]}", safe(message)
    )


def shape(sizes: tuple[int, ...]) -> str:
    """Write a shape with multiplication signs.

    Examples
    --------
    >>> shape((64, 3, 7, 7))
    '64×3×7×7'
    """
    return "×".join(map(str, sizes))


def size(count: float) -> str:
    """Write bytes in decimal units, as shard sizes are given.

    Examples
    --------
    >>> size(1532), size(25_600_000)
    ('1.5 kB', '25.6 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def seconds(count: float) -> str:
    """Write a duration.

    Examples
    --------
    >>> seconds(0.0042), seconds(12.34), seconds(3723)
    ('4 ms', '12.3 s', '1 h 02 min')
    """
    if count < 1:
        return f"{1000 * count:.0f} ms"
    if count < 60:
        return f"{count:.1f} s"
    minutes, rest = divmod(round(count), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def number(value: float | None) -> str:
    """Write a number in six characters or less.

    Examples
    --------
    >>> [number(x) for x in (0.0, 0.12345, 1.5e-5, 12345.6, 3.0, None, math.inf)]
    ['0', '0.123', '1.5e-5', '1.2e4', '3', '–', '∞']
    """
    if value is None:
        return "–"
    if math.isinf(value):
        return "∞" if value > 0.0 else "-∞"
    if value == 0.0 or (value == int(value) and abs(value) < 1e4):
        return str(int(value))
    if 1e-3 <= abs(value) < 1e4:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


# Pieces of rich tables that several reports share.


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
    table.add_column("such as", style="dim", overflow="fold")
    for reason, names in sorted(groups.items(), key=lambda item: -len(item[1])):
        table.add_row(str(len(names)), Text(safe(reason)), Text(names[0]))
    return table


def share(value: float) -> str:
    """Return a share of a norm, which may be far below a percent; a dash where it is not known.

    Examples
    --------
    >>> share(0.1234), share(1.5e-7), share(math.nan)
    ('12.34%', '1.5e-07', '-')
    """
    if math.isnan(value):
        return "-"
    return f"{value:.2%}" if value >= 1e-4 else f"{value:.1e}"
