"""Pieces of SVG drawings, as text.

Colours are CSS variables of the page, so that one drawing serves the light and the dark scheme.
Names are escaped wherever they enter.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from html import escape

from svftool.report.names import Names

WIDTH = 1080
"""Of a drawing across the page."""


def svg(
    height: float, parts: Iterable[str], label: str, *, width: float = WIDTH, kind: str = "wide"
) -> str:
    """Return a drawing that scales with the page, but one wider than a page keeps its size."""
    style = f' style="min-width:{width:.0f}px"' if width > WIDTH else ""
    return (
        f'<svg class="{kind}" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="{escape(label)}"{style}>{"".join(parts)}</svg>'
    )


def text(
    x: float,
    y: float,
    content: str,
    *,
    anchor: str = "start",
    kind: str = "",
    upright: bool = False,
) -> str:
    """Return words; they are escaped. Upright ones end at their place and run up to it."""
    style = f' class="{kind}"' if kind else ""
    style += f' transform="rotate(-90 {x:.1f} {y:.1f})"' if upright else ""
    return f'<text{style} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'


def room(content: str) -> float:
    """Return a width that words have room in, in the fonts that browsers choose for the page.

    Examples
    --------
    >>> room("12.5%"), room("")
    (41.5, 0.0)
    """
    wide = sum(unicodedata.east_asian_width(letter) in "WF" or letter in "%W" for letter in content)
    return 7.5 * len(content) + 4.0 * wide


LINE = 12.0
"""Between upright words beside each other, at least."""

_LONGEST = 24


def under(
    places: Sequence[float], names: Sequence[str], y: float, width: float
) -> tuple[list[str], float]:
    """Name places along a lower edge, all of them: upright where they have no room side by side.

    Parameters
    ----------
    places : sequence of float
        From left to right, `LINE` apart or more.
    names : sequence of str
        One a place; the middle of long ones is left out.
    y : float
        Of the edge.
    width : float
        Where the drawing ends.

    Returns
    -------
    list of str
        Ticks and names.
    float
        Height that they take.
    """
    cut = Names(names)
    names = [name if len(name) <= _LONGEST else cut.fit(name, _LONGEST) for name in names]
    edges = [*places[1:], width + 10.0]
    flat = all(
        room(name) + 10.0 <= edge - place
        for name, place, edge in zip(names, places, edges, strict=True)
    )
    parts = [
        f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{y:.0f}" y2="{y + 5:.0f}"/>'
        for x in places
    ]
    if flat:
        return parts + [text(x, y + 17, name) for x, name in zip(places, names, strict=True)], 24.0
    parts += [
        text(x + 4, y + 9, name, anchor="end", upright=True)
        for x, name in zip(places, names, strict=True)
    ]
    return parts, 14.0 + max(map(room, names), default=0.0)


def cell(
    x: float, y: float, width: float, height: float, shade: float, title: str, kind: str
) -> str:
    """Return a cell of a map, shaded by the page's style, with a title to hover over."""
    gap = 1.0 if width > 5 else 0.2
    return (
        f'<rect class="{kind}" x="{x:.2f}" y="{y:.1f}" width="{max(width - gap, 0.4):.2f}" '
        f'height="{height:.1f}" style="--v:{shade:.3f}"><title>{escape(title)}</title></rect>'
    )


def line(points: Iterable[tuple[float, float]], kind: str) -> str:
    """Return a line through points."""
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{kind}" points="{joined}"/>'
