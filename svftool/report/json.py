"""One JSON document a command, without NaN or Infinity."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from svftool.report.text import is_unseen

SCHEMA_VERSION = 1


def document(command: str, **fields: Any) -> dict[str, Any]:
    """Head a result with the schema's version and the command's name."""
    return {"schema_version": SCHEMA_VERSION, "command": command, **fields}


def sizes(found: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return what was left out, as a list of names with their bytes.

    Examples
    --------
    >>> sizes({"optimizer.bin": 12})
    [{'name': 'optimizer.bin', 'bytes': 12}]
    """
    return [{"name": name, "bytes": size} for name, size in found.items()]


def to_json(value: Any) -> str:
    """Serialise a document; floats that are not finite become null.

    Characters that steer a terminal or the order of the text are written as escapes.

    Examples
    --------
    >>> print(to_json({"a": float("nan"), "b": (1, 2)}))
    {
      "a": null,
      "b": [
        1,
        2
      ]
    }
    """
    text = json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False)
    return "\n".join(map(_escaped, text.split("\n")))


def _escaped(line: str) -> str:
    if line.isprintable():
        return line
    return "".join(json.dumps(one)[1:-1] if is_unseen(one) else one for one in line)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, PurePath) else value
