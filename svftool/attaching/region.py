"""Where a tensor of the file lies in a live parameter, and which names are svftool's own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

PREFIX = "svf_"
"""A parameter ``weight`` has its `AttachedWeight` beside it as submodule ``svf_weight``."""


@dataclass(frozen=True)
class Region:
    """Where a tensor of the file lies in a live parameter, as a strided view of it.

    Attributes
    ----------
    offset : int
        Elements before the first.
    shape : tuple of int or None
        Of the view, which is the file's tensor; None for the whole parameter as it stands.
    stride : tuple of int
        Elements from one index to the next, in each dimension.
    """

    offset: int = 0
    shape: tuple[int, ...] | None = None
    stride: tuple[int, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether the live parameter is the file's tensor as it stands."""
        return self.shape is None

    def of(self, live: Tensor) -> Tensor:
        """Return the region in the file's layout: a view, if `live` is contiguous."""
        if self.shape is None:
            return live
        dense = live.contiguous()
        return dense.as_strided(self.shape, self.stride, dense.storage_offset() + self.offset)


WHOLE = Region()
"""All of a live parameter, as it stands."""


def is_own(name: str) -> bool:
    """Whether a parameter name is the model's own, not one of svftool's."""
    return f".{PREFIX}" not in f".{name}"
