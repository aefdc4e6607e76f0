"""Names of tensors in tables: what all rows share is left out, words are cut, numbers never."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from rich.cells import cell_len

from svftool.report.text import safe

_PIECES = re.compile(r"\d+|[^\d.]+|\.")


class Names:
    """Short names for the rows of one table, no two of them alike.

    Parts before the first number that all names share are left out, and the last part where it is
    the same. Where a name is still too long, its words are cut, those of the last part at last.
    A word keeps the letters that tell it from every other, and a number all its digits: block 1 is
    never taken for block 11. A name that cannot be shortened to a width stays longer; a table folds
    it.

    Parameters
    ----------
    names : iterable of str
        Of all rows.
    """

    def __init__(self, names: Iterable[str]) -> None:
        listed = list(dict.fromkeys(names))
        self.head, self.tail = _shared([name.split(".") for name in listed])
        words = {piece for name in listed for piece in _pieces(self.bare(name)) if _is_word(piece)}
        self._least = dict(_telling(sorted(words)))

    @property
    def dropped(self) -> str:
        """What was left out, as a note for people; empty where nothing was."""
        parts = [safe(part) for part in (self.head, self.tail) if part]
        return f"names without {' and '.join(parts)}" if parts else ""

    def bare(self, name: str) -> str:
        """Return a name without what all share."""
        return safe(name.removeprefix(self.head).removesuffix(self.tail))

    def fit(self, name: str, width: int) -> str:
        """Shorten a name to a width, as far as that goes."""
        bare = self.bare(name)
        if cell_len(bare) <= width:
            return bare
        pieces = _pieces(bare)
        last = max((index for index, one in enumerate(pieces) if one == "."), default=-1)
        shorter = bare
        for whole in (last, len(pieces)):
            for letters in range(max(map(len, pieces)) - 1, 0, -1):
                shorter = "".join(
                    self._cut(one, letters) if index < whole else one
                    for index, one in enumerate(pieces)
                )
                if cell_len(shorter) <= width:
                    return shorter
        return shorter

    def _cut(self, word: str, letters: int) -> str:
        keep = max(letters, self._least.get(word, len(word)))
        return word if keep + 1 >= len(word) else f"{word[:keep]}…"


def display_names(names: Iterable[str], width: int) -> dict[str, str]:
    """Shorten the names of one table to a width.

    Parameters
    ----------
    names : iterable of str
        Tensor names; control characters are escaped.
    width : int
        Most characters of a result, where words can be cut so far.

    Examples
    --------
    >>> display_names(["module.layer1.0.weight", "module.layer2.0.weight"], 40)
    {'module.layer1.0.weight': 'layer1.0', 'module.layer2.0.weight': 'layer2.0'}
    >>> display_names(["fc.weight"], 40)
    {'fc.weight': 'fc.weight'}
    >>> list(display_names(["encoder.layers.11.mlp.fc1", "encoder.layers.1.mlp.fc1"], 7).values())
    ['11.m….fc1', '1.m….fc1']
    """
    listed = list(names)
    short = Names(listed)
    return {name: short.fit(name, width) for name in listed}


def distinct_paths(paths: Sequence[object]) -> list[str]:
    """Name files by as many of their last parts as tell them apart.

    Examples
    --------
    >>> distinct_paths(["run/a/model.safetensors", "run/b/model.safetensors"])
    ['a/model.safetensors', 'b/model.safetensors']
    >>> distinct_paths(["run/a.safetensors", "run/b.safetensors"])
    ['a.safetensors', 'b.safetensors']
    """
    parts = [str(path).rstrip("/").split("/") for path in paths]
    different = len({tuple(one) for one in parts})
    count = 1
    while len({tuple(one[-count:]) for one in parts}) < different:
        count += 1
    return [safe("/".join(one[-count:])) for one in parts]


def _pieces(name: str) -> list[str]:
    return _PIECES.findall(name)


def _is_word(piece: str) -> bool:
    return piece != "." and not piece[0].isdigit()


def _shared(names: Sequence[list[str]]) -> tuple[str, str]:
    """Return what all names begin with, up to the first number, and the last part if it is one."""
    if len(names) < 2:
        return "", ""
    first, last = min(names), max(names)
    least = min(map(len, names))
    count = 0
    while count < least - 1 and first[count] == last[count] and not _numbered(first[count]):
        count += 1
    if count and any(len(name) == count + 1 and name[-1].isdecimal() for name in names):
        count -= 1  # a number alone names nothing
    ends = {name[-1] for name in names}
    same = len(ends) == 1 and count < least - 1 and not _numbered(first[-1])
    return "".join(f"{part}." for part in first[:count]), f".{first[-1]}" if same else ""


def _numbered(part: str) -> bool:
    return any(letter.isdigit() for letter in part)


def _telling(words: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Yield each of some sorted words with the number of letters that tell it from the others."""
    for index, word in enumerate(words):
        beside = [*words[max(index - 1, 0) : index], *words[index + 1 : index + 2]]
        yield word, max((_common(word, other) for other in beside), default=0) + 1


def _common(one: str, other: str) -> int:
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count
