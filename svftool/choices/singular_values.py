"""Which singular values are trained, and how trainable numbers become them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from svftool.errors import UsageError, agreeing, counted, no_such

Parametrisation = Literal["scale", "shift", "absolute"]
"""``S = S_base (1 + theta)``, ``S = S_base + theta``, or ``S = theta``."""

_BAND = re.compile(r"(?:(?P<side>top|bottom):)?(?P<count>\d+)|(?P<start>\d+)-(?P<stop>\d+)")


@dataclass(frozen=True)
class Band:
    """The singular values of a layer that are trained, by index in non-increasing order.

    Attributes
    ----------
    start, stop : int or None
        As in a slice; negative numbers count from the smallest value.
    """

    start: int | None = None
    stop: int | None = None

    def of(self, k: int) -> slice:
        """Return the slice for a layer of rank `k`; empty where `reaches` says that it has none.

        Examples
        --------
        >>> Band(stop=64).of(10), Band(8, 64).of(4)
        (slice(0, 10, 1), slice(4, 4, 1))
        """
        start, stop, _ = slice(self.start, self.stop).indices(k)
        return slice(start, max(start, stop), 1)

    def reaches(self, k: int) -> bool:
        """Whether a layer of rank `k` has any of these singular values."""
        return len(range(k)[self.start : self.stop]) > 0


def parse_band(rule: str | int | None) -> Band:
    """Read a rule of which singular values are trained.

    Parameters
    ----------
    rule : str, int or None
        ``"top:64"`` or 64 for the 64 largest, ``"bottom:64"`` for the smallest, ``"8-64"`` for
        those from index 8 up to index 63, None for all.

    Raises
    ------
    UsageError
        If the rule is none of these, or selects nothing.

    Examples
    --------
    >>> parse_band("top:64")
    Band(start=None, stop=64)
    >>> parse_band("bottom:8")
    Band(start=-8, stop=None)
    """
    if rule is None:
        return Band()
    match = _BAND.fullmatch(str(rule))
    if match is None:
        raise UsageError(f"train rank {rule!r}, expected 'top:N', 'bottom:N', 'A-B' or a number.")
    if match["count"] is None:
        band = Band(int(match["start"]), int(match["stop"]))
        empty = int(match["start"]) >= int(match["stop"])
    else:
        count = int(match["count"])
        band = Band(start=-count) if match["side"] == "bottom" else Band(stop=count)
        empty = count == 0
    if empty:
        raise UsageError(f"train rank {rule!r} selects no singular value, expected at least one.")
    return band


def check_band(rule: str | int | None, ranks: Sequence[int]) -> None:
    """Refuse a rule of singular values that no layer has.

    Parameters
    ----------
    rule : str, int or None
        See `parse_band`.
    ranks : sequence of int
        Of the layers.

    Raises
    ------
    UsageError
        If none of the layers has one of them.
    """
    band = parse_band(rule)
    if ranks and not any(map(band.reaches, ranks)):
        raise UsageError(
            f"train rank {rule!r}: no layer has these singular values, expected indices below "
            f"{max(ranks)}, the largest rank. Give smaller ones."
        )


def say_band(rule: str | int | None, ranks: Sequence[int]) -> str:
    """Say how many layers have none of the singular values of a rule; empty where all have some.

    Examples
    --------
    >>> say_band("8-64", [4, 64])
    'train rank 8-64: 1 of 2 layers has no singular values there, and keeps those of the base'
    """
    without = [k for k in ranks if not parse_band(rule).reaches(k)]
    if not without:
        return ""
    return (
        f"train rank {rule}: {counted(len(without), 'layers', 'have', of=len(ranks))} no singular "
        f"values there, and {agreeing(len(without), 'keep')} those of the base"
    )


def check_parametrisation(name: str) -> None:
    """Refuse a name that is no parametrisation.

    Raises
    ------
    UsageError
        If `name` is none of ``scale``, ``shift``, ``absolute``.
    """
    if name not in get_args(Parametrisation):
        raise UsageError(no_such("parametrisation", name, get_args(Parametrisation)))
