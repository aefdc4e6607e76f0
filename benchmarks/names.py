"""Names of cases, as a benchmark's options and the documentation spell them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence


def chosen(asked: Sequence[str], known: Iterable[str]) -> list[str]:
    """Return the known names that the asked ones begin, all of them where none is asked for.

    Case and punctuation don't count, so that ``ResNet-50`` is ``resnet50``. An unknown name ends
    the process with exit code 2 and the known ones on stderr.
    """
    names = list(known)
    if not asked:
        return names
    found = []
    for one in asked:
        fit = [name for name in names if _plain(name).startswith(_plain(one))]
        if not fit:
            print(f"no such case: {one!r}, expected one of {'; '.join(names)}", file=sys.stderr)
            raise SystemExit(2)
        found += [name for name in fit if name not in found]
    return found


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
