"""``svftool schema``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from svftool.errors import UsageError
from svftool.report.json import schema_names, schema_text

EXAMPLE = "Example: svftool schema inspect > inspect.schema.json"


def command(
    name: Annotated[str, typer.Argument(metavar="COMMAND", help="Whose document is described.")],
) -> None:
    """Print the JSON Schema of a command's --json document."""
    if name not in schema_names():
        raise UsageError(f"{name}: no such document, expected one of {', '.join(schema_names())}.")
    typer.echo(json.dumps(json.loads(schema_text(name)), indent=2))
