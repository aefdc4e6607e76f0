"""What ``--json`` prints, held against the schemas that ``svftool schema`` prints."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

from svftool.cli.common import Display
from svftool.report.json import to_json
from svftool.report.schemas import schema


@functools.cache
def validator(command: str) -> Any:
    """Return what validates the document of a command."""
    from jsonschema import Draft202012Validator

    return Draft202012Validator(schema(command))


def faults(document: dict[str, Any]) -> list[str]:
    """List where a document, once it is JSON, is not what its schema says."""
    plain = json.loads(to_json(document))
    return [
        f"{plain['command']} {one.json_path}: {one.message[:300]}"
        for one in validator(plain["command"]).iter_errors(plain)
    ]


def checked(emit: Callable[..., None]) -> Callable[..., None]:
    """Wrap `Display.emit` so that a document that does not fit its schema is an error."""

    def emit_checked(self: Display, document: dict[str, Any], view: Any) -> None:
        found = faults(document)
        assert not found, found[:5]
        emit(self, document, view)

    return emit_checked
