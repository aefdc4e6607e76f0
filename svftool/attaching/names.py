"""The map between tensor names of a file, which are canonical, and parameters of the live model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from svftool.attaching.layer import WHOLE, Region

PREFIXES = ("module.", "model.", "backbone.", "_orig_mod.")
"""Prefixes that wrappers put before every name, on either side."""


@dataclass(frozen=True)
class Placement:
    """Where a tensor of the file lives in the model.

    Attributes
    ----------
    live : str
        Name of the live parameter or buffer.
    region : Region
        The part of it that the tensor is.
    """

    live: str
    region: Region = WHOLE


@dataclass(frozen=True)
class NameMap:
    """Placements by the file's tensor names, and the way back.

    Attributes
    ----------
    placements : mapping of str to Placement
        By tensor name of the file; names without a place in the model are not in it.
    file_prefix, live_prefix : str
        What each side puts before the names that they share.
    """

    placements: Mapping[str, Placement]
    file_prefix: str = ""
    live_prefix: str = ""

    def file_name(self, live: str) -> str:
        """Return the file's name of a live tensor, also of one that the file does not have."""
        for name, placement in self.placements.items():
            if placement.live == live and placement.region.whole:
                return name
        return self.file_prefix + live.removeprefix(self.live_prefix)

    def inside(self, module: str) -> list[str]:
        """Return the file's names of tensors that lie in a module of the model."""
        return [n for n, p in self.placements.items() if p.live.startswith(f"{module}.")]

    def live_name(self, name: str) -> str:
        """Return the live name of a tensor of the file, also of one that is new."""
        if name in self.placements:
            return self.placements[name].live
        return self.live_prefix + name.removeprefix(self.file_prefix)


def map_names(model: nn.Module, names: Iterable[str]) -> NameMap:
    """Match the file's tensor names with the model's, up to a prefix on either side.

    Parameters
    ----------
    model : nn.Module
        The live model.
    names : iterable of str
        All tensor names of the file.
    """
    live = live_names(model)
    names = list(names)
    prefixes = ("", *PREFIXES)
    best = max(
        ((f, m) for f in prefixes for m in prefixes),
        key=lambda pair: len(_match(names, live, *pair)),
    )
    return NameMap(_match(names, live, *best), *best)


def live_names(model: nn.Module) -> set[str]:
    """Return every name of a parameter or buffer, tied ones under all their names."""
    parameters = (name for name, _ in model.named_parameters(remove_duplicate=False))
    buffers = (name for name, _ in model.named_buffers(remove_duplicate=False))
    return {name for name in (*parameters, *buffers) if ".svf_" not in f".{name}"}


def _match(
    names: list[str], live: set[str], file_prefix: str, live_prefix: str
) -> dict[str, Placement]:
    found = {}
    for name in names:
        if name.startswith(file_prefix):
            target = live_prefix + name.removeprefix(file_prefix)
            if target in live:
                found[name] = Placement(target)
    return found
