"""Results of ``svftool merge`` as a document and as a table."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from svftool.errors import counted, shortlist
from svftool.report import json
from svftool.report.names import Names
from svftool.report.table import NameTable
from svftool.report.text import safe
from svftool.stages.merge import MergeResult

MOST_ROWS = 12
HEAVY_LOSS = 0.1
"""Share of a delta lost to rounding from which the row is shown in yellow."""


def document(result: MergeResult) -> dict[str, Any]:
    """Return the result for scripts."""
    layers = [
        {
            "name": one.name,
            "changed": one.changed,
            "relative_change": one.relative_change,
            "rounding_loss": one.rounding_loss,
        }
        for one in result.layers
    ]
    return json.document(
        "merge",
        output=str(result.output),
        kind="tuned file" if result.mixed else "checkpoint",
        layers=layers,
        unchanged=result.unchanged,
        added=result.added,
        replaced=result.replaced,
        verified=result.verified,
        rebuilt_error=result.rebuilt_error,
        clipped=[{"name": name, "values": count} for name, count in result.clipped.items()],
        dropped=json.sizes(result.dropped),
    )


def view(result: MergeResult) -> RenderableType:
    """Return the result for people: the layers that changed most, and a summary."""
    changed = sorted(
        (one for one in result.layers if one.changed), key=lambda one: -one.relative_change
    )
    parts: list[RenderableType] = []
    if changed:
        table = NameTable(Names(one.name for one in changed[:MOST_ROWS]))
        table.column("weight drift", right=True)
        table.column("lost to rounding", right=True)
        for one in changed[:MOST_ROWS]:
            style = "yellow" if one.rounding_loss > HEAVY_LOSS else ""
            loss = Text(f"{one.rounding_loss:.1e}", style)
            table.row(one.name, (f"{one.relative_change:.2%}", loss))
        parts.append(table)
    if len(changed) > MOST_ROWS:
        parts.append(Text(f"and {len(changed) - MOST_ROWS} more layers, changed less", "dim"))
    return Group(*parts, *([""] if parts else []), _summary(result, len(changed)))


def _summary(result: MergeResult, changed: int) -> Text:
    text = Text(
        f"{counted(changed, 'layers')} changed, {counted(result.unchanged, 'tensors')} "
        "bit-identical to the base.\n"
    )
    for title, names in (("added", result.added), ("replaced", result.replaced)):
        if names:
            text.append(f"{title}: {shortlist(map(safe, names), 4)}\n")
    if result.rebuilt_error is not None:
        text.append(
            f"rebuilt without the base: relative error up to {result.rebuilt_error:.1e} a layer\n",
            "yellow",
        )
    if result.clipped:
        clipped = sum(result.clipped.values())
        where = shortlist(map(safe, result.clipped), 4)
        text.append(f"clipped: {clipped} values that overflowed their dtype ({where})\n", "yellow")
    if result.verified:
        text.append("verified: what was read back equals what was computed, bit for bit\n", "green")
    return text.append("tuned: " if result.mixed else "merged: ").append(
        safe(str(result.output)), "bold"
    )
