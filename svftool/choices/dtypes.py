"""The dtypes that numbers are written in."""

from __future__ import annotations

from typing import Literal, get_args

from svftool.errors import UsageError, no_such

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[str, ...] = get_args(Dtype)


def check_dtype(name: str) -> None:
    """Refuse the name of any other dtype.

    Raises
    ------
    UsageError
        With the name that was probably meant.
    """
    if name not in DTYPES:
        raise UsageError(no_such("--dtype", name, DTYPES))
