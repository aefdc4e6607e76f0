"""Results of ``svftool lineage``: document, table, tree and page."""

from __future__ import annotations

from importlib import resources
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text
from rich.tree import Tree

from svftool.report import json
from svftool.report.drawing import require_jinja
from svftool.report.inspect.svg import room, svg, text
from svftool.report.names import distinct_paths
from svftool.report.text import number, plain_table, safe
from svftool.stages.lineage import Branch, Claim, Lineage, Pair

_COLOURS = {
    "derived": "green",
    "independent": "cyan",
    "undecided": "yellow",
    "not comparable": "dim",
}
_CLASSES = {
    "derived": "spectrum-only",
    "independent": "low-rank",
    "undecided": "undecided",
    "not comparable": "untouched",
}
_STEP, _LINE = 46.0, 34.0


def document(found: Lineage) -> dict[str, Any]:
    """Return the result for scripts."""
    names = [str(path) for path in found.paths]
    return json.document(
        "lineage",
        checkpoints=names,
        pairs=[
            {
                "a": names[pair.a],
                "b": names[pair.b],
                "relation": pair.relation,
                "p_value": pair.p_value,
                "direction": _direction(pair),
                "reason": pair.reason,
                "tested": pair.way,
                "evidence": pair.evidence,
                "distance": pair.distance,
                "shared": pair.shared,
            }
            for pair in found.pairs
        ],
        tree=[
            {
                "checkpoint": names[one.child],
                "parent": None if one.parent is None else names[one.parent],
                "distance": one.distance,
                "directed": one.directed,
            }
            for one in found.tree
        ],
        claims=[
            {
                "checkpoint": names[one.checkpoint],
                "base_model": one.base,
                "found": None if one.found is None else names[one.found],
                "holds": one.holds,
            }
            for one in found.claims
        ],
        seconds=found.seconds,
    )


def _direction(pair: Pair) -> str | None:
    return {-1: "a to b", 1: "b to a"}.get(pair.direction)


def view(found: Lineage) -> RenderableType:
    """Return the result for people: a line a pair, then the tree."""
    names = distinct_paths(found.paths)
    table = plain_table()
    for title in ("pair", "relation"):
        table.add_column(title, overflow="fold")
    for title in ("p", "distance"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("what tells", overflow="fold")
    for pair in found.pairs:
        table.add_row(
            Text(_couple(pair, names)),
            Text(pair.relation, _COLOURS[pair.relation]),
            Text(_p(pair)),
            Text(number(pair.distance)),
            Text("; ".join(part for part in (pair.evidence, pair.reason) if part), "dim"),
        )
    parts: list[RenderableType] = [table, "", _drawn(found, names)]
    parts += [_claim(one, names) for one in found.claims]
    parts.append(
        Text(
            "→: which came first is known; score: how far the units of layers agree, standard "
            "normal for strangers, and p the chance of it; distance: of A and B, against norms",
            "dim",
        )
    )
    return Group(*parts)


def _couple(pair: Pair, names: list[str]) -> str:
    first, second = (pair.a, pair.b) if pair.direction <= 0 else (pair.b, pair.a)
    return f"{names[first]} {'→' if pair.direction else '·'} {names[second]}"


_TINY = 1e-30
"""Below this the digits of a chance say nothing more."""


def _p(pair: Pair) -> str:
    if pair.p_value is None:
        return "–"
    return "< 1e-30" if pair.p_value < _TINY else f"{pair.p_value:.2g}"


def _drawn(found: Lineage, names: list[str]) -> Tree:
    root = Tree("", hide_root=True)
    places: dict[int, Tree] = {}
    for one in found.tree:
        above = root if one.parent is None else places[one.parent]
        places[one.child] = above.add(Text(_label(one, names)))
    return root


def _label(one: Branch, names: list[str]) -> str:
    if one.parent is None:
        return names[one.child]
    known = "" if one.directed else ", or the reverse"
    return f"{names[one.child]} (distance {number(one.distance)}{known})"


def _claim(one: Claim, names: list[str]) -> Text:
    who, base = names[one.checkpoint], safe(one.base)
    if one.found is None:
        return Text(f"{who} names the base {base}, which is not among these", "dim")
    said, colour = {
        True: ("it is a relative", "green"),
        False: ("it is none", "bold red"),
        None: ("that could not be told", "yellow"),
    }[one.holds]
    return Text(f"{who} names the base {base}: {said}", colour)


def page(found: Lineage) -> str:
    """Return the result as one page for any browser.

    Raises
    ------
    MissingDependencyError
        If jinja2 is not installed.
    """
    from svftool.version import __version__

    markup = require_jinja().Environment(autoescape=True)
    style = resources.files("svftool.report.inspect").joinpath("assets/page.css")
    template = resources.files("svftool.report").joinpath("assets/lineage.html")
    names = distinct_paths(found.paths)
    rendered: str = markup.from_string(template.read_text("utf-8")).render(
        style=style.read_text("utf-8"),
        version=__version__,
        title=f"{len(names)} checkpoints",
        lead=", ".join(f"{count} {what}" for what, count in _counts(found).items()),
        picture=picture(found),
        wide=round(1.25 * _width(found)),
        claims=[_claim(one, names).plain for one in found.claims],
        pairs=[
            {
                "names": _couple(pair, names),
                "relation": pair.relation,
                "kind": _CLASSES[pair.relation],
                "p": _p(pair),
                "distance": number(pair.distance),
                "evidence": pair.evidence,
                "reason": pair.reason,
            }
            for pair in found.pairs
        ],
    )
    return rendered


def _counts(found: Lineage) -> dict[str, int]:
    counts = dict.fromkeys(_COLOURS, 0)
    for pair in found.pairs:
        counts[pair.relation] += 1
    return {what: count for what, count in counts.items() if count}


def picture(found: Lineage) -> str:
    """Draw the tree as SVG, a line a checkpoint; what is not known of the order is dashed."""
    names = distinct_paths(found.paths)
    depth: dict[int, int] = {}
    places: dict[int, tuple[float, float]] = {}
    parts = []
    for index, one in enumerate(found.tree):
        depth[one.child] = 0 if one.parent is None else depth[one.parent] + 1
        x, y = 12.0 + _STEP * depth[one.child], 20.0 + _LINE * index
        places[one.child] = x, y
        if one.parent is not None:
            from_x, from_y = places[one.parent]
            dashed = "" if one.directed else ' stroke-dasharray="4 3"'
            parts.append(
                f'<path d="M{from_x:.1f} {from_y + 5:.1f} V{y:.1f} H{x - 5:.1f}" fill="none" '
                f'stroke="var(--quiet)"{dashed}/>'
            )
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="var(--v-spectrum)"/>')
        parts.append(text(x + 12.0, y + 4.0, _label(one, names)))
    label = "which checkpoint comes from which"
    return svg(20.0 + _LINE * len(found.tree), parts, label, width=_width(found), kind="")


def _width(found: Lineage) -> float:
    """Return how wide the tree is, with its names."""
    names, ends = distinct_paths(found.paths), [0.0]
    depth: dict[int, int] = {}
    for one in found.tree:
        depth[one.child] = 0 if one.parent is None else depth[one.parent] + 1
        ends.append(36.0 + _STEP * depth[one.child] + room(_label(one, names)))
    return max(ends)
