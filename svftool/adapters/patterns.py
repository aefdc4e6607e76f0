"""Match a regular expression in time that grows with the text, whatever the pattern is.

Patterns of an adapter's configuration come from elsewhere. ``re`` goes back and forth over a text,
and for ``(a|a)*b`` that takes hours. Here each part of a pattern maps a start to all ends that it
can reach, once for each start.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from re import _constants as sre  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

LONGEST = 2000
"""Characters of a pattern."""
_REPEATS = 1000
_PLAIN = re.compile(r"[\w.\-]*")
_ZERO_WIDTH = {
    sre.AT_BEGINNING: r"^",
    sre.AT_BEGINNING_STRING: r"\A",
    sre.AT_END: r"$",
    sre.AT_END_STRING: r"\Z",
    sre.AT_BOUNDARY: r"\b",
    sre.AT_NON_BOUNDARY: r"\B",
}


def ends_with(pattern: str, text: str) -> bool:
    r"""Tell whether a pattern matches a module's name from one of its dots to its end.

    It is what PEFT asks: ``re.match(rf"(.*\.)?({pattern})$", text)``.

    Raises
    ------
    ValueError
        If it is no regular expression, or one that cannot be matched in bounded time: references,
        looking around, flags.

    Examples
    --------
    >>> ends_with("q_proj", "layers.0.q_proj"), ends_with("q_proj", "layers.0.eq_proj")
    (True, False)
    >>> ends_with("(a|a)*b", "a" * 40)
    False
    """
    if len(pattern) > LONGEST:
        raise ValueError(f"a pattern of {len(pattern)} characters, expected at most {LONGEST}")
    whole = rf"(?:.*\.)?(?:{pattern})"
    if _PLAIN.fullmatch(pattern):
        return re.fullmatch(whole, text) is not None
    try:
        parsed = _parser.parse(whole)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"no regular expression ({error})") from error
    if parsed.state.flags & ~re.UNICODE.value:
        raise ValueError("flags, expected none")
    return len(text) in _Reach(text).through(parsed, frozenset({0}))


class _Reach:
    """Where parts of a pattern can end in one text."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._known: dict[tuple[int, int], frozenset[int]] = {}
        self._tests: dict[int, Callable[[str], object]] = {}

    def through(self, parts: Iterable[Any], starts: frozenset[int]) -> frozenset[int]:
        """Return where a sequence can end that begins at one of `starts`."""
        for part in parts:
            if not starts:
                break
            starts = frozenset().union(*(self._from(part, start) for start in starts))
        return starts

    def _from(self, part: Any, start: int) -> frozenset[int]:
        # The parsed pattern outlives this object, so identities are not used twice.
        key = id(part), start
        if key not in self._known:
            self._known[key] = self._ends(part, start)
        return self._known[key]

    def _ends(self, part: Any, start: int) -> frozenset[int]:
        kind, value = part
        if kind in (sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN):
            found = start < len(self._text) and _is_one(kind, value, self._text[start])
            return frozenset({start + 1}) if found else frozenset()
        if kind is sre.AT and value in _ZERO_WIDTH:
            found = re.compile(_ZERO_WIDTH[value]).match(self._text, start) is not None
            return frozenset({start}) if found else frozenset()
        if kind is sre.BRANCH:
            return frozenset().union(*(self.through(one, frozenset({start})) for one in value[1]))
        if kind is sre.SUBPATTERN and not value[1] and not value[2]:
            return self.through(value[3], frozenset({start}))
        if kind in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            return self._repeated(value[0], value[1], value[2], start)
        raise ValueError(f"{str(kind).lower()} in a pattern, expected none")

    def _repeated(self, least: int, most: Any, body: Any, start: int) -> frozenset[int]:
        endless = most is sre.MAXREPEAT
        if least > _REPEATS or not (endless or most <= _REPEATS):
            raise ValueError(f"more than {_REPEATS} repetitions in a pattern")
        reached = frozenset({start})
        for _ in range(least):
            reached = self.through(body, reached)
        total, new, count = reached, reached, least
        while new and (endless or count < most):
            new = self.through(body, new) - total
            total, count = total | new, count + 1
        return total


def _is_one(kind: Any, value: Any, character: str) -> bool:
    if kind is sre.ANY:
        return character != "\n"
    if kind is not sre.IN:
        return bool((ord(character) == value) == (kind is sre.LITERAL))
    negated = value[0][0] is sre.NEGATE
    return any(_in(item, character) for item in value[negated:]) != negated


_CATEGORIES: dict[Any, tuple[str, bool]] = {
    sre.CATEGORY_DIGIT: (r"\d", True),
    sre.CATEGORY_NOT_DIGIT: (r"\d", False),
    sre.CATEGORY_SPACE: (r"\s", True),
    sre.CATEGORY_NOT_SPACE: (r"\s", False),
    sre.CATEGORY_WORD: (r"\w", True),
    sre.CATEGORY_NOT_WORD: (r"\w", False),
}


def _in(item: Any, character: str) -> bool:
    kind, value = item
    if kind is sre.LITERAL:
        return bool(ord(character) == value)
    if kind is sre.RANGE:
        return bool(value[0] <= ord(character) <= value[1])
    pattern, wanted = _CATEGORIES[value]
    return bool((re.match(pattern, character) is not None) == wanted)
