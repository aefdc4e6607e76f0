"""stdout and stderr that outlast their readers: a closed pipe, a full disk, a narrow encoding."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from svftool.errors import ResourceError


class _Sink(io.FileIO):
    """A descriptor whose writes never fail: what nobody takes is dropped, and why is kept.

    The work goes on, so that its files are written and the exit code says how it went.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self.failure: OSError | None = None

    def write(self, data: object) -> int:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        done = 0
        while self.failure is None and done < len(view):
            try:
                count = super().write(view[done:])
                if count is None:  # somebody made the descriptor non-blocking
                    select.select([], [self], [])
                done += count or 0
            except OSError as error:
                self.failure = error
        return len(view)


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Replace stdout and stderr for the length of a command.

    Raises
    ------
    ResourceError
        At the end of a command that was all right, if the disk did not take its result. A reader
        that has gone (``| head``) is no error.
    """
    before = sys.stdout, sys.stderr
    out, sys.stdout = _lasting(sys.stdout)
    err, sys.stderr = _lasting(sys.stderr)
    code: object = 0
    try:
        try:
            yield
        except SystemExit as end:
            code = end.code
        sys.stdout.flush()
        _check(out, code)
        sys.exit(code)  # type: ignore[arg-type]
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        if out is None and err is None:
            sys.stdout, sys.stderr = before


def _check(out: _Sink | None, code: object) -> None:
    failure = None if out is None else out.failure
    if failure is not None and failure.errno != errno.EPIPE and not code:
        raise ResourceError(
            f"stdout: the result could not be printed ({failure.strerror or failure}), expected "
            "a place that takes it. What the command writes is complete; print elsewhere."
        ) from failure


def _lasting(stream: TextIO | None) -> tuple[_Sink | None, TextIO]:
    if stream is None:  # closed by whoever started the command
        return None, open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123
    try:
        sink = _Sink(stream.fileno())
        stream.flush()
    except (OSError, ValueError):
        return None, stream
    if os.name == "nt":  # the console takes text through a stream of its own
        return None, stream
    line = sink.isatty() or stream is sys.stderr
    encoding = stream.encoding or "utf-8"
    # A character that the encoding lacks becomes its escape, never an error after the work.
    return sink, io.TextIOWrapper(
        io.BufferedWriter(sink), encoding, "backslashreplace", line_buffering=line
    )


def encodable(text: str) -> str:
    r"""Return a JSON text that stdout can take: other characters become the escapes of JSON.

    Examples
    --------
    >>> encodable('{"a": "\udcff"}')
    '{"a": "\\udcff"}'
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        raw = text.encode("utf-16-be", "surrogatepass")
        units = [int.from_bytes(raw[at : at + 2]) for at in range(0, len(raw), 2)]
        return "".join(chr(one) if one < 0x80 else f"\\u{one:04x}" for one in units)
    return text
