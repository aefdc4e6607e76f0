"""Results of ``svftool decompose`` as a document and as tables."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from svftool.errors import counted
from svftool.factors import LayerRecord
from svftool.report import json
from svftool.report.names import Names
from svftool.report.table import Cell, NameTable
from svftool.report.text import by_reason, safe, seconds, shape, size
from svftool.stages.decompose import DecomposeResult, DecompositionPlan
from svftool.stages.factorise import LayerPlan

MOST_ROWS = 12


def document(result: DecomposeResult) -> dict[str, Any]:
    """Return the result for scripts."""
    layers = [
        {
            "name": one.name,
            "shape": one.shape,
            "view": one.view,
            "matrix": one.matrix,
            "rank": one.rank,
            "dtype": one.dtype,
            "method": one.method,
            "reconstruction_error": one.reconstruction_error,
            "orthogonality_error": one.orthogonality_error,
            "energy": one.energy,
            "seconds": result.layer_seconds.get(one.name),
        }
        for one in result.config.layers.values()
    ]
    return json.document(
        "decompose",
        output=str(result.output),
        rank=result.config.rank,
        layers=layers,
        skipped=_skipped(result.config.left_whole),
        seconds=result.seconds,
        peak_memory_bytes=result.peak_memory_bytes,
        dropped=json.sizes(result.dropped),
    )


def view(result: DecomposeResult) -> RenderableType:
    """Return the result for people: the least accurate layers, what was left whole, the cost."""
    records = sorted(result.config.layers.values(), key=lambda one: -one.reconstruction_error)
    shown = records[:MOST_ROWS]
    table = NameTable(Names(one.name for one in shown))
    for title in ("matrix", "rank", "error", "energy"):
        table.column(title, right=True)
    table.column("method", style="dim")
    for one in shown:
        table.row(one.name, _row(one))
    parts: list[RenderableType] = [table]
    if len(records) > MOST_ROWS:
        parts.append(
            Text(f"and {len(records) - MOST_ROWS} more layers, all with smaller errors", "dim")
        )
    if result.config.left_whole:
        parts += ["", by_reason(result.config.left_whole)]
    return Group(*parts, "", _summary(result))


def _row(one: LayerRecord) -> tuple[Cell, ...]:
    return (
        shape(one.matrix),
        str(one.rank),
        f"{one.reconstruction_error:.1e}",
        f"{one.energy:.4f}" if one.energy < 1.0 else "1",
        Text(one.method),
    )


def _summary(result: DecomposeResult) -> Text:
    methods = Counter(one.method for one in result.config.layers.values())
    used = ", ".join(f"{count} by {method}" for method, count in methods.most_common())
    text = Text(f"{counted(len(result.config.layers), 'layers')} decomposed")
    text.append(f" ({used})" if used else "")
    text.append(f" in {seconds(result.seconds)}, peak memory {size(result.peak_memory_bytes)}.\n")
    text.append("factors: ").append(safe(str(result.output)), "bold")
    return text


def plan_document(plan: DecompositionPlan) -> dict[str, Any]:
    """Return a plan for scripts; ranks that the spectrum decides are null."""
    layers = [
        {
            "name": one.info.name,
            "shape": one.info.shape,
            "view": one.choice.view,
            "matrix": one.matrix,
            "rank": one.rank,
            "bytes": one.factor_bytes,
        }
        for one in plan.layers
    ]
    return json.document(
        "decompose",
        dry_run=True,
        layers=layers,
        skipped=_skipped(plan.left_whole),
        output_bytes=plan.output_bytes,
        peak_memory_bytes=plan.peak_memory_bytes,
    )


def plan_view(plan: DecompositionPlan) -> RenderableType:
    """Return a plan for people: the largest layers, what stays whole, and the sizes in all."""
    layers = sorted(plan.layers, key=lambda one: -one.factor_bytes)
    shown = layers[:MOST_ROWS]
    table = NameTable(Names(one.info.name for one in shown))
    for title in ("matrix", "rank", "factors"):
        table.column(title, right=True)
    for one in shown:
        table.row(one.info.name, _plan_row(one))
    parts: list[RenderableType] = [table]
    if len(layers) > MOST_ROWS:
        parts.append(Text(f"and {len(layers) - MOST_ROWS} more layers, all smaller", "dim"))
    if plan.left_whole:
        parts += ["", by_reason(plan.left_whole)]
    total = Text(f"{counted(len(layers), 'layers')}, {size(plan.output_bytes)} to write, ")
    total.append(f"peak memory about {size(plan.peak_memory_bytes)}. Nothing was written.")
    return Group(*parts, "", total)


def _plan_row(one: LayerPlan) -> tuple[Cell, ...]:
    rank = "by spectrum" if one.rank is None else str(one.rank)
    return shape(one.matrix), rank, size(one.factor_bytes)


def _skipped(left_whole: Any) -> list[dict[str, str]]:
    return [{"name": name, "reason": reason} for name, reason in left_whole.items()]
