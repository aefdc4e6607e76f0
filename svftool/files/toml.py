"""Plain values as TOML; the standard library reads it and does not write it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_SHORT = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r"}
_DELETE = 0x7F


def to_toml(values: Mapping[str, Any]) -> str:
    """Return values as a TOML document that `tomllib` reads back to the same ones.

    Parameters
    ----------
    values : mapping of str to object
        Texts, numbers, yes or no, lists of these, and tables, which come last.

    Raises
    ------
    UnicodeEncodeError
        For a text with half a surrogate pair, which no TOML holds.
    TypeError
        For a value of another kind.

    Examples
    --------
    >>> print(to_toml({"lr": 0.01, "regime": ["head", "svf"], "data": {"a b": True}}))
    lr = 0.01
    regime = ["head", "svf"]
    <BLANKLINE>
    [data]
    "a b" = true
    <BLANKLINE>
    """
    return "\n".join(_lines(values, ())) + "\n"


def _lines(values: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    lines = [] if not path else ["", f"[{'.'.join(map(_key, path))}]"]
    tables = {name: value for name, value in values.items() if isinstance(value, Mapping)}
    lines += [f"{_key(name)} = {_value(one)}" for name, one in values.items() if name not in tables]
    for name, table in tables.items():
        lines += _lines(table, (*path, name))
    return lines


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else _text(name)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, float):
        return repr(float(value))
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, Sequence):
        return f"[{', '.join(map(_value, value))}]"
    raise TypeError(f"{type(value).__name__}, expected a text, a number, yes or no, or a list")


def _text(text: str) -> str:
    text.encode("utf-8")  # raises for half a surrogate pair
    return f'"{"".join(map(_character, text))}"'


def _character(one: str) -> str:
    if one in _SHORT:
        return _SHORT[one]
    return f"\\u{ord(one):04x}" if ord(one) < 0x20 or ord(one) == _DELETE else one
