"""Results of ``svftool predict`` as a document and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from svftool.report import json
from svftool.report.evaluate import settings_table
from svftool.report.text import plain_table, safe
from svftool.stages.evaluate_result import settings_fields
from svftool.stages.predict import SHOWN, PredictResult


def document(result: PredictResult) -> dict[str, Any]:
    """Return the result for scripts; rows that are in a file are not repeated."""
    return json.document(
        "predict",
        task=result.task,
        checkpoint=str(result.checkpoint),
        tuned=None if result.tuned is None else str(result.tuned),
        classes=result.classes,
        examples=result.examples,
        settings=settings_fields(result.settings),
        output=None if result.output is None else str(result.output),
        predictions=list(result.rows) if _complete(result) else None,
    )


def view(result: PredictResult) -> RenderableType:
    """Return the result for people: the first rows, and what they depend on."""
    parts: list[RenderableType] = [_table(result)]
    if result.examples > SHOWN:
        more = f"and {result.examples - SHOWN} more"
        parts.append(
            Text(f"{more}; -o FILE.csv keeps all" if result.output is None else more, "dim")
        )
    parts += ["", settings_table(result.settings)]
    if result.output is not None:
        parts.append(Text("\npredictions: ").append(safe(str(result.output)), "bold"))
    return Group(*parts)


def _complete(result: PredictResult) -> bool:
    return result.output is None or result.task == "segmentation"


_PICTURES = ("classification", "segmentation")


def _table(result: PredictResult) -> Table:
    table = plain_table()
    language = result.task == "language"
    table.add_column("picture" if result.task in _PICTURES else "text", overflow="fold")
    if language:
        table.add_column("tokens", justify="right")
        table.add_column("perplexity", justify="right")
        table.add_column("next", overflow="fold")
    else:
        table.add_column("class", overflow="fold")
        table.add_column("share %" if result.task == "segmentation" else "sure %", justify="right")
        table.add_column("then", overflow="fold")
    for row in result.rows[:SHOWN]:
        table.add_row(*(_text_cells(row) if language else _class_cells(row)))
    return table


def _class_cells(row: Mapping[str, Any]) -> list[Text]:
    first, *others = row["classes"]
    then = ", ".join(f"{one['name']} {_percent(one)}" for one in others)
    return [
        Text(safe(_beginning(row["text"]) if "text" in row else row["file"])),
        Text(safe(first["name"]), "bold"),
        Text(_percent(first)),
        Text(safe(then)),
    ]


def _text_cells(row: Mapping[str, Any]) -> list[Text]:
    perplexity = row["perplexity"]
    then = ", ".join(f"{one['token']!r} {_percent(one)}" for one in row["next"])
    return [
        Text(safe(_beginning(row["text"]))),
        Text(str(row["tokens"])),
        Text("" if perplexity is None else f"{perplexity:.4g}"),
        Text(safe(then)),
    ]


def _beginning(text: str) -> str:
    return " ".join(text.split())[:40]


def _percent(one: Mapping[str, Any]) -> str:
    return f"{100 * one.get('probability', one.get('share', 0.0)):.1f}"
