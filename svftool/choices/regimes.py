"""Regimes by name: what is trained beside the head."""

from __future__ import annotations

import re
from dataclasses import dataclass

from svftool.errors import UsageError, no_such

NAMES = "head, svf, svf+bias, svf+norm, bias, norm, lora:RANK, full"
_PARTS = frozenset({"svf", "bias", "norm"})


@dataclass(frozen=True)
class Regime:
    """What is trained beside the head.

    Attributes
    ----------
    name : str
        As given on the command line.
    parts : frozenset of str
        Some of ``svf``, ``bias``, ``norm``; empty for ``head``, ``lora`` and ``full``.
    lora : int or None
        Rank of the adapters.
    full : bool
        Everything.
    """

    name: str
    parts: frozenset[str] = frozenset()
    lora: int | None = None
    full: bool = False


def parse_regime(text: str) -> Regime:
    """Read the name of a regime.

    Raises
    ------
    UsageError
        If there is no such regime.

    Examples
    --------
    >>> sorted(parse_regime("svf+bias").parts), parse_regime("lora:8").lora
    (['bias', 'svf'], 8)
    """
    name = text.strip()
    if name in ("head", "full"):
        return Regime(name, full=name == "full")
    lora = re.fullmatch(r"lora:([1-9]\d*)", name)
    if lora:
        return Regime(name, lora=int(lora[1]))
    parts = name.split("+")
    if not set(parts) <= _PARTS or len(set(parts)) < len(parts):
        raise UsageError(no_such("regime", text, NAMES.split(", ")))
    return Regime(name, parts=frozenset(parts))
