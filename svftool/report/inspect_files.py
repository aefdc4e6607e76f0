"""The files that an inspection leaves: spreadsheet, page, figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from svftool.errors import UsageError
from svftool.files.output import replace_output

if TYPE_CHECKING:
    from svftool.auditing import AuditResult, Held
    from svftool.stages.feature_maps import FeatureMaps

FIGURES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Files:
    """Where the files go.

    Attributes
    ----------
    csv, html, plot, directions : Path or None
    force : bool
        Replace existing files.
    inputs : tuple of str
        What is inspected, none of which may be overwritten.
    """

    csv: Path | None
    html: Path | None
    plot: Path | None
    force: bool
    inputs: tuple[str, ...]
    directions: Path | None = None

    @property
    def paths(self) -> tuple[Path | None, ...]:
        """All of them."""
        return self.csv, self.html, self.plot, self.directions

    def check(self) -> None:
        """Find out before any work whether the files can be made.

        Raises
        ------
        UsageError
            For an unknown suffix, or a file that exists.
        MissingDependencyError
            If a page or a figure needs a package that is not installed.
        """
        if self.plot is not None:
            _check_figure(self.plot)
        if self.html is not None:
            from svftool.report.drawing import require_jinja

            require_jinja()
        for path in self.paths:
            _check_new(path, self.force)

    def write(self, result: AuditResult, held: Sequence[Held]) -> None:
        """Write what was asked for, each file complete or not at all."""
        inputs = [Path(one) for one in self.inputs]
        if self.csv is not None:
            from svftool.report.inspect import csv_text

            with replace_output(self.csv, force=self.force, inputs=inputs) as partial:
                partial.write_text(csv_text(result), encoding="utf-8")
        if self.html is not None:
            from svftool.report.inspect.page import page

            with replace_output(self.html, force=self.force, inputs=inputs) as partial:
                partial.write_text(page(result, held=held), encoding="utf-8")
        if self.plot is not None:
            from svftool.report.inspect.figure import save_figure

            with replace_output(self.plot, force=self.force, inputs=inputs) as partial:
                save_figure(result, partial, kind=self.plot.suffix.lower().lstrip("."))
        if self.directions is not None:
            from svftool.report.inspect.directions import save

            with replace_output(self.directions, force=self.force, inputs=inputs) as partial:
                save(result.comparisons[0], partial)


@dataclass(frozen=True)
class MapsFile:
    """The figure of feature maps.

    Attributes
    ----------
    path : Path or None
        Where it goes; None for none.
    image : Path or None
        What is looked at.
    force : bool
        Replace an existing file.
    inputs : tuple of str
        Factors and tuned file.
    """

    path: Path | None
    image: Path | None
    force: bool
    inputs: tuple[str, ...]

    def check(self) -> None:
        """Find out before any work whether the figure can be made.

        Raises
        ------
        UsageError
            If the image or a tuned file is missing, or the file exists.
        MissingDependencyError
            If matplotlib is not installed.
        """
        if self.path is None:
            if self.image is not None:
                raise UsageError("--image is looked at by --feature-maps alone")
            return
        if self.image is None or len(self.inputs) != 2:
            raise UsageError(
                "--feature-maps needs --image, a factor checkpoint and one tuned file of it"
            )
        _check_figure(self.path)
        _check_new(self.path, self.force)

    def write(self, result: FeatureMaps) -> None:
        """Write the figure that was asked for."""
        if self.path is None or self.image is None:
            return
        from svftool.report.inspect.feature_maps import save_feature_maps

        inputs = [*map(Path, self.inputs), self.image]
        with replace_output(self.path, force=self.force, inputs=inputs) as partial:
            save_feature_maps(result, partial, kind=self.path.suffix.lower().lstrip("."))


def _check_figure(path: Path) -> None:
    if path.suffix.lower() not in FIGURES:
        raise UsageError(f"{path}: suffix {path.suffix!r}, expected {', '.join(FIGURES)}")
    from svftool.report.drawing import require_matplotlib

    require_matplotlib()


def _check_new(path: Path | None, force: bool) -> None:
    if path is not None and path.exists() and not force:
        raise UsageError(
            f"{path}: exists already, expected a new output. Use --force to replace it."
        )
