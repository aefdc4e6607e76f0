"""Results of exact deltas, made by ``extract`` and applied by ``merge``: documents and tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from svftool.errors import shortlist
from svftool.report import json
from svftool.report.names import Names
from svftool.report.table import NameTable
from svftool.report.text import safe, size
from svftool.stages.extract_exact import ExactResult
from svftool.stages.restore import RestoreResult

MOST_ROWS = 12
WAYS = ("same", "xor", "difference", "whole")


def extract_document(result: ExactResult) -> dict[str, Any]:
    """Return the result of ``extract --as exact`` for scripts."""
    return json.document(
        "extract",
        form="exact",
        output=str(result.output),
        dry_run=result.dry_run,
        layers=[asdict(one) for one in result.tensors],
        error=0.0,
        whole=[one.name for one in result.tensors if one.way == "whole"],
        missing=[],
        dropped=[asdict(one) for one in result.dropped],
        removed=result.removed,
        ways=_counted(result.ways),
        bytes=result.bytes,
        tuned_bytes=result.tuned_bytes,
        ratio=result.bytes / result.tuned_bytes if result.tuned_bytes else None,
        base_fingerprint=result.base_fingerprint,
        tuned_fingerprint=result.tuned_fingerprint,
    )


def _counted(ways: Mapping[str, int]) -> dict[str, int]:
    return {way: ways.get(way, 0) for way in WAYS}


def extract_view(result: ExactResult) -> RenderableType:
    """Return the result of ``extract --as exact`` for people: the largest tensors, the whole."""
    rows = sorted((one for one in result.tensors if one.way != "same"), key=lambda one: -one.stored)
    shown = rows[:MOST_ROWS]
    parts: list[RenderableType] = []
    if shown:
        table = NameTable(Names(one.name for one in shown), title="tensor")
        table.column("stored as")
        for title in ("bytes", "in the delta"):
            table.column(title, right=True)
        table.column("ratio", right=True)
        for one in shown:
            share = f"{one.stored / one.bytes:.1%}" if one.bytes else "-"
            table.row(one.name, (one.way, size(one.bytes), size(one.stored), share))
        parts += [table]
    if len(rows) > MOST_ROWS:
        parts.append(Text(f"and {len(rows) - MOST_ROWS} more tensors, smaller", "dim"))
    return Group(*parts, *([""] if parts else []), _extract_totals(result))


def _extract_totals(result: ExactResult) -> Text:
    share = f"{result.bytes / result.tuned_bytes:.1%}" if result.tuned_bytes else "-"
    text = Text()
    text.append(f"{share} of the fine-tune's {result.tuned_bytes:,} bytes: ", "bold")
    text.append(f"{result.bytes:,} bytes{'; nothing written' if result.dry_run else ''}\n")
    text.append(f"{_ways(_counted(result.ways))}\n")
    dropped = [f"{safe(one.name)} ({one.bytes:,} bytes)" for one in result.dropped]
    for title, listed in (
        ("not in the fine-tune", list(map(safe, result.removed))),
        ("left out, for it is no tensor", dropped),
    ):
        if listed:
            text.append(f"{title}: {shortlist(listed, 4)}\n")
    text.append(f"base {result.base_fingerprint[:12]}, fine-tune {result.tuned_fingerprint[:12]}\n")
    if not result.dry_run:
        text.append("exact delta: ").append(safe(str(result.output)), "bold")
    return text


def _ways(ways: Mapping[str, int]) -> str:
    said = {"same": "as in the base", "xor": "XOR", "difference": "difference", "whole": "whole"}
    counted = ", ".join(f"{count} {said[way]}" for way, count in ways.items() if count)
    return f"tensors: {counted or 'none'}"


def merge_document(result: RestoreResult) -> dict[str, Any]:
    """Return the result of ``merge`` with an exact delta for scripts."""
    ways = {way: len(names) for way, names in result.ways.items()}
    same = result.ways.get("same", ())
    return json.document(
        "merge",
        output=str(result.output),
        kind="checkpoint",
        layers=[],
        unchanged=len(same),
        added=result.added,
        replaced=[name for name in result.ways.get("whole", ()) if name not in result.added],
        verified=result.verified,
        rebuilt_error=None,
        clipped=[],
        dropped=json.sizes(result.dropped),
        restored={
            "fingerprint": result.fingerprint,
            "bytes": result.bytes,
            "ways": _counted(ways),
            "removed": result.removed,
            "dry_run": result.dry_run,
        },
    )


def merge_view(result: RestoreResult) -> RenderableType:
    """Return the result of ``merge`` with an exact delta for people."""
    ways = _counted({way: len(names) for way, names in result.ways.items()})
    text = Text(f"{sum(ways.values())} tensors restored bit for bit, {result.bytes:,} bytes.\n")
    text.append(f"{_ways(ways)}\n")
    for title, names in (("added", result.added), ("removed", result.removed)):
        if names:
            text.append(f"{title}: {shortlist(map(safe, names), 4)}\n")
    text.append(f"SHA-256 of every tensor as in the fine-tune {result.fingerprint[:12]}\n", "green")
    if result.verified:
        text.append("verified: what was read back is the fine-tune, bit for bit\n", "green")
    if result.dry_run:
        return text.append("nothing written", "bold")
    return text.append("merged: ").append(safe(str(result.output)), "bold")
