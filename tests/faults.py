"""Let the system refuse one call of a command, at random, and look at what is said and left.

::

    python tests/faults.py --count 500 --seed 0 [--replay SEED:NUMBER]

One call out of those that open, read, write, rename or lock something in the command's folder fails
with an error number. Then the command says one line and ends with 8, or does without the call; its
output is absent, old or complete; and the next run works.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import kills
import warm

CODES = (
    errno.ENOSPC, errno.EIO, errno.ENOSYS, errno.EXDEV, errno.ESTALE, errno.EINTR, errno.EBUSY,
    errno.EMFILE, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.ENOLCK, errno.ENOTCONN, 9999,
)  # fmt: skip
CALLS = (
    (os, "open"), (os, "pwrite"), (os, "preadv"), (os, "fsync"), (os, "rename"), (os, "replace"),
    (os, "mkdir"), (os, "unlink"), (os, "rmdir"), (os, "ftruncate"), (os, "scandir"),
    (os, "listdir"), (os, "close"), (fcntl, "flock"), (io, "open"), (builtins, "open"),
)  # fmt: skip
LIMIT = 300
"""Calls of a kind that are counted in an undisturbed run, at most."""


class Refusal:
    """Makes the n-th call of one kind fail; counts them.

    Parameters
    ----------
    folder : Path
        Calls on paths elsewhere are left alone.
    call : (module, str)
    number : int
        Which call; -1 for none.
    code : int
    """

    def __init__(self, folder: Path, call: tuple[Any, str], number: int, code: int) -> None:
        self.folder, self.call, self.number, self.code = folder, call, number, code
        self.seen = 0

    def install(self) -> None:
        """Put it in the place of the call."""
        module, name = self.call
        real: Callable[..., Any] = getattr(module, name)

        def refuse(first: Any, *args: Any, **options: Any) -> Any:
            if self._ours(first):
                self.seen += 1
                if self.seen - 1 == self.number:
                    named = first if isinstance(first, str) else None
                    raise OSError(self.code, "refused", named)
            return real(first, *args, **options)

        setattr(module, name, refuse)
        if name == "unlink":
            os.remove = refuse  # type: ignore[assignment]

    def _ours(self, first: Any) -> bool:
        if isinstance(first, int) or hasattr(first, "fileno"):
            number = first if isinstance(first, int) else first.fileno()
            try:
                first = Path(f"/proc/self/fd/{number}").readlink()
            except OSError:
                return False
        if not isinstance(first, str | os.PathLike):
            return False
        return Path(first).absolute().is_relative_to(self.folder)


class Faults(kills.Kills):
    """Commands of which one call fails."""

    def run(self, number: int) -> tuple[str, str]:
        """Disturb one command; return its name and how it ended.

        Raises
        ------
        AssertionError
            If it ends in another way than it should.
        """
        command = kills.COMMANDS[number % len(kills.COMMANDS)]
        random = Random(f"{self.seed}:{number}")
        known = self.known(command)
        case = self._case()
        old = self._old(random, case, command)
        others = self._others(case, command)
        words = (*command.words, *(("--force",) if old else ()))
        call, code = random.choice(CALLS), random.choice(CODES)
        at = random.choice((0, 1, 2, random.randrange(LIMIT)))
        refusal = Refusal(case, call, at, code)
        ended = warm.run(words, case, before=refusal.install)
        what = f"{call[1]} {at} {errno.errorcode.get(code, code)}"
        lines = ended.err.rstrip().splitlines() or [""]
        said = [line for line in lines if line.startswith("error:")]
        assert ended.code in (0, 8), f"{what}: exit {ended.code}: {ended.err[-1500:]}"
        assert ended.code == 0 or said == lines[-1:], f"{what}: no single line: {ended.err[-900:]}"
        self._left(case, command, known, old)
        # What could not be removed is still there; nothing else may have changed.
        now = self._others(case, command)
        assert now | others == now, f"{what}: another file has changed"
        self._next(case, command, known, ())
        return call[1], f"exit {ended.code}"


def main(words: list[str] | None = None) -> int:
    """Run the command line."""
    parser = warm.options(__doc__, count=20)
    chosen = parser.parse_args(words)
    seed, numbers = warm.cases(chosen)
    warm.warm()
    begun, counts, faults = time.monotonic(), Counter[tuple[str, str]](), 0
    with tempfile.TemporaryDirectory(prefix="svftool-faults-") as name:
        tried = Faults(Path(name), seed)
        for number in numbers:
            if time.monotonic() - begun > chosen.seconds:
                break
            try:
                counts[tried.run(number)] += 1
            except AssertionError as error:
                faults += 1
                counts[kills.COMMANDS[number % len(kills.COMMANDS)].name, "FAULT"] += 1
                print(f"{seed}:{number}: {error}", flush=True)
    for (call, outcome), count in sorted(counts.items()):
        print(f"{call:20} {outcome:16} {count:4}")
    print(f"{sum(counts.values())} runs, {faults} faults, {time.monotonic() - begun:.0f} s")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
