"""Ctrl-C and SIGTERM during training: finish the step, keep what was trained, stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Context in which the first Ctrl-C or SIGTERM is noted instead of raised.

    A second one acts as it would have outside. In threads other than the main one, where Python
    allows no handlers, signals keep their meaning.

    Parameters
    ----------
    patient : bool
        Note every signal: a launcher passes on what the terminal has sent already, and ends by
        force what takes too long.

    Attributes
    ----------
    signum : int or None
        The signal that came, if any.
    """

    def __init__(self, *, patient: bool = False) -> None:
        self._patient = patient
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def came(self) -> bool:
        """Whether a signal has come."""
        return self.signum is not None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum if self.signum is None else self.signum
        if not self._patient:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
