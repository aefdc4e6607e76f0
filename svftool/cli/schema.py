"""``svftool schema``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from svftool.cli.completion import documents
from svftool.report.schemas import described, schema

EXAMPLE = "Example: svftool schema inspect > inspect.schema.json"


def command(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="COMMAND",
            help="Whose document; without it, those that have one are listed.",
            autocompletion=documents,
        ),
    ] = None,
) -> None:
    """Print the JSON Schema of what a command prints with --json."""
    if name is None:
        typer.echo("\n".join(described()))
    else:
        typer.echo(json.dumps(schema(name), indent=2))
