"""Help: the options that most need, those of a task on request, all of them on request."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from svftool.cli import NAMES, app


def text_of(*words: str) -> str:
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, list(words))
    assert result.exit_code == 0, result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 80
    return result.stdout


def flags(text: str) -> set[str]:
    rows = [row.strip() for row in text.splitlines() if row.startswith("  -")]
    return {word.rstrip(",") for row in rows for word in row.split()[:2] if word[:2] == "--"}


def test_the_command_line_says_what_each_command_does_in_full() -> None:
    text = text_of("--help")
    assert all(f"  {name} " in text for name in NAMES)
    assert "..." not in text.partition("Options")[0].partition("Commands")[2]


def test_finetune_shows_ten_options_and_says_how_to_see_the_others() -> None:
    few, every = flags(text_of("finetune", "--help")), flags(text_of("finetune", "--help-all"))
    assert len(few - {"--help"}) == 10
    assert few < every
    assert {"--resume", "--fold", "--sequence-length"} <= every
    assert "--help-all" in text_of("finetune", "--help")


@pytest.mark.parametrize("words", [("--task", "language"), ("--task=language",)])
def test_a_task_adds_its_own_options(words: tuple[str, ...]) -> None:
    found = flags(text_of("finetune", *words, "--help"))
    assert "--sequence-length" in found
    assert "--fold" not in found


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name not in ("finetune", "evaluate", "merge")]
)
def test_other_commands_show_all(name: str) -> None:
    assert flags(text_of(name, "--help")) == flags(text_of(name, "--help-all"))
