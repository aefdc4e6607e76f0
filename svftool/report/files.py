"""Write a report's text to a file, complete or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from svftool.checkpoints import replace_output


def write_text(path: Path, text: str, *, force: bool, inputs: Sequence[Path]) -> None:
    """Write a text file.

    Raises
    ------
    UsageError
        If it exists and may not be replaced, or is an input.
    ResourceError
        If the disk refuses it.
    """
    with replace_output(path, force=force, inputs=inputs) as partial:
        partial.write_text(text, encoding="utf-8")
