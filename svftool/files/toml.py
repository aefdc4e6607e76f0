"""TOML: read from files of people, with errors in one line; plain values written."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from svftool.errors import UsageError, system_fault

POLICY = "a policy in TOML"
"""What `inspect --policy` reads."""

_WORD = 63
"""Bits of the numbers that TOML promises to hold, beside their sign."""


def read_toml(path: Path, expected: str) -> dict[str, Any]:
    """Read a file that a person wrote.

    Parameters
    ----------
    path : Path
    expected : str
        What the file is to be, for the errors.

    Returns
    -------
    dict
        Its numbers have at most 64 bits, so that they can be shown and compared.

    Raises
    ------
    UsageError
        If there is no such file, or it is no TOML.
    ResourceError
        If the system refuses to read it.
    """
    try:
        # A byte order mark is what some editors put before everything.
        found = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file, expected {expected}. Check the path.") from None
    except RecursionError:
        raise UsageError(f"{path}: nested too deep, expected {expected}.") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        system_fault(error, path)
        reason = " ".join(str(error).split())
        raise UsageError(f"{path}: not readable ({reason}), expected {expected}.") from None
    except ValueError:  # more digits than Python reads
        found = {"": 1 << _WORD}
    if _has_wide(found.values()):
        raise UsageError(f"{path}: a whole number of over 64 bits, expected {expected}.")
    return found


def _has_wide(values: Iterable[Any]) -> bool:
    for one in values:
        if isinstance(one, int) and one.bit_length() > _WORD:
            return True
        if isinstance(one, (dict, list)):
            inside = one.values() if isinstance(one, dict) else one
            if _has_wide(inside):
                return True
    return False


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
