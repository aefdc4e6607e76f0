"""Give svftool damaged inputs of every format, and keep those that it does not take as it should.

::

    python tests/fuzz.py --count 10000 --seed 0 [--start N] [--only FORMAT] [--replay SEED:NUMBER]

An input is right if the command succeeds, or says one line on stderr and ends with the exit code of
an error that svftool knows. It is wrong if it ends in a traceback, a signal, more than 30 seconds,
more than 2 GB, a half-written output, or if code out of the input runs.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random

import mutations
import warm
from fuzz_seeds import FORMATS, Format, Words

SECONDS = 30
BYTES = 2_000_000_000
KNOWN = range(2, 11)


@dataclass(frozen=True)
class Result:
    """What became of one input."""

    number: int
    format: str
    words: Words
    ended: warm.Ended
    fault: str

    @property
    def outcome(self) -> str:
        """The fault, or the exit code."""
        return self.fault or f"exit {self.ended.code}"


class Fuzz:
    """Sound inputs in a folder, and one damaged copy after the other.

    Parameters
    ----------
    work : Path
        An empty folder.
    seed : int
    """

    def __init__(self, work: Path, seed: int) -> None:
        self.work, self.seed = work, seed
        self._built: set[str] = set()

    def format(self, number: int) -> Format:
        """Return the format of an input."""
        return FORMATS[number % len(FORMATS)]

    def run(self, number: int) -> Result:
        """Make an input and run a command on it; it stays in ``case`` until the next."""
        kind = self.format(number)
        case = self.work / "case"
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(self._sound(kind), case, symlinks=True)
        random = Random(f"{self.seed}:{number}")
        words = self._damage(random, kind, case)
        before = {path.name for path in case.iterdir()}
        ended = warm.run(words, case, seconds=SECONDS)
        return Result(number, kind.name, words, ended, fault(ended, case, before | set(kind.kept)))

    def _sound(self, kind: Format) -> Path:
        folder = self.work / "sound" / kind.name
        if kind.name not in self._built:
            folder.mkdir(parents=True)
            warm.call(lambda: kind.build(folder))
            self._built.add(kind.name)
        return folder

    def _damage(self, random: Random, kind: Format, case: Path) -> Words:
        files = sorted(path for path in case.rglob("*") if path.is_file())
        found = sorted(case.glob(random.choice(kind.damaged)))
        path = random.choice([one for one in found if one.is_file()])
        mutations.damage(random, path, [one for one in files if one != path])
        place = str(path.relative_to(case))
        return tuple(word.replace("{}", place) for word in random.choice(kind.commands))

    def check(self) -> None:
        """Hold that sound inputs are taken.

        Raises
        ------
        AssertionError
        """
        for kind in FORMATS:
            for words in kind.commands:
                case = self.work / "case"
                shutil.rmtree(case, ignore_errors=True)
                shutil.copytree(self._sound(kind), case)
                place = min(case.glob(kind.damaged[0])).name
                ended = warm.run([word.replace("{}", place) for word in words], case)
                assert ended.code in (0, 10), (words, ended)


def fault(ended: warm.Ended, case: Path, before: set[str]) -> str:
    """Say what is wrong with how a command ended; nothing if it is right."""
    lines = ended.err.rstrip().splitlines() or [""]
    said = [line for line in lines if line.startswith("error:")]
    # An argument that is missing is answered with how the command is used.
    said = said or (lines[-1:] if lines[0].startswith("Usage: ") and ended.code == 2 else [])
    new = {path.name for path in case.iterdir()} - before
    code = ended.code
    faults = {
        "hang": code is None,
        f"signal {code}": code is not None and code < 0,
        "code ran": mutations.CANARY in new or Path(mutations.CANARY).exists(),
        "traceback": code == 1 or "Traceback (most recent call last)" in ended.err,
        "memory": ended.peak > BYTES,
        "unknown exit": code not in (0, *KNOWN),
        "not one line": bool(code) and said != lines[-1:],
        "left something": code not in (0, 10) and any(one[0] not in "._" for one in new),
    }
    return next((name for name, found in faults.items() if found), "")


def _pipes(folder: str, names: list[str]) -> list[str]:
    """Return what cannot be copied."""
    places = {name: Path(folder, name) for name in names}
    return [name for name, place in places.items() if not place.is_symlink() and place.is_fifo()]


def keep(result: Result, case: Path, folder: Path, name: str) -> None:
    """Keep an input that went wrong, and what was said."""
    place = folder / name
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(case, place, symlinks=True, ignore=_pipes)
    told = f"{result.outcome}\n{' '.join(result.words)}\n{result.ended.seconds:.2f} s, "
    told += f"{result.ended.peak / 1e6:.0f} MB, {result.ended.code}\n{result.ended.err}"
    (place / "fuzz.txt").write_text(told)


def main(words: list[str] | None = None) -> int:
    """Run the command line."""
    parser = warm.options(__doc__, count=300)
    parser.add_argument("--start", type=int, default=0, help="first number")
    parser.add_argument("--only", choices=[one.name for one in FORMATS])
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"))
    parser.add_argument(
        "--check", action="store_true", help="only hold that sound inputs are taken"
    )
    chosen = parser.parse_args(words)
    seed, numbers = warm.cases(chosen, start=chosen.start)
    warm.warm()
    with tempfile.TemporaryDirectory(prefix="svftool-fuzz-") as name:
        fuzz = Fuzz(Path(name), seed)
        if chosen.check:
            fuzz.check()
            return 0
        wanted = [one for one in numbers if chosen.only in (None, fuzz.format(one).name)]
        return report(fuzz, wanted, chosen.keep, until=time.monotonic() + chosen.seconds)


def report(fuzz: Fuzz, numbers: list[int], kept: Path, *, until: float) -> int:
    """Run inputs, print what went wrong and the counts, and return the exit code."""
    begun, counts, faults = time.monotonic(), Counter[tuple[str, str]](), 0
    for number in numbers:
        if time.monotonic() > until:
            break
        result = fuzz.run(number)
        counts[result.format, result.outcome] += 1
        if result.fault or len(numbers) == 1:
            last = (result.ended.err.strip().splitlines() or [""])[-1][:200]
            print(f"{fuzz.seed}:{number} {result.format}: {result.outcome}: {last}", flush=True)
        if result.fault:
            faults += 1
            keep(result, fuzz.work / "case", kept, f"{fuzz.seed}-{number}")
    for (kind, outcome), count in sorted(counts.items()):
        print(f"{kind:12} {outcome:16} {count:6}")
    print(f"{sum(counts.values())} inputs, {faults} faults, {time.monotonic() - begun:.0f} s")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
