"""The files that ``svftool finetune --report`` and ``--plot`` leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from svftool.checkpoints import replace_output
from svftool.errors import UsageError
from svftool.files.output import overlap
from svftool.training.results import FinetuneResult

FIGURES = (".png", ".svg", ".pdf")
SUFFIXES = (".html", *FIGURES)


@dataclass(frozen=True)
class ReportFile:
    """Where the report goes.

    Attributes
    ----------
    path : Path
        The file, whose suffix says what it is.
    force : bool
        Replace an existing file.
    apart : sequence of Path
        Inputs and output of the training, which the report may not touch.
    curve : bool
        Quality against trained numbers alone, as a figure.
    """

    path: Path
    force: bool
    apart: Sequence[Path]
    curve: bool = False

    def check(self) -> None:
        """Find out before training whether the file can be made.

        Raises
        ------
        UsageError
            For an unknown suffix, a file that exists, or one inside an input or the output.
        MissingDependencyError
            If a package that draws is not installed.
        """
        suffixes = FIGURES if self.curve else SUFFIXES
        if self.path.suffix.lower() not in suffixes:
            raise UsageError(
                f"{self.path}: suffix {self.path.suffix!r}, expected {', '.join(suffixes)}"
            )
        for other in self.apart:
            relation = overlap(self.path, other)
            if relation:
                raise UsageError(
                    f"{self.path}: the report is {relation} {other}, expected a place apart. "
                    "Choose another file."
                )
        if self.path.is_dir() or (self.path.exists() and not self.force):
            raise UsageError(
                f"{self.path}: exists already, expected a new file. Use --force to replace a file."
            )
        self._require_packages()

    def _require_packages(self) -> None:
        from svftool.report.drawing import require_jinja, require_matplotlib

        require_matplotlib()
        if self._kind == "html":
            require_jinja()

    @property
    def _kind(self) -> str:
        return self.path.suffix.lower().lstrip(".")

    def write(self, result: FinetuneResult) -> None:
        """Write what was asked for, complete or not at all.

        Raises
        ------
        ResourceError
            If the disk refuses it.
        """
        from svftool.report.training.curve import save_curve
        from svftool.report.training.figure import save_figure
        from svftool.report.training.page import page

        with replace_output(self.path, force=self.force, inputs=self.apart) as partial:
            if self._kind == "html":
                partial.write_text(page(result), encoding="utf-8")
            elif self.curve:
                save_curve(result, partial, kind=self._kind)
            else:
                save_figure(result, partial, kind=self._kind)
