"""Results of ``svftool extract`` as a document and as a table."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from svftool.errors import counted, shortlist
from svftool.report import json
from svftool.report.names import Names
from svftool.report.table import NameTable
from svftool.report.text import safe, share
from svftool.stages.extract import ExtractResult
from svftool.stages.extract_lora import LoraResult

MOST_ROWS = 12


def document(result: ExtractResult) -> dict[str, Any]:
    """Return the result for scripts."""
    return json.document(
        "extract",
        form=result.form,
        numbers=result.numbers,
        candidates=[asdict(one) for one in result.candidates],
        output=str(result.output),
        layers=[asdict(one) for one in result.layers],
        error=result.error,
        whole=result.whole,
        missing=result.missing,
        dropped=[asdict(one) for one in result.dropped],
        proposal=None if result.proposal is None else asdict(result.proposal),
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
    parts += _tried(result)
    made = (
        "singular values" if result.form == "svf" else f"{result.form} ({result.numbers:,} numbers)"
    )
    text = Text(
        f"{result.error:.1%} of the change (as a norm) cannot be made by {made}.\n",
        "bold yellow" if result.poor else "",
    )
    if result.poor:
        text.append(_instead(result), "yellow")
    for title, listed in (("stored whole", result.whole), ("not in the fine-tune", result.missing)):
        if listed:
            text.append(f"{title}: {shortlist(map(safe, listed), 4)}\n")
    return Group(*parts, "", text.append("tuned: ").append(safe(str(result.output)), "bold"))


def _tried(result: ExtractResult) -> list[RenderableType]:
    """Return the forms that were tried, the nearest first."""
    if not result.candidates:
        return []
    table = Table(box=None, pad_edge=False)
    for title in ("form", "numbers", "not reached"):
        table.add_column(title, justify="left" if title == "form" else "right")
    for one in sorted(result.candidates, key=lambda one: one.error):
        style = "bold" if one.chosen else ""
        table.add_row(one.form, f"{one.numbers:,}", f"{one.error:.1%}", style=style)
    return ["", table, ""]


def _instead(result: ExtractResult) -> str:
    """Say what holds a change that singular values do not."""
    one = result.proposal
    if one is None:
        return "No low rank holds it either: the change is as wide as the layers.\n"
    return f"A LoRA of rank {one.rank} would lose {share(one.error)}: --as lora --rank {one.rank}\n"


def lora_document(result: LoraResult) -> dict[str, Any]:
    """Return the result of ``--as lora`` for scripts."""
    return json.document(
        "extract",
        form="lora",
        output=str(result.output),
        layout=result.layout,
        dtype=result.dtype,
        dry_run=result.dry_run,
        layers=[asdict(one) for one in result.layers],
        error=result.error,
        whole=result.whole,
        missing=result.missing,
        dropped=[asdict(one) for one in result.dropped],
        bytes=result.bytes,
        layer_error=result.layer_error,
    )


def lora_view(result: LoraResult) -> RenderableType:
    """Return the result of ``--as lora`` for people: the layers of the largest share, the whole."""
    rows = sorted(result.layers, key=lambda one: -one.share)
    shown = rows[:MOST_ROWS]
    table = NameTable(Names(one.name for one in shown))
    for title in ("rank", "error", "share"):
        table.column(title, right=True)
    for one in shown:
        table.row(one.name, (str(one.rank), share(one.error), f"{one.share:.1%}"))
    parts: list[RenderableType] = [table]
    if len(rows) > MOST_ROWS:
        parts.append(Text(f"and {len(rows) - MOST_ROWS} more layers, of smaller shares", "dim"))
    return Group(*parts, "", _lora_totals(result))


def _lora_totals(result: LoraResult) -> Text:
    ranks = sorted({one.rank for one in result.layers})
    span = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else str(*ranks)
    text = Text()
    if result.dry_run:
        most = "at most " if ranks else ""
        text.append(f"{counted(len(result.layers), 'layers')}, {most}rank {span}, ")
        text.append(f"about {result.bytes:,} bytes in {result.dtype}; nothing written\n")
    else:
        text.append(f"{share(result.error)} of the change (as a norm) is lost", "bold")
        if result.layers and share(result.layer_error) != share(result.error):
            text.append(f", {share(result.layer_error)} of that of the layers")
        text.append(f": {counted(len(result.layers), 'layers')}, rank {span}, {result.dtype}, ")
        text.append(f"{result.bytes:,} bytes\n")
    measured = [one for one in result.dropped if one.share is not None]
    lost = sum(one.share or 0.0 for one in measured)
    for title, listed in (
        ("stored whole", result.whole),
        ("not in the fine-tune", result.missing),
        (f"left out ({lost:.2%} of the change)", [one.name for one in measured]),
        (
            "left out, their change not measured",
            [one.name for one in result.dropped if one.share is None],
        ),
    ):
        if listed:
            text.append(f"{title}: {shortlist(map(safe, listed), 4)}\n")
    if not result.dry_run:
        text.append("adapter: ").append(safe(str(result.output)), "bold")
    return text
