"""Results of ``svftool extract`` as a document and as a table."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from svftool.errors import shortlist
from svftool.report import json
from svftool.report.names import Names
from svftool.report.table import NameTable
from svftool.report.text import safe
from svftool.stages.extract import ExtractResult

MOST_ROWS = 12


def document(result: ExtractResult) -> dict[str, Any]:
    """Return the result for scripts."""
    return json.document(
        "extract",
        output=str(result.output),
        layers=[asdict(one) for one in result.layers],
        error=result.error,
        whole=result.whole,
        missing=result.missing,
        dropped=[asdict(one) for one in result.dropped],
    )


def view(result: ExtractResult) -> RenderableType:
    """Return the result for people: the layers that are approximated worst, and the whole."""
    rows = sorted(result.layers, key=lambda one: -one.error)
    shown = rows[:MOST_ROWS]
    table = NameTable(Names(one.name for one in shown))
    table.column("weight drift", right=True)
    table.column("not reached", right=True)
    for one in shown:
        table.row(one.name, (f"{one.change:.2%}", f"{one.error:.1%}"))
    parts: list[RenderableType] = [table]
    if len(rows) > MOST_ROWS:
        parts.append(Text(f"and {len(rows) - MOST_ROWS} more layers, approximated better", "dim"))
    text = Text(
        f"{result.error:.1%} of the change (as a norm) cannot be made by singular values.\n"
    )
    for title, listed in (("stored whole", result.whole), ("not in the fine-tune", result.missing)):
        if listed:
            text.append(f"{title}: {shortlist(map(safe, listed), 4)}\n")
    return Group(*parts, "", text.append("tuned: ").append(safe(str(result.output)), "bold"))
