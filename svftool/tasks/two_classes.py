"""Examples that stand under two classes: a slip of the data that training cannot get right."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from svftool.tasks.images import LabelledImage, read_bytes
from svftool.tasks.texts import LabelledText

T = TypeVar("T", LabelledImage, LabelledText)


def texts_of_two_classes(texts: Sequence[LabelledText]) -> list[str]:
    """Say how many texts stand under several classes, word for word, and name one; else nothing."""
    found = _of_two_classes(texts, lambda one: one.text)
    return _said(found, "texts", lambda one: f"{one.file}: line {one.line}")


def images_of_two_classes(images: Sequence[LabelledImage]) -> list[str]:
    """Say how many images stand under several classes, byte for byte, and name one; else nothing.

    Files of one size alone are read, and of these such as are of several classes.
    """
    files = [one for one in images if isinstance(one.path, Path) and one.path.is_file()]
    alike = _of_two_classes(files, _size)
    found = _of_two_classes([one for group in alike for one in group], _content)
    return _said(found, "images", lambda one: str(one.path))


def _size(image: LabelledImage) -> int:
    return image.path.stat().st_size if isinstance(image.path, Path) else 0


def _content(image: LabelledImage) -> bytes:
    return hashlib.blake2b(read_bytes(image.path)).digest()


def _of_two_classes(examples: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Group examples by a key; keep the groups of several classes."""
    groups: dict[Hashable, list[T]] = defaultdict(list)
    for one in examples:
        groups[key(one)].append(one)
    return [group for group in groups.values() if len({one.label for one in group}) > 1]


def _said(groups: Sequence[Sequence[T]], unit: str, where: Callable[[T], str]) -> list[str]:
    if not groups:
        return []
    first = groups[0][0]
    other = next(one for one in groups[0] if one.label != first.label)
    return [
        f"{unit} that stand under two classes or more: {len(groups)}, such as {where(first)} "
        f"({first.label}) and {where(other)} ({other.label}). No model gets both right: remove the "
        "wrong ones"
    ]
