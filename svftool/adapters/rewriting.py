"""Write an adapter again in its own layout: the same keys, other matrices.

Nothing is renamed, so no base is needed; what is no pair of matrices is copied.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from svftool.adapters.adapter import Adapter
from svftool.adapters.layout_file import AdapterFile
from svftool.adapters.low_rank import LowRank
from svftool.adapters.peft import STEM, LoraFolder
from svftool.adapters.writers import MADE_KEY, Entries, alpha_of, kohya_metadata

Ranks = Mapping[str, LowRank]
"""Layers as they are written, by name; their shapes and scales count."""


class Rewriter(ABC):
    """What writes an adapter under its own keys.

    Attributes
    ----------
    adapter : Adapter
    pairs : tuple of str
        Keys of `Adapter.layers` that are written anew.
    """

    weights_file: str | None = None

    def __init__(self, adapter: Adapter, pairs: Collection[str]) -> None:
        self.adapter = adapter
        self.pairs = tuple(pairs)

    @abstractmethod
    def keys(self, name: str) -> Collection[str]:
        """Return the tensors of the file that a layer consists of."""

    @abstractmethod
    def has_scale(self, name: str) -> bool:
        """Whether the scale of a layer is stored."""

    @abstractmethod
    def entries(self, layer: LowRank) -> Entries:
        """Return the entries of a layer."""

    def shown(self, name: str) -> str:
        """Return a layer's name for people."""
        return name

    @abstractmethod
    def metadata(self, layers: Ranks, about: str) -> dict[str, str]:
        """Return what the metadata get beside those of the adapter."""

    def config(self, layers: Ranks) -> dict[str, Any] | None:
        """Return what stands beside the weights."""
        return None

    def rest(self, held: Collection[str], dtype: torch.dtype | None) -> Iterator[Entries]:
        """Yield everything else of the file.

        Parameters
        ----------
        held : collection of str
            All its keys.
        dtype : torch.dtype, optional
            What floating numbers are stored in.
        """
        taken = {key for name in self.pairs for key in self.keys(name)}
        for key in held:
            if key not in taken:
                value = self.adapter.read(key)
                narrow = dtype is not None and value.is_floating_point()
                yield {key: value.to(dtype) if narrow else value}


class FileRewriter(Rewriter):
    """Of kohya's, ComfyUI's and diffusers' layouts."""

    adapter: AdapterFile

    def keys(self, name: str) -> Collection[str]:
        """Return the tensors of a layer; what changes its bias stays for itself."""
        return [key for role, key in self.adapter.layers[name].keys.items() if role != "diff_b"]

    def has_scale(self, name: str) -> bool:
        """Whether there is an alpha; kohya's layout always has one."""
        return "alpha" in self.adapter.layers[name].keys or self.adapter.layout == "kohya"

    def shown(self, name: str) -> str:
        """Return the module as the file names it."""
        return str(self.adapter.layers[name].module)

    def entries(self, layer: LowRank) -> Entries:
        """Return both matrices, alpha, and the change of the bias that is scaled along."""
        old = self.adapter.layers[layer.name]
        letters = self.adapter.layout == "diffusers"
        down, up = ("lora_A", "lora_B") if letters else ("lora_down", "lora_up")
        shape = self.adapter.shape(layer.name)
        window = (1,) * (len(shape) - 2)
        found = {
            old.keys.get("down", f"{old.module}.{down}.weight"): layer.A.reshape(
                layer.rank, *shape[1:]
            ),
            old.keys.get("up", f"{old.module}.{up}.weight"): layer.B.reshape(
                *layer.B.shape, *window
            ),
        }
        if self.has_scale(layer.name):
            found[old.keys.get("alpha", f"{old.module}.alpha")] = alpha_of(layer)
        if "up_bias" in old.keys:
            key = old.keys["up_bias"]
            bias = self.adapter.read(key)
            found[key] = (bias.double() * (old.scale / layer.scale)).to(bias.dtype)
        return found

    def metadata(self, layers: Ranks, about: str) -> dict[str, str]:
        """Return what the layout's programs look for."""
        if self.adapter.layout == "kohya":
            return kohya_metadata({one.rank: one.scale for one in layers.values()}, about)
        return {MADE_KEY: about}


class FolderRewriter(Rewriter):
    """Of PEFT's layout."""

    adapter: LoraFolder
    weights_file = f"{STEM}.safetensors"

    def keys(self, name: str) -> Collection[str]:
        """Return both matrices, and the change of the bias that is scaled along."""
        layer = self.adapter.layers[name]
        bias = self._bias(name)
        return [layer.down, layer.up, *([] if bias is None else [bias])]

    def has_scale(self, name: str) -> bool:
        """Whether alpha is stored, which it is in the configuration."""
        return True

    def entries(self, layer: LowRank) -> Entries:
        """Return both matrices the way round that the folder has them."""
        old = self.adapter.layers[layer.name]
        B, A = layer.B, layer.A
        if old.embedding or bool(self.adapter.config.get("fan_in_fan_out")):
            B, A = A.mT, B.mT
        window = self.adapter.info(old.down).shape[1:]
        ones = (1,) * (len(window) - 1)
        found = {old.down: A.reshape(layer.rank, *window), old.up: B.reshape(*B.shape, *ones)}
        bias = self._bias(layer.name)
        if bias is not None:
            value = self.adapter.read(bias)
            found[bias] = (value.double() * (old.scaling / layer.scale)).to(value.dtype)
        return {key: value.contiguous() for key, value in found.items()}

    def metadata(self, layers: Ranks, about: str) -> dict[str, str]:
        """Return what was done."""
        return {MADE_KEY: about}

    def config(self, layers: Ranks) -> dict[str, Any]:
        """Return the folder's configuration with the new ranks."""
        found = dict(self.adapter.config)
        old = self.adapter.layers
        if all(
            layer.rank == old[name].rank and layer.scale == old[name].scaling
            for name, layer in layers.items()
        ):
            return found
        modules = {name.removesuffix(".weight"): layer for name, layer in layers.items()}
        ranks = {module: layer.rank for module, layer in modules.items()}
        alphas = {module: layer.rank * layer.scale for module, layer in modules.items()}
        found["r"], found["rank_pattern"] = pattern(ranks)
        found["lora_alpha"], found["alpha_pattern"] = pattern(alphas)
        found["use_rslora"] = False
        return found

    def _bias(self, name: str) -> str | None:
        found = self.adapter.biases.get(name.removesuffix("weight") + "bias")
        return None if found is None else found[0]


def pattern(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the commonest value, and the others by a pattern of their module's name.

    PEFT takes the first pattern that ends a module's name, so the longest come first, and one that
    ends the name of another is never left to the common value.
    """
    listed = list(values.values())
    common = max(listed, key=listed.count, default=1)
    tails = {
        module
        for module in values
        if any(one != module and one.endswith(f".{module}") for one in values)
    }
    longer = {one for one in values if any(one.endswith(f".{tail}") for tail in tails)}
    return common, {
        re.escape(module): value
        for module, value in sorted(values.items(), key=lambda one: (-len(one[0]), one[0]))
        if value != common or module in tails | longer
    }


def rewriter(adapter: Adapter, pairs: Collection[str]) -> Rewriter:
    """Return what writes an adapter in its own layout."""
    if isinstance(adapter, LoraFolder):
        return FolderRewriter(adapter, pairs)
    assert isinstance(adapter, AdapterFile)
    return FileRewriter(adapter, pairs)
