"""Adapter files of kohya's tools, ComfyUI and diffusers, read by their keys alone."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from svftool.adapters import products
from svftool.adapters.adapter import Adapter
from svftool.adapters.layout_keys import ending, module_of, role_of_part, split_key, split_module
from svftool.adapters.layouts import adapter_kind, adapter_layout
from svftool.adapters.low_rank import LowRank
from svftool.adapters.parts import DENOISER, BaseModel, role_of
from svftool.adapters.peft import is_lora, open_lora
from svftool.adapters.peft_config import pattern_value
from svftool.checkpoints import Checkpoint, TensorInfo, open_checkpoint
from svftool.errors import CheckpointError, NumericalError, counted, shortlist
from svftool.files.header import parse_json

STATED_KEY = "lora_adapter_metadata"
_AGAIN = "Save or download the adapter again."


@dataclass(frozen=True)
class FileLayer:
    """The change of one tensor as the file holds it.

    Attributes
    ----------
    module : str
        What its keys begin with.
    kind : {"lora", "loha", "lokr", "diff"}
    keys : mapping of str to str
        Tensors of the file by role.
    scale : float
        What the product is multiplied with.
    part : str
        Part of the pipeline, as the file calls it.
    inner : str
        The tensor within the part; of kohya's layout, as one word.
    """

    module: str
    kind: str
    keys: Mapping[str, str]
    scale: float
    part: str
    inner: str

    @property
    def role(self) -> str:
        """Part of the pipeline, as adapters tell them apart."""
        return role_of_part(self.part)


def is_adapter_file(names: Collection[str]) -> bool:
    """Tell whether keys are those of an adapter; one of PEFT's without its folder is refused.

    A checkpoint that holds an adapter beside its weights is none.
    """
    layout = adapter_layout(names)
    if layout is None or (layout == "peft" and any(".base_layer." in name for name in names)):
        return False
    return 2 * sum(split_key(name) is not None for name in names) >= len(names)


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Tell whether a path is an adapter in any layout."""
    if is_lora(path):
        return True
    if not Path(path).exists():
        return False
    try:
        with open_checkpoint(path) as file:
            return is_adapter_file(file.infos)
    except CheckpointError:
        return False


def open_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Open an adapter of any layout.

    Parameters
    ----------
    path : path-like
        A PEFT folder, or a file in the layout of kohya, ComfyUI or diffusers.

    Returns
    -------
    Adapter
        A context manager.

    Raises
    ------
    CheckpointError
        If it is broken, or of no layout.
    """
    if is_lora(path):
        return open_lora(path)
    file = open_checkpoint(path)
    try:
        return AdapterFile(file)
    except BaseException:
        file.close()
        raise


class AdapterFile(Adapter):
    """An adapter that is one file; see `open_adapter`."""

    def __init__(self, tensors: Checkpoint) -> None:
        self.path = tensors.path
        self._tensors = tensors
        self.layout = _layout(tensors)
        self.metadata = tensors.metadata
        self.notes = tensors.notes
        self.stated = _stated(tensors) if self.layout == "diffusers" else {}
        modules: dict[str, dict[str, str]] = defaultdict(dict)
        unused = []
        for key in tensors.infos:
            found = split_key(key)
            if found is None:
                unused.append(key)
                continue
            module, role = found
            if role in modules[module]:
                raise self._fault(module, f"{modules[module][role]} and {key}", "one of the two")
            modules[module][role] = key
        self.unused = tuple(unused)
        layers: dict[str, FileLayer] = {}
        biases: dict[str, tuple[str, float]] = {}
        self._whole_layers: dict[str, FileLayer] = {}
        for module, keys in modules.items():
            self._take(module, keys, layers, biases)
        self.layers = MappingProxyType(layers)
        self.biases = MappingProxyType(biases)
        self.whole = MappingProxyType(
            {name: one.keys["set_weight"] for name, one in self._whole_layers.items()}
        )
        self._modules: dict[str, FileLayer] = {}

    # -- what the file holds

    def _take(
        self,
        module: str,
        keys: Mapping[str, str],
        layers: dict[str, FileLayer],
        biases: dict[str, tuple[str, float]],
    ) -> None:
        """Understand the keys of one module."""
        part, inner = self._split(module)
        kind = self._kind(module, keys)
        scale = self._scale(module, kind, keys, part, inner) if kind else 1.0
        name = f"{part}.{inner}" if part != DENOISER else inner
        if kind is not None:
            layers[f"{name}.weight"] = FileLayer(module, kind, keys, scale, part, inner)
        if "set_weight" in keys:
            layer = FileLayer(module, "whole", keys, 1.0, part, inner)
            self._whole_layers[f"{name}.weight"] = layer
        for role, factor in (("up_bias", scale), ("diff_b", 1.0)):
            if role in keys:
                if f"{name}.bias" in biases:
                    raise self._fault(module, "two changes of one bias", "one")
                biases[f"{name}.bias"] = (keys[role], factor)

    def _split(self, module: str) -> tuple[str, str]:
        found = split_module(module, words=self.layout == "kohya")
        if found is None:
            raise self._fault(
                module, "no part of a pipeline", f"a name of the {self.layout} layout"
            )
        return found

    def _kind(self, module: str, keys: Mapping[str, str]) -> str | None:
        """Tell how a module's change is stored; refuse halves of it, and two at once."""
        wanted = {
            "lora": any(one in keys for one in ("down", "up", "mid", "up_bias")),
            "loha": any(one.startswith("hada") for one in keys),
            "lokr": any(one.startswith("lokr") for one in keys),
            "diff": "diff" in keys,
            "whole": "set_weight" in keys,
        }
        kinds = [kind for kind, there in wanted.items() if there]
        if len(kinds) > 1:
            raise self._fault(module, f"changes of two kinds ({shortlist(kinds)})", "one")
        kind = kinds[0] if kinds else None
        missing = [one for one in self._needed(kind, keys) if one not in keys]
        if missing or (kind in (None, "diff") and {"alpha", "magnitude"} & set(keys)):
            endings = shortlist(ending(self.layout, one) for one in missing or ("down", "up"))
            held = shortlist(key.removeprefix(f"{module}.") for key in keys.values())
            raise CheckpointError(
                f"{self.path}: module {module!r} has {held} and no {endings}, expected both halves "
                f"of a change. {_AGAIN}"
            )
        for role, key in keys.items():
            info = self._tensors.infos[key]
            if not info.dtype.is_floating_point and role != "alpha":
                raise self._fault(module, f"{key} of {info.dtype}", "floating numbers")
            if info.numel == 0:
                raise self._fault(module, f"{key} without values", "its values")
        return None if kind == "whole" else kind

    @staticmethod
    def _needed(kind: str | None, keys: Mapping[str, str]) -> tuple[str, ...]:
        if kind == "lora":
            return ("down", "up")
        if kind == "loha":
            cores = ("hada_t1", "hada_t2") if {"hada_t1", "hada_t2"} & set(keys) else ()
            return ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", *cores)
        if kind == "lokr":
            sides = (
                (one,) if one in keys else (f"{one}_a", f"{one}_b")
                for one in ("lokr_w1", "lokr_w2")
            )
            return tuple(one for side in sides for one in side)
        return ()

    def _scale(
        self, module: str, kind: str, keys: Mapping[str, str], part: str, inner: str
    ) -> float:
        """Return alpha over rank; 1 where no alpha is stored."""
        rank = self._rank(kind, keys)
        stated = self._stated_scale(part, inner, rank)
        if "alpha" not in keys:
            return 1.0 if stated is None else stated
        if stated is not None:
            raise self._fault(
                module, f"an alpha of its own and one in {STATED_KEY!r}", "one of the two"
            )
        value = self.read(keys["alpha"])
        alpha = float(value) if value.numel() == 1 else math.nan
        if not math.isfinite(alpha):
            raise NumericalError(
                f"{self.path}: {keys['alpha']!r} is {alpha}, expected a finite number. {_AGAIN}"
            )
        if alpha == 0.0:
            raise self._fault(
                module,
                "alpha 0, which some programs take as no change and others as the rank",
                "another number",
            )
        return 1.0 if rank is None else alpha / rank

    def _rank(self, kind: str, keys: Mapping[str, str]) -> int | None:
        """Return the rank that alpha is divided by; None where nothing has one."""
        order = {
            "lora": ("down",),
            "loha": ("hada_w1_b",),
            "lokr": ("lokr_w2_b", "lokr_w1_b"),
        }.get(kind, ())
        for one in order:
            if one in keys:
                return self.info(keys[one]).shape[0]
        return None

    def _stated_scale(self, part: str, inner: str, rank: int | None) -> float | None:
        """Return what diffusers wrote of alpha into the metadata; None where it wrote nothing."""
        alpha = self.stated.get(f"{part}.lora_alpha")
        if alpha is None or rank is None:
            return None
        patterns = self.stated.get(f"{part}.alpha_pattern")
        found = pattern_value(self.path, patterns if isinstance(patterns, dict) else None, inner)
        alpha = alpha if found is None else found
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not alpha:
            raise CheckpointError(
                f"{self.path}: {STATED_KEY!r} has an alpha of {alpha!r}, expected a number "
                f"other than 0. {_AGAIN}"
            )
        rooted = bool(self.stated.get(f"{part}.use_rslora"))
        return float(alpha) / (math.sqrt(rank) if rooted else rank)

    # -- names

    def against(
        self, infos: Mapping[str, TensorInfo], config: Mapping[str, Any], path: str
    ) -> Adapter:
        """Return the same adapter with its names resolved against those of a base."""
        names = _Names(BaseModel(infos, config, path), words=self.layout == "kohya")
        found = {
            name: self._home(names, one.role, one.inner, "weight")
            for name, one in self._all_layers()
        }
        for name, (key, _) in self.biases.items():
            part, inner = self._split(module_of(key))
            found[name] = self._home(names, role_of_part(part), inner, "bias")
        if not any(found.values()):
            if self.layout != "kohya":
                return self._renamed({name: self._bare(name) for name in found})
            raise CheckpointError(
                f"{self.path}: none of the adapter's {counted(len(found), 'layers')} is in {path} "
                f"({shortlist(sorted(found), 2)}), expected the adapter's base, with modules named "
                "as its keys are. Name the base that it was trained on."
            )
        return self._renamed({name: home for name, home in found.items() if home is not None})

    def _all_layers(self) -> list[tuple[str, FileLayer]]:
        return [*self.layers.items(), *self._whole_layers.items()]

    def _bare(self, name: str) -> str:
        """Return a name without the part, where only one part is changed."""
        if len({one.role for one in self.layers.values()}) > 1:
            return name
        found = split_module(name, words=False)
        return name if found is None else found[1]

    def _home(self, names: _Names, role: str, inner: str, leaf: str) -> str | None:
        homes = names.of(role, inner, leaf)
        if len(homes) > 1:
            raise CheckpointError(
                f"{self.path}: {inner!r} is the name of {shortlist(map(repr, homes), 3)} in the "
                "base, expected one. Rename the modules, or use an adapter with dotted names."
            )
        return homes[0] if homes else None

    def _renamed(self, names: Mapping[str, str]) -> AdapterFile:
        twin = object.__new__(AdapterFile)
        twin.__dict__.update(self.__dict__)
        twin.layers = MappingProxyType(
            {names[name]: one for name, one in self.layers.items() if name in names}
        )
        twin.biases = MappingProxyType(
            {names[name]: one for name, one in self.biases.items() if name in names}
        )
        twin.whole = MappingProxyType(
            {names[name]: one for name, one in self.whole.items() if name in names}
        )
        gone = [one.module for name, one in self._all_layers() if name not in names]
        gone += [key for name, (key, _) in self.biases.items() if name not in names]
        twin.homeless = tuple(gone)
        twin._modules = {one.module: one for _, one in self._all_layers()}
        return twin

    # -- values

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor of the adapter's file."""
        return self._tensors.infos[name]

    def read(self, name: str) -> Tensor:
        """Read one tensor of the adapter's file."""
        return self._tensors.read(name)

    @property
    def keys(self) -> Collection[str]:
        """All tensors of the file."""
        return self._tensors.infos

    def bytes_of(self, name: str) -> int:
        """Return the bytes of everything that the file holds for a tensor or module."""
        layer = self.layers.get(name) or self._modules.get(name)
        keys = (name,) if layer is None else layer.keys.values()
        return sum(self._tensors.infos[key].nbytes for key in keys if key in self._tensors.infos)

    def sides(self, name: str) -> tuple[int, int]:
        """Return the outputs and inputs of a layer, as its adapter has them."""
        found = self.shape(name)
        return (found[0], found[1]) if len(found) > 1 else (math.prod(found), 1)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a layer's change, as the file has it.

        Raises
        ------
        CheckpointError
            If the tensors of the layer do not fit each other.
        """
        layer = self.layers[name]
        try:
            with torch.device("meta"):
                parts = {
                    role: torch.empty(self.info(key).shape) for role, key in layer.keys.items()
                }
                return tuple(products.multiplied_out(layer.kind, parts).shape)
        except (RuntimeError, IndexError, ValueError):
            found = shortlist(f"{key} {self.info(key).shape}" for key in layer.keys.values())
            raise self._fault(
                layer.module, f"shapes that make no change ({found})", "matrices of one rank"
            ) from None

    def check(self, name: str, shape: tuple[int, ...]) -> bool:
        """Hold the adapter's shapes against a tensor of the base; see `Adapter.check`."""
        if name in self.biases:
            own = self.info(self.biases[name][0]).shape
            if math.prod(own) != math.prod(shape) or len(shape) != 1:
                raise self._misfit(name, own, shape)
            return False
        own = self.shape(name)
        turned = len(shape) == 2 and own != shape and own == shape[::-1]
        same = own[:1] == shape[:1] and math.prod(own) == math.prod(shape)
        if not turned and not (same and _ones_apart(own, shape)):
            raise self._misfit(name, own, shape)
        layer = self.layers[name]
        if "magnitude" in layer.keys:
            count = math.prod(self.info(layer.keys["magnitude"]).shape)
            if count not in shape[:2]:
                raise self._fault(
                    layer.module, f"{count} magnitudes of DoRA", f"{shape[0]}, one an output"
                )
        return turned

    def change(self, name: str, weight: Tensor) -> Tensor:
        """Form the change of one weight; see `Adapter.change`."""
        turned = self.check(name, tuple(weight.shape))
        if name in self.biases:
            key, factor = self.biases[name]
            return self._finite(self.read(key).double(), (key,)).reshape(weight.shape) * factor
        layer = self.layers[name]
        parts = {
            role: self._finite(self.read(key), (key,))
            for role, key in layer.keys.items()
            if role not in ("alpha", "up_bias", "diff_b")
        }
        product = products.multiplied_out(layer.kind, parts) * layer.scale
        change = (product.mT if turned else product).reshape(weight.shape)
        if "magnitude" in parts:
            magnitude = parts["magnitude"]
            if turned:
                magnitude = (
                    magnitude.reshape(1, -1) if magnitude.numel() == len(product) else magnitude
                )
            change = products.rescaled(weight, change, magnitude)
        return self._finite(change, layer.keys.values())

    def low_rank(self, name: str, shape: tuple[int, ...] | None = None) -> LowRank | None:
        """Return a layer's two matrices as they are stored; see `Adapter.low_rank`."""
        layer = self.layers[name]
        if layer.kind != "lora" or "magnitude" in layer.keys:
            return None
        turned = False if shape is None else self.check(name, shape)
        self.shape(name)
        up, down = (
            self._finite(self.read(layer.keys[one]), (layer.keys[one],)) for one in ("up", "down")
        )
        if "mid" in layer.keys:
            mid = self._finite(self.read(layer.keys["mid"]), (layer.keys["mid"],))
            down = products.through_core(mid, down)
        B, A = up.flatten(1), down.flatten(1)
        if turned:
            B, A = A.mT, B.mT
        return LowRank(name, B=B, A=A, scale=layer.scale)

    def _finite(self, values: Tensor, keys: Collection[str]) -> Tensor:
        # float8 has no test of its own.
        wide = values.float() if values.element_size() == 1 else values
        if not bool(wide.isfinite().all()):
            raise NumericalError(
                f"{self.path}: {shortlist(map(repr, keys), 2)}: NaN or infinity, expected finite "
                f"values. {_AGAIN}"
            )
        return values

    def _misfit(
        self, name: str, found: tuple[int, ...], expected: tuple[int, ...]
    ) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: {name!r}: the adapter's change has shape {found}, "
            f"expected {expected}. The adapter belongs to another base."
        )

    def _fault(self, name: str, found: str, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {name!r}: {found}, expected {expected}. {_AGAIN}")

    def close(self) -> None:
        """Close the file."""
        self._tensors.close()


class _Names:
    """The tensors of a base, by what an adapter's file calls them."""

    def __init__(self, base: BaseModel, *, words: bool) -> None:
        self._words = words
        self._known: dict[tuple[str, str], list[str]] = defaultdict(list)
        for name in base.infos:
            part, rest = base.part(name)
            self._known[role_of(part), self._spelled(rest)].append(name)

    def of(self, role: str, inner: str, leaf: str) -> list[str]:
        """Return the base's tensors of a module; of a bare parameter where there is no module."""
        known = self._known
        found = known.get((role, self._spelled(f"{inner}.{leaf}")), [])
        return found or (known.get((role, self._spelled(inner)), []) if leaf == "weight" else [])

    def _spelled(self, name: str) -> str:
        return name.replace(".", "_") if self._words else name


def _ones_apart(one: tuple[int, ...], two: tuple[int, ...]) -> bool:
    """Whether two shapes differ in sides of 1 alone; flattened windows count as the same."""
    plain = [tuple(side for side in shape if side != 1) for shape in (one, two)]
    return plain[0] == plain[1] or len(one) == 2 or len(two) == 2


def _layout(tensors: Checkpoint) -> str:
    found = adapter_layout(tensors.infos)
    if found == "peft" and is_lora(tensors.path.parent):
        raise CheckpointError(
            f"{tensors.path}: one file of a PEFT adapter, expected the folder, whose "
            f"adapter_config.json holds the alpha. Name {tensors.path.parent}."
        )
    if found == "peft":
        raise CheckpointError(
            f"{tensors.path}: a PEFT adapter without adapter_config.json, which holds its alpha, "
            "expected the folder with both. Name the folder, or copy adapter_config.json beside it "
            "under the name that PEFT gives."
        )
    if found is None:
        kind = adapter_kind(tensors.infos)
        holds = "no adapter" if kind is None else f"{kind} with keys of no layout or of several"
        raise CheckpointError(
            f"{tensors.path}: {holds} ({shortlist(tensors.infos, 2)}), expected keys that begin "
            "with 'lora_unet_' or 'lora_te_' (kohya), 'diffusion_model.' (comfy), or 'unet.', "
            "'transformer.' or 'text_encoder.' (diffusers), or a PEFT folder. Rename the keys."
        )
    return found


def _stated(tensors: Checkpoint) -> dict[str, Any]:
    """Return what diffusers says of an adapter in the metadata."""
    text = tensors.metadata.get(STATED_KEY)
    if text is None:
        return {}
    try:
        found = parse_json(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{tensors.path}: {STATED_KEY!r} in the metadata is no JSON object, expected "
            f"diffusers' settings of the adapter. {_AGAIN}"
        )
    return found
