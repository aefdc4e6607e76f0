"""Sizes in bytes as users write them."""

from __future__ import annotations

import re

from svftool.errors import UsageError

_UNITS = {"": 1, "B": 1} | {
    prefix + unit: base**power
    for base, unit in ((1000, "B"), (1024, "IB"))
    for power, prefix in enumerate("KMGT", start=1)
}


def parse_size(text: str) -> int:
    """Return the bytes that a text such as ``5GB`` (decimal) or ``5GiB`` (binary) stands for.

    Raises
    ------
    UsageError
        If it is no positive size.

    Examples
    --------
    >>> parse_size("5GB"), parse_size("1.5 KiB"), parse_size("100")
    (5000000000, 1536, 100)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or not int(float(match[1]) * unit):
        raise UsageError(
            f"size {text!r}, expected a positive number with KB, MB, GB or TB, such as 5GB"
        )
    return int(float(match[1]) * unit)
