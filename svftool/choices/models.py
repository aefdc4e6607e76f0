"""How a model is named on the command line."""

from __future__ import annotations

from svftool.errors import ModelError

FORMS = "'auto', 'timm:NAME', 'torchvision:NAME', 'FILE.py:FACTORY' or 'package.module:FACTORY'"
AUTO = "auto"


def read_model(spec: str) -> tuple[str, str]:
    """Split the name of a model into where it is from and what it is called there.

    Raises
    ------
    ModelError
        If it has none of the forms.

    Examples
    --------
    >>> read_model("timm:resnet50"), read_model("net.py:build"), read_model("auto")
    (('timm', 'resnet50'), ('net.py', 'build'), ('auto', ''))
    """
    if spec == AUTO:
        return spec, ""
    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise ModelError(f"model {spec!r}, expected {FORMS}.")
    return source, name
