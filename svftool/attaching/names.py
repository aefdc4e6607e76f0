"""The map between tensor names of a file, which are canonical, and parameters of the live model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from svftool.attaching.layer import WHOLE, Region, is_own
from svftool.attaching.transformers_names import transformers_regions

_WRAPPERS = ("", "module.", "model.", "backbone.", "_orig_mod.")
_SAMPLE = 40


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

    def in_file(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Return live tensors as the file holds them, detached.

        A packed tensor comes in the file's pieces, a tied one under every name that the file has
        for it, and one that the file does not have under the name that it would have there.

        Parameters
        ----------
        tensors : iterable of (str, Tensor)
            With their live names; a tied one under each of its names.
        """
        pairs = list(tensors)
        found: dict[str, Tensor] = {}
        placed: set[int] = set()
        by_live: dict[str, list[tuple[str, Region]]] = {}
        for name, placement in self.placements.items():
            by_live.setdefault(placement.live, []).append((name, placement.region))
        for live, value in pairs:
            for name, region in by_live.get(live, ()):
                found[name] = region.of(value.detach()).contiguous()
                placed.add(id(value))
        for live, value in pairs:
            if id(value) not in placed:
                found[self.file_name(live)] = value.detach()
                placed.add(id(value))
        return found

    def places(self, names: Iterable[str]) -> bool:
        """Whether every one of the file's names has a place."""
        return all(name in self.placements for name in names)

    def inside(self, module: str) -> list[str]:
        """Return the file's names of tensors that lie in a module of the model."""
        return [n for n, p in self.placements.items() if p.live.startswith(f"{module}.")]

    def live_names(self, name: str) -> list[str]:
        """Return the live names that a tensor of the file may have, the likeliest first."""
        if name in self.placements:
            return [self.placements[name].live]
        stem = name.removeprefix(self.file_prefix)
        return [self.live_prefix + stem, stem]


def map_names(model: nn.Module, names: Iterable[str]) -> NameMap:
    """Match the file's tensor names with the model's.

    Names may differ by a prefix on either side, and as transformers renames, stacks and
    concatenates tensors on loading.

    Parameters
    ----------
    model : nn.Module
        The live model.
    names : iterable of str
        All tensor names of the file.
    """
    targets = {name: Placement(name) for name in sorted(own_names(model))}
    for name, (live, region) in transformers_regions(model).items():
        targets[name] = Placement(live, region)
    names = list(names)
    best = max(_prefixes(names, list(targets)), key=lambda pair: len(_match(names, targets, *pair)))
    return NameMap(_match(names, targets, *best), *best)


def own_names(model: nn.Module) -> set[str]:
    """Return every name of a parameter or buffer, tied ones under all their names."""
    parameters = (name for name, _ in model.named_parameters(remove_duplicate=False))
    buffers = (name for name, _ in model.named_buffers(remove_duplicate=False))
    return {name for name in (*parameters, *buffers) if is_own(name)}


def _prefixes(names: list[str], targets: list[str]) -> list[tuple[str, str]]:
    """List pairs of prefixes to try: the usual wrappers, and what some pair of names differs by."""
    file_side, live_side = dict.fromkeys(_WRAPPERS), dict.fromkeys(_WRAPPERS)
    for name in names[:_SAMPLE]:
        for target in targets:
            if target.endswith(f".{name}"):
                live_side[target.removesuffix(name)] = None
            elif name.endswith(f".{target}"):
                file_side[name.removesuffix(target)] = None
    return [(f, m) for f in file_side for m in live_side]


def _match(
    names: list[str], targets: Mapping[str, Placement], file_prefix: str, live_prefix: str
) -> dict[str, Placement]:
    found = {}
    for name in names:
        if name.startswith(file_prefix):
            target = targets.get(live_prefix + name.removeprefix(file_prefix))
            if target is not None:
                found[name] = target
    return found
