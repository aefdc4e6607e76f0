"""In which way two tensors can be held against each other: as numbers, as bytes, or not at all.

Packed and quantised values are codes. What a code stands for depends on scales and tables beside
it, so codes are never read as numbers; two sides of one dtype are compared byte for byte.
"""

from __future__ import annotations

from typing import Literal

from svftool.auditing.results import Unread
from svftool.checkpoints import Selection, TensorInfo, dtype_name, matches
from svftool.checkpoints.dtypes import DECOMPOSABLE, FLOAT8
from svftool.checkpoints.selection import QUANTISATION, table_role

Way = Literal["matrix", "values", "bytes"]

_FLOATS = DECOMPOSABLE - FLOAT8


def is_number(info: TensorInfo) -> bool:
    """Whether a tensor holds floating numbers as they are."""
    return info.layout == "dense" and info.dtype in _FLOATS


def is_count(info: TensorInfo) -> bool:
    """Whether a tensor counts or flags: steps, positions; a single byte an entry may be a code."""
    dtype = info.dtype
    plain = info.layout == "dense" and len(info.shape) < 2 and not dtype.is_complex
    counts = not dtype.is_floating_point and (dtype.itemsize > 1 or dtype_name(dtype) == "bool")
    return plain and counts and table_role(info) != QUANTISATION


def way_to_compare(base: TensorInfo, tuned: TensorInfo, *, matrix: bool) -> Way | str:
    """Say how two tensors of one shape are compared.

    Parameters
    ----------
    base, tuned : TensorInfo
    matrix : bool
        Whether the base's is a matrix by its shape.

    Returns
    -------
    str
        A way; or, where there is none, the reason.
    """
    if is_number(base) and is_number(tuned):
        return "matrix" if matrix else "values"
    both = all(is_number(one) or is_count(one) for one in (base, tuned))
    if both and (is_count(base) == is_count(tuned) or not base.shape):
        return "values"
    if (base.dtype, base.layout) == (tuned.dtype, tuned.layout):
        return "bytes"
    kinds = (_kind(base), _kind(tuned))
    return f"{kinds[0]} in the base, {kinds[1]} in the fine-tune: not comparable"


def _kind(info: TensorInfo) -> str:
    layout = "" if info.layout == "dense" else f"{info.layout} "
    return layout + dtype_name(info.dtype)


def way_to_change(base: TensorInfo, *, matrix: bool) -> Way | str:
    """Say how a tensor is compared with its sum with a change, as of an adapter."""
    if is_number(base):
        return "matrix" if matrix else "values"
    return f"{_kind(base)} in the base: codes, to which the change cannot be added"


def asked_for(name: str, selection: Selection) -> Unread | None:
    """Return what says that the user's patterns leave a tensor out; None where they do not."""
    excluded = matches(name, selection.exclude)
    if excluded is not None:
        return Unread(name, f"excluded by --exclude {excluded}", wanted=False)
    if selection.include and not matches(name, selection.include):
        return Unread(name, "not matched by --include", wanted=False)
    return None
