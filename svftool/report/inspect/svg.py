"""Pieces of SVG drawings, as text.

Colours are CSS variables of the page, so that one drawing serves the light and the dark scheme.
Names are escaped wherever they enter.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

WIDTH = 1080
"""Of a drawing across the page."""


def svg(
    height: float, parts: Iterable[str], label: str, *, width: int = WIDTH, kind: str = "wide"
) -> str:
    """Return a drawing that scales with the page."""
    return (
        f'<svg class="{kind}" viewBox="0 0 {width} {height:.0f}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def text(x: float, y: float, content: str, *, anchor: str = "start", kind: str = "") -> str:
    """Return words; they are escaped."""
    style = f' class="{kind}"' if kind else ""
    return f'<text{style} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'


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
