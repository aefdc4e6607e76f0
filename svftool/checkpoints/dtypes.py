"""Names of dtypes: torch's own, and the codes of the safetensors format."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from svftool.errors import CheckpointError
from svftool.files.header import DTYPES

DTYPE_OF_CODE: dict[str, torch.dtype] = {
    code: getattr(torch, name) for code, (name, _) in DTYPES.items() if hasattr(torch, name)
}
CODE_OF_DTYPE: dict[torch.dtype, str] = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}

FLOAT8 = frozenset(
    dtype for code, dtype in DTYPE_OF_CODE.items() if code.startswith(("F8_E4", "F8_E5"))
)
"""Quarter-precision dtypes whose values are numbers; the others (E8M0, F4) are scales and packs."""

DECOMPOSABLE = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16}) | FLOAT8
"""Dtypes whose values can be upcast exactly, and so be decomposed."""

# Two values share a byte; safetensors counts values, torch counts bytes.
_PACKED = "F4"


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without torch's prefix.

    Examples
    --------
    >>> dtype_name(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """Return the dtype that `dtype_name` calls `name`.

    Raises
    ------
    ValueError
        If torch has no dtype of that name.

    Examples
    --------
    >>> dtype_named("float8_e4m3fn")
    torch.float8_e4m3fn
    """
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is not the name of a dtype")  # noqa: TRY004
    return found


def stored_shape(dtype: torch.dtype, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape that a safetensors header states for a tensor of torch's `shape`."""
    if CODE_OF_DTYPE.get(dtype) == _PACKED and shape:
        return (*shape[:-1], 2 * shape[-1])
    return tuple(shape)


def code_of(name: str, dtype: torch.dtype) -> str:
    """Return the code that a safetensors header has for the dtype of tensor `name`.

    Raises
    ------
    CheckpointError
        If the format has none.
    """
    if dtype not in CODE_OF_DTYPE:
        raise CheckpointError(
            f"{name}: the dtype is {dtype}, expected one that safetensors can hold. "
            "Write a .pth file instead, or leave the tensor out."
        )
    return CODE_OF_DTYPE[dtype]


def torch_shape(code: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Return torch's shape for a header's `shape`: the inverse of `stored_shape`.

    Raises
    ------
    ValueError
        If values packed two to a byte do not fill the last dimension's bytes.
    """
    if code != _PACKED:
        return tuple(shape)
    if not shape or shape[-1] % 2:
        raise ValueError(f"shape {list(shape)} does not fill whole bytes")
    return (*shape[:-1], shape[-1] // 2)


def byte_size(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Return the bytes that the values of a dense tensor take."""
    return math.prod(shape) * dtype.itemsize
