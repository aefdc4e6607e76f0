"""The progress protocol that the library reports to; the command line draws it."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self


class ProgressTask(Protocol):
    """One stretch of work with a known or unknown end; a context manager."""

    def advance(self, amount: float = 1.0, *, detail: str | None = None) -> None:
        """Report that `amount` more units are done; `detail` replaces the text beside the bar."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class Progress(Protocol):
    """Where long work reports how far it is and what the user should be told."""

    def task(self, description: str, total: float | None = None, *, unit: str = "") -> ProgressTask:
        """Begin a stretch of `total` units of work (None: unknown); `unit` is for display."""

    def note(self, message: str) -> None:
        """Say one sentence aloud, such as a prefix that was found and dropped."""

    def warn(self, message: str) -> None:
        """Say one sentence that the user must not miss."""


class _SilentTask:
    def advance(self, amount: float = 1.0, *, detail: str | None = None) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass


class Silent:
    """A progress that says nothing."""

    def task(self, description: str, total: float | None = None, *, unit: str = "") -> ProgressTask:
        """Return a task that ignores its reports."""
        return _SilentTask()

    def note(self, message: str) -> None:
        """Ignore the message."""

    def warn(self, message: str) -> None:
        """Ignore the message."""


SILENT: Progress = Silent()
