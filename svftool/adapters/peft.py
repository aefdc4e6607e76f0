"""PEFT LoRA folders: which weights an adapter changes, and the change of one weight at a time."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from svftool.adapters.peft_parameters import (
    AdaptedParameter,
    change_of_expert,
    place,
    wrapped_modules,
)
from svftool.checkpoints.base import Checkpoint, Closing, TensorInfo
from svftool.checkpoints.opening import open_checkpoint
from svftool.errors import CheckpointError, shortlist

CONFIG_FILE = "adapter_config.json"
STEM = "adapter_model"
_PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(\.(?P<leaf>weight|bias))?"
)
_WRAPPERS = re.compile(r"(\.base_layer)+(?=\.|$)")
_OWN_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoraLayer:
    """The adapter of one weight.

    Attributes
    ----------
    name : str
        The weight that is changed, without PEFT's prefix.
    down, up : str
        Tensors of the adapter: ``lora_A`` (r, in, ...) and ``lora_B`` (out, r, ...).
    embedding : bool
        Whether the pair is an embedding's, whose change is stored transposed.
    rank : int
        r, as the tensors have it.
    scaling : float
        ``alpha / r``, or ``alpha / sqrt(r)`` for rank-stabilised LoRA.
    magnitude : str or None
        Tensor of the row norms of a DoRA layer.
    """

    name: str
    down: str
    up: str
    embedding: bool
    rank: int
    scaling: float
    magnitude: str | None = None


def is_lora(path: str | os.PathLike[str]) -> bool:
    """Whether a path looks like a PEFT adapter folder."""
    return (Path(path) / CONFIG_FILE).is_file()


def open_lora(path: str | os.PathLike[str]) -> LoraFolder:
    """Open a PEFT LoRA folder.

    Parameters
    ----------
    path : path-like
        Folder with ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``).

    Returns
    -------
    LoraFolder
        A context manager.

    Raises
    ------
    CheckpointError
        If the folder is broken, or the adapter is no LoRA.
    """
    folder = Path(path)
    config = _read_config(folder / CONFIG_FILE)
    kind = str(config.get("peft_type", "LORA")).upper()
    if kind != "LORA":
        raise CheckpointError(
            f"{folder}: the adapter's peft_type is {kind!r}, expected 'LORA'. "
            "Merge the adapter with PEFT and inspect the merged checkpoint."
        )
    safe, pickled = (folder / f"{STEM}{suffix}" for suffix in (".safetensors", ".bin"))
    file = pickled if pickled.exists() and not safe.exists() else safe
    return LoraFolder(folder, config, open_checkpoint(file))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}, expected PEFT's configuration.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: a JSON {type(config).__name__}, expected an object.")
    return config


class LoraFolder(Closing):
    """A LoRA adapter open for reading; see `open_lora`.

    Attributes
    ----------
    path : Path
    layers : mapping of str to LoraLayer
        By the name of the weight that is changed.
    biases : mapping of str to (str, float)
        Biases that ``lora_bias`` adds to: the adapter's tensor and its factor.
    whole : mapping of str to str
        Tensors trained along (``modules_to_save``, biases), by the base's name.
    wrapped : tuple of WrappedModule
        Modules of which parameters are adapted (``target_parameters``); see `place`.
    unused : tuple of str
        Tensors of the adapter that are understood in no way.
    base : str or None
        The base model that the configuration names.
    notes : tuple of str
        Sentences for the user.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], tensors: Checkpoint) -> None:
        self.path = path
        self._config = config
        self._tensors = tensors
        gathered, rest = self._modules()
        pairs = [(module, self._pair(module, parts)) for (module, _), parts in gathered.items()]
        self.wrapped = wrapped_modules(pairs, config.get("target_parameters") or ())
        inside = {module.name for module in self.wrapped}
        modules = {
            module: parts
            for (module, depth), parts in gathered.items()
            if module not in inside and not depth
        }
        self.layers: Mapping[str, LoraLayer] = MappingProxyType(
            {f"{module}.weight": self._layer(module, parts) for module, parts in modules.items()}
        )
        self.biases: Mapping[str, tuple[str, float]] = MappingProxyType(
            {
                f"{module}.bias": (parts["lora_B.bias"], self.layers[f"{module}.weight"].scaling)
                for module, parts in modules.items()
                if "lora_B.bias" in parts
            }
        )
        known = {
            _WRAPPERS.sub("", name.removeprefix(_PREFIX)): name
            for name in rest
            if name.startswith(_PREFIX)
        }
        self.whole: Mapping[str, str] = MappingProxyType(known)
        self.unused = (
            *(name for name in rest if not name.startswith(_PREFIX)),
            *(
                name
                for (module, depth), parts in gathered.items()
                if depth and module not in inside
                for name in parts.values()
            ),
        )
        self.base = config.get("base_model_name_or_path")
        self.notes = (*tensors.notes, *self._own_base())

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor of the adapter file."""
        return self._tensors.infos[name]

    def read(self, name: str) -> Tensor:
        """Read one tensor of the adapter file."""
        return self._tensors.read(name)

    def change(self, name: str, weight: Tensor) -> Tensor:
        """Form the change of one weight, before any rounding.

        Parameters
        ----------
        name : str
            A key of `layers` or `biases`.
        weight : Tensor
            The base's tensor; gives the shape, and the row norms that DoRA needs.

        Returns
        -------
        Tensor
            float64, of the weight's shape.

        Raises
        ------
        CheckpointError
            If the adapter's matrices do not make a change of that shape.
        """
        if name in self.biases:
            tensor, factor = self.biases[name]
            return self._fit(name, self.read(tensor).double() * factor, weight)
        layer = self.layers[name]
        down, up = self.read(layer.down).double(), self.read(layer.up).double()
        if up.shape[1] != down.shape[0]:
            raise CheckpointError(
                f"{self.path}: {name!r}: lora_B has {up.shape[1]} columns for a rank of "
                f"{down.shape[0]}: an adapter of a grouped convolution, which is no change of its "
                "weight. Merge it with PEFT, if PEFT can."
            )
        product: Tensor = (up.flatten(1) @ down.flatten(1)) * layer.scaling
        if not layer.embedding and down.ndim > 2:
            product = product.reshape(up.shape[0], *down.shape[1:])
        change = self._fit(name, product.mT if layer.embedding else product, weight)
        return change if layer.magnitude is None else self._rescaled(layer, weight, change)

    def place(
        self, shapes: Mapping[str, tuple[int, ...]], model_type: str | None
    ) -> dict[str, AdaptedParameter]:
        """Tell which parameter of a wrapped module each of its pairs belongs to.

        Parameters
        ----------
        shapes : mapping of str to tuple of int
            Of the base's parameters, by the names that `wrapped` has.
        model_type : str or None
            As in the base's ``config.json``.

        Raises
        ------
        CheckpointError
            If the pairs of a module do not fit its parameters.
        """
        found: dict[str, AdaptedParameter] = {}
        for module in self.wrapped:
            held = {name: shapes[name] for name in module.parameters if name in shapes}
            if held:
                fits = place(module, held, model_type=model_type, where=str(self.path))
                found |= {fit.name: fit for fit in fits}
        return found

    def change_of(self, parameter: AdaptedParameter, expert: int = 0) -> Tensor:
        """Form the change of one matrix of an adapted parameter.

        Parameters
        ----------
        parameter : AdaptedParameter
            From `place`.
        expert : int
            Which one of a stack.

        Returns
        -------
        (m, n) Tensor
            float64.
        """
        down, up = self.read(parameter.down), self.read(parameter.up)
        scaling = self._scaling(parameter.name, parameter.rank)
        return change_of_expert(parameter, down, up, expert) * scaling

    def _rescaled(self, layer: LoraLayer, weight: Tensor, change: Tensor) -> Tensor:
        """Apply DoRA: each row of ``W + change`` gets the norm that was trained for it."""
        moved = weight.double() + change
        magnitude = self.read(str(layer.magnitude)).double().flatten()
        if weight.ndim != 2 or magnitude.numel() != weight.shape[0]:
            raise CheckpointError(
                f"{self.path}: {layer.name!r}: DoRA on a weight of shape {tuple(weight.shape)}, "
                "expected a linear layer. Merge the adapter with PEFT and inspect the result."
            )
        scale: Tensor = magnitude / torch.linalg.vector_norm(moved, dim=1)
        return torch.sub(moved * scale.unsqueeze(1), weight.double())

    def _fit(self, name: str, change: Tensor, weight: Tensor) -> Tensor:
        # PEFT turns `fan_in_fan_out` on by itself for GPT-2's layers, whose weights are (in, out),
        # and off for the others: only for a square weight does the configuration decide.
        if change.ndim == 2 and change.mT.shape == weight.shape:
            return change if change.shape == weight.shape and not self._swapped(name) else change.mT
        if change.shape == weight.shape:
            return change
        raise CheckpointError(
            f"{self.path}: {name!r}: the adapter's change has shape {tuple(change.shape)}, "
            f"expected {tuple(weight.shape)}. The adapter belongs to another base."
        )

    def _swapped(self, name: str) -> bool:
        layer = self.layers.get(name)
        return bool(self._config.get("fan_in_fan_out")) and not (layer and layer.embedding)

    def _modules(self) -> tuple[dict[tuple[str, int], dict[str, str]], list[str]]:
        """Gather the adapter's tensors by module and depth of wrapping; return the rest too."""
        modules: dict[tuple[str, int], dict[str, str]] = {}
        rest: list[str] = []
        for name in self._tensors.infos:
            found = _PART.fullmatch(name.removeprefix(_PREFIX))
            if found is None:
                rest.append(name)
                continue
            part = found["part"] + (".bias" if found["leaf"] == "bias" else "")
            module = _WRAPPERS.sub("", found["module"])
            depth = found["module"].endswith(".base_layer") * found["module"].count(".base_layer")
            modules.setdefault((module, depth), {})[part] = name
        return modules, rest

    def _pair(self, module: str, parts: Mapping[str, str]) -> tuple[TensorInfo, TensorInfo]:
        kind = "lora_embedding" if "lora_embedding_A" in parts else "lora"
        down, up = f"{kind}_A", f"{kind}_B"
        if down not in parts or up not in parts:
            raise CheckpointError(
                f"{self.path}: module {module!r} has {shortlist(parts)}, expected {down} and {up}. "
                "The adapter file is incomplete."
            )
        return self.info(parts[down]), self.info(parts[up])

    def _layer(self, module: str, parts: Mapping[str, str]) -> LoraLayer:
        down, up = self._pair(module, parts)
        rank = down.shape[0]
        return LoraLayer(
            name=f"{module}.weight",
            down=down.name,
            up=up.name,
            embedding="lora_embedding_A" in parts,
            rank=rank,
            scaling=self._scaling(module, rank),
            magnitude=parts.get("lora_magnitude_vector"),
        )

    def _scaling(self, module: str, rank: int) -> float:
        patterns = self._config.get("alpha_pattern") or {}
        found = next((p for p in patterns if re.fullmatch(rf"(.*\.)?({p})", module)), None)
        alpha = float(patterns[found] if found else self._config.get("lora_alpha", rank))
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)

    def _own_base(self) -> tuple[str, ...]:
        how = str(self._config.get("init_lora_weights", "")).lower()
        if not how.startswith(_OWN_BASE):
            return ()
        return (
            f"{self.path.name}: initialised by {how!r}, which also changes the base: the adapter's "
            "change is one of that changed base",
        )

    def close(self) -> None:
        """Close the files."""
        self._tensors.close()
