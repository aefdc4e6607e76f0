"""Kill every command that writes at random moments, and look at what is left.

::

    python tests/kills.py --count 300 --seed 0 [--only NAME] [--replay SEED:NUMBER]

After SIGKILL the output is absent, the old one, or the complete new one; no other file has changed;
and the same command, once more, works and gives the bytes of an undisturbed run.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random

import fuzz_seeds
import warm

from svftool.stages.configuration import MARK

LATE = 1.1
"""Share of an undisturbed run within which the kill comes."""
TIMED = ("results.json", "report.html")
"""Outputs that hold how long something took: these are only held to be complete."""
REMAINS = (".partial", ".partial.scratch", ".partial.lock", ".svftool-replaced")

_TRAINING = ("--data", "data", "--model", "net.py:Plain", "--shots", "1", "--steps", "3")
_FINETUNE = ("finetune", "factors", *_TRAINING)


@dataclass(frozen=True)
class Command:
    """A command that writes: its words, its outputs, and whether it takes up work again."""

    name: str
    words: tuple[str, ...]
    outputs: tuple[str, ...]
    resumes: bool = False


COMMANDS = (
    Command("decompose", ("decompose", "base.safetensors", "-o", "out"), ("out",), True),
    Command("decompose shards", ("decompose", "base.safetensors", "-o", "out", "--max-shard-size",
                                 "400B"), ("out",), True),
    Command("decompose spectra", ("decompose", "base.safetensors", "-o", "out", "--rank",
                                  "energy:0.9", "--max-shard-size", "400B"), ("out",), True),
    Command("merge file", ("merge", "factors", "t.svf.safetensors", "-o", "out.safetensors"),
            ("out.safetensors",)),
    Command("merge folder", ("merge", "factors", "t.svf.safetensors", "-o", "out", "--verify"),
            ("out",)),
    Command("merge without base", ("merge", "factors", "--without-base", "-o", "out"), ("out",)),
    Command("extract", ("extract", "base.safetensors", "tuned.safetensors", "-o",
                        "out.svf.safetensors"), ("out.svf.safetensors",)),
    Command("extract lora", ("extract", "base.safetensors", "tuned.safetensors", "-o", "out",
                             "--as", "lora", "--rank", "2"), ("out",), True),
    Command("finetune", (*_FINETUNE, "-o", "out.svf.safetensors"),
            ("out.svf.safetensors", "out.run.toml"), True),
    Command("finetune regimes", (*_FINETUNE, "-o", "out", "--regime", "svf,head", "--report",
                                 "report.html"), ("out", "report.html"), True),
    Command("inspect", ("inspect", "base.safetensors", "tuned.safetensors", "--csv", "out.csv",
                        "--html", "out.html", "--plot", "out.svg"),
            ("out.csv", "out.html", "out.svg")),
    Command("evaluate", ("evaluate", "base.safetensors", "--data", "data", "--model",
                         "net.py:Plain", "--predictions", "out.jsonl"), ("out.jsonl",)),
)  # fmt: skip


def digest(path: Path) -> str:
    """Return what a file or a folder holds, as a hash; of one with times, that it is complete."""
    if path.is_dir():
        parts = [f"{one.name} {digest(one)}" for one in sorted(path.iterdir())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
    if not path.exists():
        return "absent"
    raw = path.read_bytes()
    if path.name in TIMED:
        if path.suffix == ".json":
            json.loads(raw)
        return "complete" if raw.rstrip().endswith((b"}", b"</html>")) else "cut off"
    return hashlib.sha256(raw).hexdigest()


@dataclass(frozen=True)
class Known:
    """What an undisturbed run gives, and how long it takes."""

    outputs: dict[str, str]
    seconds: float


class Kills:
    """Inputs in a folder, and one killed command after the other.

    Parameters
    ----------
    work : Path
        An empty folder.
    seed : int
    """

    def __init__(self, work: Path, seed: int) -> None:
        self.work, self.seed = work, seed
        self.sound = work / "sound"
        self.sound.mkdir()
        warm.call(lambda: fuzz_seeds.write_factors(self.sound))
        self._known: dict[str, Known] = {}

    def _case(self) -> Path:
        case = self.work / "case"
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(self.sound, case)
        return case

    def known(self, command: Command) -> Known:
        """Run a command undisturbed, once."""
        if command.name not in self._known:
            case = self._case()
            ended = warm.run(command.words, case)
            assert ended.code == 0, (command.words, ended)
            found = {name: digest(case / name) for name in command.outputs}
            assert "absent" not in found.values()
            self._known[command.name] = Known(found, ended.seconds)
        return self._known[command.name]

    def run(self, number: int) -> tuple[str, str]:
        """Kill one command, once to three times; return its name and what was left.

        Raises
        ------
        AssertionError
            If something is lost, half-written, or the next run does not work.
        """
        command = COMMANDS[number % len(COMMANDS)]
        random = Random(f"{self.seed}:{number}")
        known = self.known(command)
        case = self._case()
        old = self._old(random, case, command)
        others = self._others(case, command)
        force = ("--force",) if old else ()
        resume = ("--resume",) if command.resumes and random.random() < 0.5 else ()
        left = ""
        for again in range(random.choice((1, 1, 2, 3))):
            words = (*command.words, *force, *(resume if again else ()))
            self._kill(words, case, random.uniform(0, LATE * known.seconds))
            left = self._left(case, command, known, old)
            assert self._others(case, command) == others, "another file has changed"
        self._next(case, command, known, resume)
        assert self._others(case, command) == others, "another file has changed"
        rest = [path.name for path in case.iterdir() if path.name.endswith(REMAINS)]
        assert not rest, f"remains: {rest}"
        return command.name, f"{left}{' (over an old one)' if old else ''}"

    @staticmethod
    def _old(random: Random, case: Path, command: Command) -> dict[str, str]:
        """Put an older output in its place, half of the time."""
        if random.random() < 0.5:
            return {}
        for name in command.outputs:
            place = case / name
            if "." not in name:
                place.mkdir()
                place = place / "older"
            # A file beside the output that no run wrote is never replaced.
            place.write_text(f"{MARK}\n" if place.suffix == ".toml" else "older")
        return {name: digest(case / name) for name in command.outputs}

    @staticmethod
    def _others(case: Path, command: Command) -> dict[str, str]:
        """Return what everything holds that is no output and no work in progress."""
        mine = (*command.outputs, *(f".{name}.partial" for name in command.outputs), "__")
        kept = [path for path in case.iterdir() if not path.name.startswith(mine)]
        return {path.name: digest(path) for path in kept}

    @staticmethod
    def _kill(words: tuple[str, ...], case: Path, after: float) -> None:
        child = warm.start(words, case)
        until = time.monotonic() + after
        while time.monotonic() < until:
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            time.sleep(0.0005)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

    @staticmethod
    def _left(case: Path, command: Command, known: Known, old: dict[str, str]) -> str:
        found = set()
        for name in command.outputs:
            state = digest(case / name)
            kinds = {"absent" if not old else "": "absent", old.get(name, ""): "old",
                     known.outputs[name]: "complete"}  # fmt: skip
            assert state in kinds, f"{name} is {state}, neither absent, old nor complete"
            found.add(kinds[state])
        return " and ".join(sorted(found))

    @staticmethod
    def _next(case: Path, command: Command, known: Known, resume: tuple[str, ...]) -> None:
        present = any((case / name).exists() for name in command.outputs)
        force = ("--force",) if present else ()
        ended = warm.run((*command.words, *force, *resume), case)
        assert ended.code == 0, f"the next run: {ended.err}"
        found = {name: digest(case / name) for name in command.outputs}
        assert found == known.outputs, "the next run gives something else"


def main(words: list[str] | None = None) -> int:
    """Run the command line."""
    parser = warm.options(__doc__, count=20)
    parser.add_argument("--only", choices=[one.name for one in COMMANDS])
    chosen = parser.parse_args(words)
    seed, numbers = warm.cases(chosen)
    warm.warm()
    begun, counts, faults = time.monotonic(), Counter[tuple[str, str]](), 0
    with tempfile.TemporaryDirectory(prefix="svftool-kills-") as name:
        kills = Kills(Path(name), seed)
        for number in numbers:
            if time.monotonic() - begun > chosen.seconds:
                break
            command = COMMANDS[number % len(COMMANDS)].name
            if chosen.only not in (None, command):
                continue
            try:
                counts[kills.run(number)] += 1
            except AssertionError as error:
                faults += 1
                counts[command, "FAULT"] += 1
                print(f"{seed}:{number} {command}: {error}", flush=True)
    for (command, outcome), count in sorted(counts.items()):
        print(f"{command:20} {outcome:36} {count:4}")
    print(f"{sum(counts.values())} runs, {faults} faults, {time.monotonic() - begun:.0f} s")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
