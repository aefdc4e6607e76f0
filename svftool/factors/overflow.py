"""Rounding of merged values, once: what is not finite is refused, what overflows may be clipped."""

from __future__ import annotations

import torch
from torch import Tensor

from svftool.checkpoints import TensorInfo, dtype_name
from svftool.checkpoints.selection import table_role
from svftool.errors import NumericalError
from svftool.numerics.rounding import beyond, round_once


class Rounding:
    """Rounds what was merged to the dtype that it is stored in.

    Parameters
    ----------
    allow_overflow : bool
        Clip values that the dtype cannot hold, instead of refusing them.

    Attributes
    ----------
    clipped : dict of str to int
        How many values were clipped, by tensor.
    """

    def __init__(self, *, allow_overflow: bool) -> None:
        self.allow_overflow = allow_overflow
        self.clipped: dict[str, int] = {}

    def round(
        self, info: TensorInfo, values: Tensor, dtype: torch.dtype, start: Tensor | None = None
    ) -> Tensor:
        """Round float64 values once.

        Parameters
        ----------
        info : TensorInfo
            Of the tensor; its name tells whether it may hold infinity.
        values : Tensor
            float64.
        dtype : torch.dtype
        start : Tensor, optional
            Values of the base: what was not finite there may stay so.

        Raises
        ------
        NumericalError
            If a value becomes NaN or infinite, or the dtype cannot hold it.
        """
        nan, over = values.isnan(), beyond(values, dtype) | values.isinf()
        if start is not None:
            # A mask may hold infinity, and stays as it is.
            same = (values == start) | (values.isnan() & start.isnan())
            nan, over = nan & ~same, over & ~same
        elif table_role(info) == "attention mask":
            over &= ~values.isinf()
        count = int(over.sum())
        if count and self.allow_overflow:
            limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
            values = torch.where(over, values.clamp(limits.min, limits.max), values)
        self.judge(info.name, int(nan.sum()), count, dtype)
        return round_once(values, dtype)

    def judge(self, name: str, undefined: int, overflow: int, dtype: torch.dtype) -> None:
        """Refuse what would be written not finite; note what was clipped.

        Raises
        ------
        NumericalError
        """
        if undefined:
            raise NumericalError(
                f"tensor {name!r}: {undefined} values would be NaN, expected finite ones. "
                "Leave out the tuned file that holds them, or give smaller weights."
            )
        if overflow and not self.allow_overflow:
            raise NumericalError(
                f"tensor {name!r}: {overflow} values overflow {dtype_name(dtype)}, expected "
                "finite ones. Give smaller weights, or clip them with --allow-overflow."
            )
        if overflow:
            self.clipped[name] = overflow
