"""Run the README's lines where `make demo` left its files, and write what they print.

    python docs/transcript.py FOLDER > docs/transcript.md

FOLDER holds ``demo/``. The lines run in the order of the page; outputs go to ``FOLDER/mine``.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from typer.testing import CliRunner

from svftool.cli import app

README = Path(__file__).resolve().parents[1] / "README.md"
COLUMNS = 80
HEAD = """# The README's commands, as they ran

After `make demo` in a fresh clone; made by `docs/transcript.py`. Times vary.
"""
_BLOCK = re.compile(r"```bash\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)


@dataclass(frozen=True)
class Line:
    """One command line of the README, and the output that stands below it."""

    command: str
    shown: str


@dataclass(frozen=True)
class Ran:
    """What became of a line."""

    line: Line
    exit_code: int
    output: str


def lines(page: str) -> Iterator[Line]:
    """Yield the lines that call svftool; an output belongs to the last line of its block."""
    for block, shown in _BLOCK.findall(page):
        commands = re.sub(r"\\\n\s*", "", block).splitlines()
        calls = [one for one in commands if one.startswith("svftool ")]
        for one in calls:
            yield Line(one, shown if one is calls[-1] else "")


def run_all(folder: Path) -> Iterator[Ran]:
    """Run the README's lines in `folder`, one after another."""
    runner = CliRunner(env={"COLUMNS": str(COLUMNS)})
    with contextlib.chdir(folder):
        for line in lines(README.read_text(encoding="utf-8")):
            result = runner.invoke(app, shlex.split(line.command)[1:])
            yield Ran(line, result.exit_code, result.stdout or result.stderr)


def main() -> None:
    """Print the transcript as Markdown."""
    os.environ["COLUMNS"] = str(COLUMNS)
    sys.stdout.write(HEAD)
    for one in run_all(Path(sys.argv[1])):
        output = "\n".join(row.rstrip() for row in one.output.rstrip().splitlines())
        sys.stdout.write(f"\n```console\n$ {one.line.command}\n{output}\n```\n")
        sys.stdout.write(f"\nExit code {one.exit_code}.\n")


if __name__ == "__main__":
    main()
