"""JSON Schemas (draft 2020-12) of what commands print with ``--json``, one file a command."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from svftool.errors import UsageError, no_such

_ADDRESS = "urn:svftool:schema:"
_SUFFIX = ".json"


def described() -> list[str]:
    """List the commands whose document has a schema.

    Examples
    --------
    >>> described()[:3]
    ['convert', 'decompose', 'demo']
    """
    names = (one.name for one in resources.files(__name__).iterdir())
    return sorted(name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX))


def schema(command: str) -> dict[str, Any]:
    """Return the schema of a command's document; those that it refers to are within.

    Raises
    ------
    UsageError
        If there is none.

    Examples
    --------
    >>> schema("merge")["title"]
    'svftool merge --json'
    >>> sorted(schema("demo")["$defs"])
    ['decompose', 'finetune', 'inspect', 'merge', 'pretrain']
    """
    names = described()
    if command not in names:
        raise UsageError(no_such("command", command, names))
    text = (resources.files(__name__) / f"{command}{_SUFFIX}").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    others = [one for one in names if one != command and f'"{_ADDRESS}{one}"' in text]
    if others:
        found.setdefault("$defs", {}).update({one: schema(one) for one in others})
    return found
