"""Results of ``svftool merge --method``: document, table and page."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from svftool.errors import counted, shortlist
from svftool.merging import Clash
from svftool.report import json
from svftool.report.drawing import require_jinja
from svftool.report.inspect.svg import cell, room, svg, text
from svftool.report.names import Names, distinct_paths
from svftool.report.table import NameTable
from svftool.report.text import number, plain_table, safe
from svftool.report.weights import (
    BRINGS,
    weights_cells,
    weights_columns,
    weights_document,
    weights_sentences,
)
from svftool.stages.combine_result import CombineResult
from svftool.stages.merge_layers import MergedLayer

MOST_ROWS = 12
_COLUMNS = ("cosine", "overlap", "sign conflicts", "inflation")
_MEANINGS = {
    "cosine": "mean cosine of two inputs' changes: above 0 they add up, below 0 they cancel",
    "overlap": "share of the leading directions that two inputs have in common, 0 to 1",
    "sign conflicts": "share of the entries that two inputs move in opposite directions; half of "
    "them by chance",
    "inflation": "largest singular value of the merged change over the mean of the inputs': 1 "
    "where nothing is counted twice",
}


def document(result: CombineResult) -> dict[str, Any]:
    """Return the result for scripts."""
    found = result.interference
    names = [str(one.path) for one in result.inputs]
    chosen = {} if result.weights is None else {"weights": weights_document(result.weights)}
    return json.document(
        "merge",
        output=str(result.output),
        kind="checkpoint",
        layers=[
            {
                "name": one.name,
                "changed": one.changed,
                "relative_change": one.relative_change,
                "rounding_loss": one.rounding_loss,
            }
            for one in result.layers
        ],
        unchanged=result.unchanged,
        added=result.added,
        replaced=result.replaced,
        verified=result.verified,
        rebuilt_error=None,
        clipped=[{"name": name, "values": count} for name, count in result.clipped.items()],
        dropped=json.sizes(result.dropped),
        method=result.method,
        inputs=[
            {
                "input": str(one.path),
                "weight": one.weight,
                "kind": one.kind,
                "changed": one.changed,
                "relative_change": one.relative_change,
                "cosine": one.cosine,
                "missing": one.missing,
                "left_out": json.sizes(one.extra),
            }
            for one in result.inputs
        ],
        others=[
            {"way": way, "reason": reason, "tensors": count}
            for way, reasons in result.ways.items()
            for reason, count in reasons.items()
        ],
        heads=[{"name": name, "how": how} for name, how in result.heads.items()],
        interference={
            "before": _clash(found.before),
            "after": _clash(found.after),
            "pairs": [
                {
                    "a": names[one.a],
                    "b": names[one.b],
                    "cosine": one.cosine,
                    "overlap": one.overlap,
                    "sign_conflicts": one.sign_conflicts,
                }
                for one in found.pairs
            ],
            "layers": [
                {"name": one.name, "before": _clash(one.before), "after": _clash(one.after)}
                for one in found.layers
            ],
        },
        **chosen,
    )


def _clash(found: Clash | None) -> dict[str, float] | None:
    if found is None:
        return None
    return {
        "cosine": found.cosine,
        "overlap": found.overlap,
        "sign_conflicts": found.sign_conflicts,
        "inflation": found.inflation,
        "inflation_of_largest": found.inflation_of_largest,
    }


def view(result: CombineResult) -> RenderableType:
    """Return the result for people: the inputs, where they clash, and a summary."""
    parts: list[RenderableType] = [_inputs(result), ""]
    if result.interference.before is not None:
        parts += [_layers(result), ""]
    return Group(*parts, _summary(result))


def _inputs(result: CombineResult) -> RenderableType:
    names = distinct_paths([one.path for one in result.inputs])
    table = plain_table()
    table.add_column("input", overflow="fold")
    for title in input_columns(result):
        table.add_column(title, justify="right", no_wrap=True)
    for name, cells in zip(names, input_cells(result), strict=True):
        table.add_row(Text(name), *map(Text, cells))
    return table


def input_columns(result: CombineResult) -> list[str]:
    """Return the titles of what is said of each input."""
    plain = ["weight", "changed", "weight drift"]
    return plain if result.weights is None else [*weights_columns(), *plain]


def input_cells(result: CombineResult) -> list[list[str]]:
    """Return what is said of each input."""
    plain = [
        [number(one.weight), f"{one.changed} tensors", f"{one.relative_change:.2%}"]
        for one in result.inputs
    ]
    if result.weights is None:
        return plain
    more = weights_cells(result.weights)
    return [[*two, *one] for one, two in zip(plain, more, strict=True)]


def clashing(layers: Sequence[MergedLayer]) -> list[MergedLayer]:
    """Sort layers by how much their inputs share, the most first; that is where they clash."""
    return sorted(layers, key=lambda one: -one.before.overlap if one.before else 0.0)


def _layers(result: CombineResult) -> RenderableType:
    found = result.interference
    rows = clashing(found.layers)[:MOST_ROWS]
    table = NameTable(Names(one.name for one in rows), title="before → after")
    for title in _COLUMNS:
        table.column(title, right=True)
    table.row("all layers", _cells(found.before, found.after))
    for one in rows:
        table.row(one.name, _cells(one.before, one.after))
    more = len(found.layers) - len(rows)
    rest = [Text(f"and {more} more layers, whose inputs share less", "dim")] if more > 0 else []
    return Group(table, *rest)


def _cells(before: Clash | None, after: Clash | None) -> list[str]:
    assert before is not None
    assert after is not None
    return [
        f"{one:.2f} → {other:.2f}" for one, other in zip(_four(before), _four(after), strict=True)
    ]


def _four(one: Clash) -> tuple[float, float, float, float]:
    # Adding 0 takes the sign from a zero.
    return tuple(
        round(value, 2) + 0.0
        for value in (one.cosine, one.overlap, one.sign_conflicts, one.inflation)
    )  # type: ignore[return-value]


def _summary(result: CombineResult) -> Text:
    lines = Text(
        f"{result.method}: {counted(len(result.layers), 'matrices')} of {len(result.inputs)} inputs"
    )
    for way, reasons in result.ways.items():
        named = shortlist(
            (
                f"{count} {safe(reason)}" if reason else f"{count}"
                for reason, count in sorted(reasons.items(), key=lambda item: -item[1])
            ),
            3,
        )
        lines.append(f"\n{way}: {sum(reasons.values())} other tensors ({named})")
    for name, how in result.heads.items():
        lines.append(f"\nhead {safe(name)}: {_HOW.get(how, how)}")
    for line in () if result.weights is None else weights_sentences(result.weights):
        lines.append(f"\n{line}")
    lines.append(f"\n{result.unchanged} tensors bit-identical to the base.\n")
    if result.clipped:
        count = sum(result.clipped.values())
        where = shortlist(map(safe, result.clipped), 4)
        lines.append(
            f"clipped: {counted(count, 'values')} that overflowed their dtype ({where})\n", "yellow"
        )
    if result.verified:
        lines.append(
            "verified: what was read back equals what was computed, bit for bit\n", "green"
        )
    return lines.append("merged: ").append(safe(str(result.output)), "bold")


_HOW = {
    "concat": "rows of all inputs, one below the other",
    "first": "of the first input that has one",
    "mean": "the mean, or the only one",
}


# The page.


def page(result: CombineResult) -> str:
    """Return the result as one page for any browser.

    Raises
    ------
    MissingDependencyError
        If jinja2 is not installed.
    """
    from svftool.version import __version__

    markup = require_jinja().Environment(autoescape=True)
    style = resources.files("svftool.report.inspect").joinpath("assets/page.css")
    template = resources.files("svftool.report").joinpath("assets/merge.html")
    names = distinct_paths([one.path for one in result.inputs])
    found = result.interference
    rendered: str = markup.from_string(template.read_text("utf-8")).render(
        style=style.read_text("utf-8"),
        version=__version__,
        title=safe(result.output.name),
        lead=safe(
            f"{result.method} · {counted(len(names), 'inputs')} · "
            f"{counted(len(result.layers), 'matrices')}"
        ),
        titles=input_columns(result),
        inputs=[
            {"name": safe(name), "cells": cells}
            for name, cells in zip(names, input_cells(result), strict=True)
        ],
        brings=None if result.weights is None else BRINGS,
        drawings=[(label, _matrix(result, names, label)) for label in ("overlap", "cosine")]
        if found.pairs
        else [],
        columns=_COLUMNS,
        meanings=_MEANINGS,
        overall=_cells(found.before, found.after) if found.before else None,
        layers=[
            {"name": safe(one.name), "cells": _cells(one.before, one.after)}
            for one in clashing(found.layers)
        ],
        summary=_summary(result).plain.splitlines(),
    )
    return rendered


_SIDE, _TOP = 34.0, 14.0


def _matrix(result: CombineResult, names: Sequence[str], label: str) -> str:
    """Draw a value of every two inputs, one row and one column an input."""
    left = max(map(room, names)) + 14.0
    parts = []
    for index, name in enumerate(names):
        y = _TOP + index * _SIDE
        parts.append(text(left - 8, y + _SIDE / 2 + 4, name, anchor="end"))
    for one in result.interference.pairs:
        value = one.overlap if label == "overlap" else one.cosine
        for row, column in ((one.a, one.b), (one.b, one.a)):
            title = f"{names[row]} and {names[column]}: {label} {value:.3f}"
            place = left + column * _SIDE, _TOP + row * _SIDE
            kind = "cell" if value >= 0 else "cell minus"
            parts.append(cell(*place, _SIDE, _SIDE - 1, min(abs(value), 1.0), title, kind))
    side = len(names) * _SIDE
    return svg(
        _TOP + side + 8, parts, f"{label} of every two inputs", width=left + side + 8, kind=""
    )
