"""What the options of a command take, by their annotations, and what is wrong with a value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from svftool.errors import brief, no_such

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


@dataclass(frozen=True)
class Taken:
    """What an option takes.

    Attributes
    ----------
    kind : type
        ``bool``, ``int``, ``float``, ``str`` or ``Path``.
    choices : tuple of str
        The only texts; empty where there are others.
    least, most : float or None
        Limits of a number.
    repeated : bool
        Whether the option may be given several times.
    count : int
        Values that follow its flag.
    """

    kind: type
    choices: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None
    repeated: bool = False
    count: int = 1

    @property
    def words(self) -> str:
        """What it takes, in words."""
        return _WORDS.get(self.kind, "a text")

    def complaint(self, value: Any) -> str:
        """Say what is wrong with a value, or with the text of one; nothing if it can be taken.

        Examples
        --------
        >>> Taken(int, least=1).complaint("0")
        '0, expected at least 1.'
        >>> Taken(str, ("adamw", "sgd")).complaint("adam")
        "'adam', expected one of adamw, sgd. Did you mean 'adamw'?"
        >>> Taken(float).complaint("1e-3")
        ''
        """
        if self.choices:
            text = str(value)
            return "" if text in self.choices else no_such("", text, self.choices).strip()
        if self.kind not in (int, float):
            return ""
        try:
            number: float = self.kind(value)
        except (ValueError, TypeError, OverflowError):
            return f"{brief(value)}, expected {self.words}."
        if self.least is not None and number < self.least:
            return f"{number}, expected at least {self.least}."
        if self.most is not None and number > self.most:
            return f"{number}, expected at most {self.most}."
        return ""


def taken_by(command: Callable[..., Any]) -> dict[str, Taken]:
    """Return what each parameter of a command takes, by its name."""
    return {name: _taken(one.annotation) for name, one in signature(command).parameters.items()}


def _taken(annotation: Any) -> Taken:
    hint, *marks = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
    limits = {
        key: found
        for mark in marks
        for key, name in (("least", "min"), ("most", "max"))
        if (found := getattr(mark, name, None)) is not None
    }
    if get_origin(hint) in (Union, UnionType):
        hint = next(part for part in get_args(hint) if part is not NoneType)
    repeated, count = get_origin(hint) is list, 1
    if get_origin(hint) is tuple:
        count = len(get_args(hint))
    if repeated or count > 1:
        hint = get_args(hint)[0]
    choices = tuple(map(str, get_args(hint))) if get_origin(hint) is Literal else ()
    kind = next((one for one in (bool, int, float, Path) if hint is one), str)
    return Taken(kind, choices, repeated=repeated, count=count, **limits)
