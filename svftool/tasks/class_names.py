"""Names of the classes of labelled examples: which there are, and in which order."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from svftool.errors import DataError, counted, shortlist
from svftool.files.texts import read_text
from svftool.tasks.images import require_encodable


class Labelled(Protocol):
    """An example that says what its class is called."""

    @property
    def label(self) -> str:
        """Name of the class."""


def class_names(
    examples: Sequence[Labelled],
    given: str | os.PathLike[str] | Sequence[str] | None,
    data: object = "the data",
) -> tuple[str, ...]:
    """Return the classes in the order of the head's outputs: given, those of a file, or sorted.

    Parameters
    ----------
    examples : sequence of Labelled
    given : path-like, sequence of str or None
        A file of names, or the names.
    data : object
        Where the examples are from, for errors.

    Raises
    ------
    DataError
        If the file is not readable, repeats a name, or there are fewer than two classes.
    """
    where = str(data)
    if given is None:
        names = tuple(sorted({one.label for one in examples}))
    elif isinstance(given, (str, os.PathLike)):
        names, where = _read_classes(Path(given)), str(given)
    else:
        names = tuple(given)
    require_encodable(names, where)
    if len(names) < 2:
        found = f"{counted(len(names), 'classes')}, expected two or more ({shortlist(names)})"
        raise DataError(f"{where}: {found}")
    return names


def readable(name: str) -> str:
    """Return a class's name as words.

    Examples
    --------
    >>> readable("card_arrival"), readable("exchangeRate"), readable("sci.space")
    ('card arrival', 'exchange Rate', 'sci space')
    """
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)
    return " ".join(re.sub(r"[_\-./]+", " ", apart).split()) or name


def natural_order(names: Sequence[str]) -> tuple[str, ...]:
    """Sort names by the numbers in them, as timm sorts folders.

    Examples
    --------
    >>> natural_order(["1", "10", "2"])
    ('1', '2', '10')
    """

    def key(name: str) -> list[tuple[int, int, str]]:
        parts = re.findall(r"[0-9]+|[^0-9]+", name)
        numbers = [(0, int(p[:400]), "") if p[0] in "0123456789" else (1, 0, p) for p in parts]
        return [*numbers, (2, 0, name)]

    return tuple(sorted(names, key=key))


def order_warning(names: Sequence[str]) -> str | None:
    """Say where classes were sorted as text and another tool would sort them by number."""
    if list(names) != sorted(names) or natural_order(names) == tuple(names):
        return None
    return (
        f"the classes are taken in the order {shortlist(names, 4)}, sorted as text, and the head "
        f"does not say its own; by number they are {shortlist(natural_order(names), 4)}. Give the "
        "order with --classes, if the head was trained with another"
    )


def _read_classes(file: Path) -> tuple[str, ...]:
    lines = read_text(file, "a text file of class names").splitlines()
    names = tuple(line.strip() for line in lines if line.strip())
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{file}: {shortlist(twice)} twice, expected each class once")
    return names


def check_labels(examples: Sequence[Labelled], classes: Sequence[str], source: object) -> None:
    """Refuse examples of classes that are not known.

    Raises
    ------
    DataError
        Names the classes, and `source`, where the examples are from.
    """
    unknown = sorted({one.label for one in examples} - set(classes))
    if unknown:
        count = sum(one.label in unknown for one in examples)
        raise DataError(
            f"{source}: unknown class {shortlist(unknown)}, expected one of {shortlist(classes)}. "
            f"Remove the {counted(count, 'examples', of=len(examples))}, or give some to train on"
        )
