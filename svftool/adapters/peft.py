"""PEFT LoRA folders: which weights an adapter changes, and the change of one weight at a time."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from svftool.adapters.adapter import Adapter
from svftool.adapters.low_rank import LowRank
from svftool.adapters.peft_config import (
    CONFIG_FILE,
    pattern_value,
    read_adapter_config,
    unknown_settings,
)
from svftool.adapters.peft_parameters import (
    AdaptedParameter,
    change_of_expert,
    place,
    wrapped_modules,
)
from svftool.checkpoints.base import Checkpoint, TensorInfo
from svftool.checkpoints.dtypes import dtype_name
from svftool.checkpoints.opening import open_checkpoint
from svftool.errors import CheckpointError, NumericalError, shortlist

STEM = "adapter_model"
_PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(\.(?P<leaf>weight|bias))?"
)
_WRAPPERS = re.compile(r"(\.base_layer)+(?=\.|$)|\.modules_to_save(\.default)?(?=\.)")
_TOKENS = ".token_adapter"
_ROWS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(\.default)?")
_ADAPTER_PART = re.compile(
    r"(^|\.)(lora_\w+|token_adapter|original_module|trainable_tokens_\w+)\.?"
)
_INSIDE = re.compile(r"\.base_layer\.(?!base_layer\.)\w+\.lora_")
"""An adapter inside an adapted module: attention, with its projections apart."""
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


@dataclass(frozen=True)
class TokenRows:
    """Rows of an embedding that were trained by themselves (``trainable_token_indices``).

    Attributes
    ----------
    name : str
        The embedding's weight, without PEFT's prefix.
    key : str
        Tensor of the adapter, (n, d): the rows themselves, as they are after training.
    indices : tuple of int
        Which rows they are.
    """

    name: str
    key: str
    indices: tuple[int, ...]


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
    config = read_adapter_config(folder / CONFIG_FILE)
    safe, pickled = (folder / f"{STEM}{suffix}" for suffix in (".safetensors", ".bin"))
    file = pickled if pickled.exists() and not safe.exists() else safe
    tensors = open_checkpoint(file)
    try:
        return LoraFolder(folder, config, tensors)
    except BaseException:
        tensors.close()
        raise


class LoraFolder(Adapter):
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
    listed : frozenset of str
        Those of `whole` that the configuration announces, so that the base need not have them.
    rows : mapping of str to TokenRows
        Embeddings of which some rows are replaced, by the weight's name.
    wrapped : tuple of WrappedModule
        Modules of which parameters are adapted (``target_parameters``); see `place`.
    unused : tuple of str
        Tensors of the adapter that are understood in no way.
    base : str or None
        The base model that the configuration names.
    notes : tuple of str
        Sentences for the user.
    """

    layout = "peft"

    def __init__(self, path: Path, config: Mapping[str, Any], tensors: Checkpoint) -> None:
        self.path = path
        self.config = config
        self.metadata = tensors.metadata
        self._tensors = tensors
        self._check_filled()
        inner = next(filter(_INSIDE.search, tensors.infos), None)
        if inner is not None:
            raise self._fault(
                inner,
                "an adapter of nn.MultiheadAttention, which PEFT merges in a way of its own",
                "one of plain layers",
            )
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
        self.rows: Mapping[str, TokenRows] = MappingProxyType(
            {found.name: found for name in rest if (found := self._rows(name)) is not None}
        )
        taken = {one.key for one in self.rows.values()}
        known = {
            _WRAPPERS.sub("", name.removeprefix(_PREFIX)): name
            for name in rest
            if name.startswith(_PREFIX) and not _ADAPTER_PART.search(name)
        }
        self.whole: Mapping[str, str] = MappingProxyType(known)
        self.listed = frozenset(name for name in known if self._is_listed(name))
        twice = sorted(self.rows.keys() & {*self.layers, *known})
        if twice:
            raise self._fault(twice[0], "token rows and another change", "one of the two")
        self.unused = (
            *(name for name in rest if name not in taken and name not in known.values()),
            *(
                name
                for (module, depth), parts in gathered.items()
                if depth and module not in inside
                for name in parts.values()
            ),
        )
        self.base = config.get("base_model_name_or_path")
        self.notes = (*tensors.notes, *self._own_base(), *self._unknown())

    @property
    def keys(self) -> Collection[str]:
        """All tensors of the file."""
        return self._tensors.infos

    def bytes_of(self, name: str) -> int:
        """Return the bytes of everything that the file holds for a tensor or module."""
        part = f".{name.removesuffix('.weight')}."
        return sum(
            info.nbytes
            for key, info in self._tensors.infos.items()
            if key == name or part in f".{key}."
        )

    def sides(self, name: str) -> tuple[int, int]:
        """Return the outputs and inputs of a layer, a key of `layers`, as its adapter has them."""
        up, down = (self.info(key).shape for key in (self.layers[name].up, self.layers[name].down))
        return up[0] if up else 0, down[1] if len(down) > 1 else 0

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a layer's change, as the adapter alone tells it."""
        layer = self.layers[name]
        own = (self.info(layer.up).shape[0], *self.info(layer.down).shape[1:])
        turned = layer.embedding or bool(self.config.get("fan_in_fan_out"))
        return own[::-1] if turned and len(own) == 2 else own

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
            self.check(name, tuple(weight.shape))
            return self.read(tensor).double() * factor
        layer = self.layers[name]
        turned = self.check(name, tuple(weight.shape))
        down, up = self.read(layer.down).double(), self.read(layer.up).double()
        start = weight
        if name in self.whole:
            # PEFT saves an adapted embedding itself too, and adds the change to what it saved.
            start = self.read(self.whole[name])
        product: Tensor = (up.flatten(1) @ down.flatten(1)) * layer.scaling
        change = (product.mT if turned else product).reshape(weight.shape)
        if layer.magnitude is not None:
            change = self._rescaled(layer, start, change, columns=turned)
        return change if start is weight else change + (start.double() - weight.double())

    def low_rank(self, name: str, shape: tuple[int, ...] | None = None) -> LowRank | None:
        """Return a layer's two matrices as they are stored; see `Adapter.low_rank`."""
        layer = self.layers[name]
        if layer.magnitude is not None or name in self.whole:
            return None
        if shape is None:
            turned = layer.embedding or bool(self.config.get("fan_in_fan_out"))
        else:
            turned = self.check(name, shape)
        up, down = self.read(layer.up).flatten(1), self.read(layer.down).flatten(1)
        for key, value in ((layer.up, up), (layer.down, down)):
            if not bool(value.isfinite().all()):
                raise NumericalError(
                    f"{self.path}: {key!r}: NaN or infinity, expected finite values. Save or "
                    "download the adapter again."
                )
        B, A = (down.mT, up.mT) if turned else (up, down)
        return LowRank(name, B=B, A=A, scale=layer.scaling)

    def check(self, name: str, shape: tuple[int, ...]) -> bool:
        """Hold the adapter's shapes against a tensor of the base, before any is read.

        Parameters
        ----------
        name : str
            A key of `layers`, `biases` or `rows`.
        shape : tuple of int
            Of the base's tensor.

        Returns
        -------
        bool
            Whether the product of the adapter's matrices is the change's transpose.

        Raises
        ------
        CheckpointError
            If the adapter's tensors make no change of that shape.
        """
        if name in self.rows:
            self._check_rows(self.rows[name], shape)
            return False
        if name in self.biases:
            own = self.info(self.biases[name][0]).shape
            if own != shape:
                raise self._misfit(name, own, shape)
            return False
        layer = self.layers[name]
        turned = self._turned(layer, shape)
        self._check_rank(layer)
        if name in self.whole and self.info(self.whole[name]).shape != shape:
            found = f"saved with shape {self.info(self.whole[name]).shape} and adapted"
            raise self._fault(name, found, f"{shape} as in the base")
        if layer.magnitude is not None:
            count = math.prod(self.info(layer.magnitude).shape)
            expected = shape[1] if turned else shape[0]
            if count != expected:
                raise self._fault(name, f"{count} magnitudes of DoRA", f"{expected}")
        return turned

    def tokens(self, name: str, weight: Tensor) -> Tensor:
        """Return an embedding with its trained rows in place, as PEFT merges them.

        Parameters
        ----------
        name : str
            A key of `rows`.
        weight : Tensor
            The base's embedding; not changed.
        """
        rows = self.rows[name]
        self._check_rows(rows, tuple(weight.shape))
        return weight.index_copy(0, torch.tensor(rows.indices), self.read(rows.key).to(weight))

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

    def _rescaled(
        self, layer: LoraLayer, weight: Tensor, change: Tensor, *, columns: bool
    ) -> Tensor:
        """Apply DoRA: each output of ``W + change`` gets the norm that was trained for it.

        An output is a row, or a column where the weight is (in, out). PEFT takes the columns of an
        embedding too.
        """
        axis = 1 if columns else 0
        moved = weight.double() + change
        others = [one for one in range(weight.ndim) if one != axis]
        norms = torch.linalg.vector_norm(moved, dim=others, keepdim=True)
        magnitude = self.read(str(layer.magnitude)).double().reshape(norms.shape)
        return torch.sub(moved * (magnitude / norms), weight.double())

    def _check_rank(self, layer: LoraLayer) -> None:
        """Refuse matrices of another rank than the configuration's; so does PEFT."""
        module = layer.name.removesuffix(".weight")
        patterns = self.config.get("rank_pattern")
        found = pattern_value(self.path / CONFIG_FILE, patterns, module)
        expected = self.config.get("r", layer.rank) if found is None else found
        if expected != layer.rank:
            said = f"{expected} as {CONFIG_FILE} says"
            raise self._fault(layer.name, f"matrices of rank {layer.rank}", said)

    def _turned(self, layer: LoraLayer, shape: tuple[int, ...]) -> bool:
        """Tell which way round the product lies; refuse one that fits in no way."""
        down, up = self.info(layer.down).shape, self.info(layer.up).shape
        if up[1] != down[0]:
            raise CheckpointError(
                f"{self.path}: {layer.name!r}: lora_B has {up[1]} columns for a rank of "
                f"{down[0]}: an adapter of a grouped convolution, which is no change of its "
                "weight. Merge it with PEFT, if PEFT can."
            )
        own = (up[0], *down[1:])
        if len(own) > 2:
            straight, turned = own == shape and set(up[2:]) <= {1}, False
        else:
            straight, turned = own == shape, own[::-1] == shape
        if not straight and not turned:
            raise self._misfit(layer.name, own, shape)
        # PEFT turns `fan_in_fan_out` on by itself for GPT-2's layers, whose weights are (in, out),
        # and off for the others: only for a square weight does the configuration decide.
        if straight and turned:
            return layer.embedding or bool(self.config.get("fan_in_fan_out"))
        return turned

    def _check_rows(self, rows: TokenRows, shape: tuple[int, ...]) -> None:
        own = self.info(rows.key).shape
        if len(shape) != 2 or own[1:] != shape[1:] or own[0] != len(rows.indices):
            raise self._fault(
                rows.name,
                f"token rows of shape {own} for {len(rows.indices)} tokens",
                f"rows of {shape}",
            )
        if rows.indices and max(rows.indices) >= shape[0]:
            raise self._fault(
                rows.name, f"token {max(rows.indices)}", f"one of {shape[0]} as in the base"
            )

    def _misfit(
        self, name: str, found: tuple[int, ...], expected: tuple[int, ...]
    ) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: {name!r}: the adapter's change has shape {found}, "
            f"expected {expected}. The adapter belongs to another base."
        )

    def _fault(self, name: str, found: str, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: {name!r}: {found}, expected {expected}. Save the adapter again, or "
            "merge it with PEFT and use the merged checkpoint."
        )

    def _check_filled(self) -> None:
        """Refuse tensors without values: ZeRO-3 leaves them where nothing was gathered."""
        for info in self._tensors.infos.values():
            if info.numel == 0:
                raise CheckpointError(
                    f"{self.path}: {info.name!r} is empty (shape {info.shape}), expected its "
                    "values. Gather the parameters before saving (ZeRO-3 splits them), and save "
                    "the adapter again."
                )

    def _rows(self, name: str) -> TokenRows | None:
        """Understand trained rows of an embedding; None where a tensor is something else."""
        found = _ROWS.fullmatch(name.removeprefix(_PREFIX))
        if found is None:
            if _TOKENS in name:
                raise self._fault(name, "part of a token adapter", "its trained rows alone")
            return None
        module = _WRAPPERS.sub("", found["module"])
        given = self.config.get("trainable_token_indices")
        if isinstance(given, Mapping):
            fits = [v for k, v in given.items() if module == k or module.endswith(f".{k}")]
            given = fits[0] if len(fits) == 1 else None
        if not given or not self._tensors.infos[name].dtype.is_floating_point:
            raise self._fault(name, "no token numbers of its own", "trainable_token_indices")
        return TokenRows(f"{module}.weight", name, tuple(given))

    def _is_listed(self, name: str) -> bool:
        modules = name.split(".")[:-1]
        saved = self.config.get("modules_to_save") or ()
        return any(f".{one}." in f".{'.'.join(modules)}." for one in saved)

    def _unknown(self) -> tuple[str, ...]:
        keys = unknown_settings(self.config)
        if not keys:
            return ()
        return (f"{self.path.name}: settings that are not known here: {shortlist(keys, 6)}",)

    @property
    def moved_base(self) -> bool:
        """Whether the adapter belongs to a base that its initialisation changed."""
        return bool(self._own_base())

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
        pair = self.info(parts[down]), self.info(parts[up])
        for info in pair:
            if len(info.shape) < 2 or not info.dtype.is_floating_point:
                raise self._fault(
                    info.name, f"{dtype_name(info.dtype)} of shape {info.shape}", "a float matrix"
                )
        return pair

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
        where = self.path / CONFIG_FILE
        found = pattern_value(where, self.config.get("alpha_pattern"), module)
        alpha = float(self.config.get("lora_alpha", rank) if found is None else found)
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _own_base(self) -> tuple[str, ...]:
        how = str(self.config.get("init_lora_weights", "")).lower()
        if not how.startswith(_OWN_BASE):
            return ()
        return (
            f"{self.path.name}: initialised by {how!r}, which also changes the base: the adapter's "
            "change is one of that changed base",
        )

    def close(self) -> None:
        """Close the files."""
        self._tensors.close()
