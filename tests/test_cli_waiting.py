"""The line that says a command has begun: on terminals alone, and gone before anything is shown."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stderr

import pytest
from rich.text import Text

from svftool.cli.common import Display, progress_for, stderr
from svftool.cli.signature import expanded
from svftool.report.demo import document

CLEAR = "\r\x1b[K"


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    terminal = True

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    return Terminal()


def call(stream: Terminal, work: Callable[[Display], None], **flags: object) -> None:
    def command(*, display: Display) -> None:
        work(display)

    with redirect_stderr(stream):
        expanded(command)(**{"json": False, "quiet": False, "verbose": 0, **flags})


def test_it_is_there_before_the_command_works_and_gone_after(terminal: Terminal) -> None:
    seen: list[str] = []
    call(terminal, lambda _: seen.append(terminal.getvalue()))
    assert "starting" in seen[0]
    assert not seen[0].endswith(CLEAR)
    assert terminal.getvalue() == seen[0] + CLEAR


@pytest.mark.parametrize("how", ["note", "warn", "bar", "error", "result", "raise"])
def test_it_goes_before_anything_else_is_shown(terminal: Terminal, how: str) -> None:
    def work(display: Display) -> None:
        progress = progress_for()
        if how == "bar":
            with progress.task("first", total=2) as bar:
                bar.advance()
        elif how == "error":
            stderr().print("first")
        elif how == "result":
            display.emit(document([]), Text("first"))
        elif how == "raise":
            raise KeyError("first")
        else:
            getattr(progress, how)("first")

    if how == "raise":
        with pytest.raises(KeyError):
            call(terminal, work)
        assert terminal.getvalue().endswith(CLEAR)
        return
    call(terminal, work)
    shown = terminal.getvalue()
    assert shown.count("starting") == 1
    after = shown.partition("starting")[2]
    assert CLEAR in after
    assert after.index(CLEAR) < (len(after) if how == "result" else after.index("first"))


@pytest.mark.parametrize("how", ["quiet", "pipe", "dumb", "rank"])
def test_elsewhere_there_is_none(
    terminal: Terminal, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal.terminal = how != "pipe"
    if how == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    if how == "rank":
        monkeypatch.setenv("RANK", "1")
    call(terminal, lambda _: None, quiet=how == "quiet")
    assert terminal.getvalue() == ""
