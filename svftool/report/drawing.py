"""What every figure and page share: the optional packages, and how a figure is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from svftool.errors import MissingDependencyError
from svftool.report.text import safe

SAME_BYTES: Mapping[str, str] = {"svg.hashsalt": "svftool", "svg.fonttype": "none"}
"""Settings under which a figure is the same bytes each time, its words left words."""

PLAIN_AXES: Mapping[str, Any] = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    **SAME_BYTES,
}
"""Settings of figures with axes."""

_METADATA: Mapping[str, Mapping[str, None]] = {
    "svg": dict.fromkeys(("Date", "Creator", "Format", "Type")),
    "pdf": {"CreationDate": None},
    "png": {},
}
"""No dates and no addresses in the file."""


def require_jinja() -> ModuleType:
    """Import jinja2.

    Raises
    ------
    MissingDependencyError
        If it is not installed.
    """
    try:
        import jinja2
    except ImportError:
        raise MissingDependencyError("jinja2", extra="report", purpose="a page") from None
    return jinja2


def require_matplotlib() -> ModuleType:
    """Import matplotlib, drawing to files only.

    Raises
    ------
    MissingDependencyError
        If it is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise MissingDependencyError("matplotlib", extra="report", purpose="a figure") from None
    mpl.use("Agg")
    return mpl


def save(figure: Any, path: Path | IO[bytes], *, kind: str, dpi: int = 200, **options: Any) -> None:
    """Write a figure; the same one gives the same bytes.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
    path : Path or binary stream
        Where to write.
    kind : {"png", "svg", "pdf"}
    dpi : int
        Of a png.
    **options
        Others of ``savefig``.
    """
    figure.savefig(path, format=kind, dpi=dpi, metadata=_METADATA[kind], **options)


def plain(text: str) -> str:
    """Keep matplotlib from reading a name as mathematics."""
    return safe(text).replace("$", r"\$")
