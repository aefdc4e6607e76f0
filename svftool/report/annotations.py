"""Where gates are told of beside the result: GitHub's page of a run, and a file in JUnit's XML."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from svftool.errors import UsageError, no_such
from svftool.files.output import replace_output

if TYPE_CHECKING:
    from svftool.auditing import Held

KINDS = ("github", "junit")
JUNIT_FILE = "svftool-junit.xml"


@dataclass(frozen=True)
class Annotations:
    """Who is told.

    Attributes
    ----------
    github : bool
        Whether workflow commands are printed.
    junit : Path or None
        The file that is written.
    force : bool
        Replace an existing file.
    inputs : tuple of str
        What is inspected, none of which may be overwritten.
    """

    github: bool = False
    junit: Path | None = None
    force: bool = False
    inputs: tuple[str, ...] = ()

    @classmethod
    def read(cls, texts: Iterable[str], *, force: bool, inputs: Iterable[str]) -> Annotations:
        """Read ``github``, ``junit`` or ``junit=FILE``, before any work.

        Raises
        ------
        UsageError
            For another kind, or a file that exists.
        """
        said, path = False, None
        for text in texts:
            kind, separator, file = text.partition("=")
            if kind not in KINDS:
                raise UsageError(no_such("--annotate", kind, KINDS))
            if kind == "junit":
                path = Path(file or JUNIT_FILE)
            elif separator:
                raise UsageError(f"--annotate {text!r}: github takes no file, expected 'github'.")
            said = said or kind == "github"
        if path is not None and path.exists() and not force:
            raise UsageError(
                f"{path}: exists already, expected a new output. Use --force to replace it."
            )
        return cls(said, path, force, tuple(inputs))

    def write(self, held: Sequence[Held], *, seconds: float) -> None:
        """Write the file."""
        if self.junit is not None:
            from svftool.report.inspect.gates import junit

            inputs = [Path(one) for one in self.inputs]
            with replace_output(self.junit, force=self.force, inputs=inputs) as partial:
                partial.write_text(junit(held, seconds=seconds), encoding="utf-8")

    def say(self, held: Sequence[Held]) -> None:
        """Print the workflow commands, on stderr: stdout may be a document."""
        if self.github and held:
            from svftool.report.inspect.gates import github

            sys.stderr.write(github(held) + "\n")
