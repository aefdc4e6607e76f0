"""What the documentation shows exists: every command, and every command line parses."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from svftool.cli import app

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def command_lines(text: str) -> list[str]:
    """Find the svftool command lines in shell blocks, continued lines joined."""
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", text, re.S)
    lines = re.sub(r"\\\n\s*", "", "\n".join(blocks)).splitlines()
    found = [line.strip().removeprefix("$ ") for line in lines]
    return [line for line in found if line.startswith("svftool ")]


CONFIGURATION = Path(__file__).with_name("run.toml")


def parse(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    words = words[: words.index(">")] if ">" in words else words
    if "--config" in words:
        # A file that is read as the words are parsed: one of the kind that a run writes.
        words[words.index("--config") + 1] = str(CONFIGURATION)
    if words and words[0] in COMMANDS and "--help" not in words:
        COMMANDS[words[0]].make_context(words[0], words[1:])
    else:
        assert words[0] in ("--help", "--version") or "--help" in words, line


def test_the_parser_can_fail() -> None:
    with pytest.raises(Exception, match="no-such-option"):
        parse("svftool merge factors --no-such-option -o x")
    with pytest.raises(AssertionError):
        parse("svftool sing")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_an_example_that_parses(name: str) -> None:
    result = CliRunner().invoke(app, [name, "--help"])
    assert result.exit_code == 0
    command = COMMANDS[name]
    assert command.help
    assert command.epilog.startswith("Example: svftool ")
    parse(command.epilog.removeprefix("Example: "))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_in_the_readme(name: str) -> None:
    assert f"svftool {name}" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_line_in_the_documentation_parses(page: Path) -> None:
    for line in command_lines(page.read_text()):
        parse(line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
