"""Results of ``svftool convert`` as a document and as a table."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from svftool.errors import counted, shortlist
from svftool.report import json
from svftool.report.names import Names
from svftool.report.table import NameTable
from svftool.report.text import safe, share
from svftool.stages.convert import ConvertResult

MOST_ROWS = 12


def document(result: ConvertResult) -> dict[str, Any]:
    """Return the result for scripts."""
    return json.document(
        "convert",
        output=str(result.output),
        source=result.source,
        layout=result.layout,
        dtype=result.dtype,
        dry_run=result.dry_run,
        layers=[asdict(one) for one in result.layers],
        error=result.error,
        whole=result.whole,
        dropped=[
            {"name": one.name, "reason": one.reason, "bytes": one.bytes} for one in result.dropped
        ],
        bytes=result.bytes,
    )


def view(result: ConvertResult) -> RenderableType:
    """Return the result for people: the layers that lose most, and the whole."""
    rows = sorted(result.layers, key=lambda one: -one.error)
    shown = rows[:MOST_ROWS]
    table = NameTable(Names(one.name for one in shown))
    for title in ("rank", "error"):
        table.column(title, right=True)
    for one in shown:
        table.row(one.name, (str(one.rank), share(one.error)))
    parts: list[RenderableType] = [table]
    if len(rows) > MOST_ROWS:
        parts.append(Text(f"and {len(rows) - MOST_ROWS} more layers, that lose less", "dim"))
    return Group(*parts, "", _totals(result))


def _totals(result: ConvertResult) -> Text:
    ranks = sorted({one.rank for one in result.layers})
    span = (
        f", rank {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f", rank {ranks[0]}" * len(ranks)
    )
    what = f"{result.source} to {result.layout}: {counted(len(result.layers), 'layers')}{span}"
    text = Text()
    if result.dry_run:
        text.append(f"{what}, about {result.bytes:,} bytes in {result.dtype}; nothing written\n")
    else:
        text.append(f"{share(result.error)} of the change (as a norm) is lost: ", "bold")
        text.append(f"{what}, {result.dtype}, {result.bytes:,} bytes\n")
    for title, listed in (
        ("copied or stored whole", result.whole),
        ("left out", [one.name for one in result.dropped]),
    ):
        if listed:
            text.append(f"{title}: {shortlist(map(safe, listed), 4)}\n")
    if not result.dry_run:
        text.append("output: ").append(safe(str(result.output)), "bold")
    return text
