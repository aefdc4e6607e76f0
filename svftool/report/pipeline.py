"""Results of a command on a pipeline: those of its components, each under its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from rich.console import Group, RenderableType
from rich.text import Text

from svftool.errors import shortlist
from svftool.report import json
from svftool.report.text import safe
from svftool.stages.pipeline import PipelineResult

_T = TypeVar("_T")


def document(
    of: str, result: PipelineResult[_T], one: Callable[[_T], dict[str, Any]]
) -> dict[str, Any]:
    """Return the results for scripts.

    Parameters
    ----------
    of : str
        The command.
    result : PipelineResult
    one : callable
        Makes the command's document of a component's result.
    """
    return json.document(
        "pipeline",
        of=of,
        output=None if result.output is None else str(result.output),
        components={name: one(found) for name, found in result.components.items()},
        carried=result.carried,
        left=json.sizes(result.left),
        unchanged=result.unchanged,
        missing=result.missing,
    )


def view(result: PipelineResult[_T], one: Callable[[_T], RenderableType]) -> RenderableType:
    """Return the results for people, one component after the other."""
    parts: list[RenderableType] = []
    for name, found in result.components.items():
        parts += [Text(safe(name), "bold reverse"), one(found), ""]
    text = Text()
    for title, listed in (
        ("unchanged", result.unchanged),
        ("not in the fine-tune", result.missing),
        ("copied along", result.carried),
    ):
        if listed:
            text.append(f"{title}: {shortlist(map(safe, listed), 6)}\n")
    if result.output is not None:
        text.append("pipeline: ").append(safe(str(result.output)), "bold")
    return Group(*parts, text)
