"""How each layout writes the change of a tensor: under which keys, in which shape, or not at all.

A writer is made for one base and the tensors of it that changed. It says of each whether the layout
holds it as two thin matrices, whole, or not; then it gives the entries of the file.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from svftool.adapters.low_rank import LowRank
from svftool.adapters.parts import BaseModel
from svftool.adapters.peft import STEM
from svftool.adapters.peft_config import CONFIG_FILE
from svftool.checkpoints import TensorInfo, is_expert_stack, table_role
from svftool.checkpoints.dtypes import DECOMPOSABLE
from svftool.errors import CheckpointError, UsageError, no_such

Kind = Literal["low rank", "whole", "dropped"]
Entries = dict[str, Tensor]


@dataclass(frozen=True)
class Fate:
    """What becomes of one changed tensor.

    Attributes
    ----------
    kind : {"low rank", "whole", "dropped"}
    reason : str
        Why it is dropped.
    turned : bool
        Whether the matrices are those of the transpose.
    """

    kind: Kind
    reason: str = ""
    turned: bool = False


LOW_RANK, WHOLE = Fate("low rank"), Fate("whole")
COMMENT_KEY = "ss_training_comment"
MADE_KEY = "made_by"
"""Metadata that say which command wrote an adapter."""


class LayoutWriter(ABC):
    """One layout.

    Attributes
    ----------
    name : str
        As ``--layout`` has it.
    is_folder : bool
        Whether its output is a folder.
    has_scale : bool
        Whether it stores the scale of a layer; else layers must have scale 1.
    fates : mapping of str to Fate
        By the name of every changed tensor.
    """

    name: ClassVar[str]
    is_folder: ClassVar[bool] = False
    has_scale: ClassVar[bool] = False

    def __init__(self, base: BaseModel, changed: Collection[str]) -> None:
        self.base = base
        self.fates: Mapping[str, Fate] = self._fates(changed)

    @property
    def companions(self) -> tuple[str, ...]:
        """Tensors that did not change and must be stored along."""
        return ()

    @property
    def weights_file(self) -> str:
        """Name of the weight file, where the output is a folder."""
        return f"{STEM}.safetensors"

    @abstractmethod
    def entries(self, layer: LowRank) -> Entries:
        """Return the entries of a change of low rank."""

    @abstractmethod
    def whole(self, name: str, base: Tensor, tuned: Tensor, dtype: torch.dtype) -> Entries:
        """Return the entries of a tensor that is stored whole."""

    def metadata(self, ranks: Mapping[str, int], about: str) -> dict[str, str]:
        """Return the metadata of the file."""
        return {"format": "pt", MADE_KEY: about}

    def config(self, ranks: Mapping[str, int]) -> dict[str, Any] | None:
        """Return what stands beside the weights; None where nothing does."""
        return None

    @abstractmethod
    def _fate(self, info: TensorInfo) -> Fate: ...

    def _fates(self, changed: Collection[str]) -> dict[str, Fate]:
        return {name: self._fate(self.base.infos[name]) for name in changed}

    def _is_layer(self, info: TensorInfo) -> bool:
        """Tell the weights of linear layers, convolutions and embeddings."""
        return (
            info.name.endswith(".weight")
            and 2 <= len(info.shape) <= 5
            and min(info.shape) > 0
            and info.dtype in DECOMPOSABLE
            and not self._is_stack(info)
        )

    def _is_stack(self, info: TensorInfo) -> bool:
        return is_expert_stack(info, self.base.config)

    def _thin(self, layer: LowRank) -> tuple[Tensor, Tensor]:
        """Return both matrices in the shapes of a layer's own: a convolution's are convolutions."""
        shape = self.base.infos[layer.name].shape
        if self.fates[layer.name].turned:
            return layer.A.mT.contiguous(), layer.B.mT.contiguous()
        flat = layer.B, layer.A
        if len(shape) == 2:
            return flat
        ones = (1,) * (len(shape) - 2)
        return flat[0].reshape(*flat[0].shape, *ones), flat[1].reshape(layer.rank, *shape[1:])


_IN_OUT = frozenset(("gpt2", "openai-gpt", "imagegpt", "decision_transformer"))
"""Model types whose projections hold their weights as (in, out)."""
_CONV1D = re.compile(r"(^|\.)(c_attn|c_proj|c_fc|q_attn)\.weight$")


class PeftWriter(LayoutWriter):
    """PEFT's folder: ``adapter_config.json`` and ``adapter_model.safetensors``."""

    name = "peft"
    is_folder = True

    def entries(self, layer: LowRank) -> Entries:
        """Return the entries of a change of low rank."""
        up, down = self._thin(layer)
        part = ("lora_A", "lora_B")
        ending = ".weight"
        if self._is_embedding(self.base.infos[layer.name]):
            part, ending = ("lora_embedding_A", "lora_embedding_B"), ""
        module = f"base_model.model.{self._module(layer.name)}"
        return {f"{module}.{part[0]}{ending}": down, f"{module}.{part[1]}{ending}": up}

    def whole(self, name: str, base: Tensor, tuned: Tensor, dtype: torch.dtype) -> Entries:
        """Return the entries of a tensor that is stored whole: the tensor itself."""
        module, _, part = self.base.live(name).rpartition(".")
        inside = ".base_layer" if f"{module}.weight" in self._adapted else ""
        return {f"base_model.model.{module}{inside}.{part}": tuned.contiguous()}

    @property
    def companions(self) -> tuple[str, ...]:
        """Tensors of the saved modules that did not change: PEFT loads modules as a whole."""
        inside = {name for module in self._saved for name in self._own(module)}
        return tuple(name for name in self.base.infos if name in inside - set(self.fates))

    def config(self, ranks: Mapping[str, int]) -> dict[str, Any]:
        """Return ``adapter_config.json``."""
        modules = {self._module(name): rank for name, rank in ranks.items()}
        common = max(modules.values(), key=list(modules.values()).count, default=1)
        # PEFT takes the first key that ends a module's name, so the longest must come first.
        others = {
            re.escape(module): rank
            for module, rank in sorted(modules.items(), key=lambda one: (-len(one[0]), one[0]))
            if rank != common or self._ends_another(module, modules)
        }
        return {
            "peft_type": "LORA",
            "base_model_name_or_path": self.base.path,
            "task_type": None,
            "inference_mode": True,
            "r": common,
            "lora_alpha": common,
            "lora_dropout": 0.0,
            "rank_pattern": others,
            "alpha_pattern": dict(others),
            "target_modules": self._targets(modules),
            "modules_to_save": sorted(self._saved) or None,
            "bias": "all" if self._has_biases() else "none",
            "fan_in_fan_out": any(
                fate.turned and not self._is_embedding(self.base.infos[name])
                for name, fate in self.fates.items()
            ),
            "init_lora_weights": True,
            "use_rslora": False,
            "use_dora": False,
        }

    def _fates(self, changed: Collection[str]) -> dict[str, Fate]:
        found = {name: self._fate(self.base.infos[name]) for name in changed}
        self._adapted = {
            self.base.live(name) for name, fate in found.items() if fate.kind == "low rank"
        }
        self._saved: set[str] = set()
        for name, fate in found.items():
            if fate.kind != "low rank" and not self._is_bias_of_layer(name):
                found[name] = self._saved_fate(name)
        # Another module that ends in the same name is saved along with it.
        for module in tuple(self._saved):
            self._saved |= {one for one in self._modules() if one.endswith(module)}
        return found

    def _fate(self, info: TensorInfo) -> Fate:
        depthwise = len(info.shape) > 2 and info.shape[1] == 1
        if not self._is_layer(info) or depthwise:
            return WHOLE
        turned = self._is_embedding(info) or self._is_in_out(info)
        return Fate("low rank", turned=turned)

    def _saved_fate(self, name: str) -> Fate:
        """Decide on what is no layer: its module is saved whole where PEFT can do that."""
        info = self.base.infos[name]
        module = self.base.live(name).rpartition(".")[0]
        if self._is_stack(info):
            return Fate("dropped", "a stack of experts, no layer of its own")
        if not module:
            return Fate("dropped", "a parameter of the whole model, which PEFT cannot save")
        alike = [one for one in self._modules() if one.endswith(module)]
        inner = [one for one in self._modules() if any(one.startswith(f"{m}.") for m in alike)]
        if inner or any(f"{one}.weight" in self._adapted for one in alike):
            return Fate("dropped", f"a parameter of {module}, which holds layers of its own")
        self._saved.add(module)
        return WHOLE

    def _modules(self) -> set[str]:
        if not hasattr(self, "_all_modules"):
            self._all_modules = {
                self.base.live(name).rpartition(".")[0] for name in self.base.infos
            }
        return self._all_modules

    def _own(self, module: str) -> list[str]:
        return [n for n in self.base.infos if self.base.live(n).rpartition(".")[0] == module]

    def _is_bias_of_layer(self, name: str) -> bool:
        module, _, part = self.base.live(name).rpartition(".")
        weight = self.base.infos.get(name.removesuffix("bias") + "weight")
        return part == "bias" and weight is not None and len(weight.shape) > 1 and bool(module)

    def _has_biases(self) -> bool:
        return any(
            self._is_bias_of_layer(name) and fate.kind == "whole"
            for name, fate in self.fates.items()
        )

    def _module(self, name: str) -> str:
        return self.base.live(name).removesuffix(".weight")

    def _is_embedding(self, info: TensorInfo) -> bool:
        return len(info.shape) == 2 and table_role(info) is not None

    def _is_in_out(self, info: TensorInfo) -> bool:
        if len(info.shape) != 2 or not _CONV1D.search(info.name):
            return False
        kind = self.base.config.get("model_type")
        if kind is not None:
            return kind in _IN_OUT
        joint = [
            one.shape for one in self.base.infos.values() if one.name.endswith("c_attn.weight")
        ]
        return any(one[1] == 3 * one[0] for one in joint if len(one) == 2)

    def _ends_another(self, module: str, modules: Mapping[str, int]) -> bool:
        return any(
            other.endswith(f".{module}") or module.endswith(f".{other}") for other in modules
        )

    def _targets(self, modules: Collection[str]) -> list[str] | str:
        """List all names; as one pattern where a name would also fit the end of another's."""
        tails = {
            tail
            for one in self._modules() - set(modules)
            for tail in (one[at + 1 :] for at, sign in enumerate(one) if sign == ".")
        }
        if tails.isdisjoint(modules):
            return sorted(modules)
        return f"({'|'.join(map(re.escape, sorted(modules)))})"


class _PipelineWriter(LayoutWriter):
    """Layouts of image and video generators, which name the part of the pipeline first."""

    def part(self, name: str) -> tuple[str, str]:
        """Split a name into the part of a pipeline and the module or tensor within it."""
        return self.base.part(name)

    def _fate(self, info: TensorInfo) -> Fate:
        if self._is_layer(info) and table_role(info) is None:
            return LOW_RANK
        return Fate("dropped", f"the {self.name} layout holds changes of layers' weights alone")

    def whole(self, name: str, base: Tensor, tuned: Tensor, dtype: torch.dtype) -> Entries:
        """Hold nothing whole."""
        raise ValueError(f"{name}: the {self.name} layout holds nothing whole")


class KohyaWriter(_PipelineWriter):
    """``lora_unet_X_Y.lora_down.weight``, ``.lora_up.weight`` and ``.alpha``."""

    name = "kohya"
    has_scale = True

    def __init__(self, base: BaseModel, changed: Collection[str]) -> None:
        super().__init__(base, changed)
        self._check_apart()

    def module(self, name: str) -> str:
        """Return the one word that stands for a module."""
        part, rest = self.part(name)
        several = any(self.base.live(one).startswith(_SECOND) for one in self.base.infos)
        prefix = {
            "text_encoder": "lora_te1" if several else "lora_te",
            "text_encoder_2": "lora_te2",
            "text_encoder_3": "lora_te3",
        }.get(part, "lora_unet")
        return f"{prefix}_{rest.removesuffix('.weight').replace('.', '_')}"

    def entries(self, layer: LowRank) -> Entries:
        """Return the entries of a change of low rank."""
        up, down = self._thin(layer)
        module = self.module(layer.name)
        return {
            f"{module}.lora_down.weight": down,
            f"{module}.lora_up.weight": up,
            f"{module}.alpha": alpha_of(layer),
        }

    def metadata(self, ranks: Mapping[str, int], about: str) -> dict[str, str]:
        """Return what kohya's tools look for."""
        return kohya_metadata(dict.fromkeys(ranks.values(), 1.0), about)

    def _check_apart(self) -> None:
        seen: dict[str, str] = {}
        for name, fate in self.fates.items():
            if fate.kind != "dropped":
                module = self.module(name)
                if module in seen:
                    raise CheckpointError(
                        f"{self.base.path}: {seen[module]!r} and {name!r} are both {module!r} in "
                        "the kohya layout, expected names apart. Choose another --layout."
                    )
                seen[module] = name


_SECOND = ("text_encoder_2.", "conditioner.embedders.1.")


class ComfyWriter(_PipelineWriter):
    """``diffusion_model.X.lora_down.weight``; what is no layer as ``.diff`` and ``.diff_b``."""

    name = "comfy"

    def entries(self, layer: LowRank) -> Entries:
        """Return the entries of a change of low rank."""
        up, down = self._thin(layer)
        module = self._key(layer.name).removesuffix(".weight")
        return {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}

    def whole(self, name: str, base: Tensor, tuned: Tensor, dtype: torch.dtype) -> Entries:
        """Return the difference."""
        key, value = self._key(name), (tuned.double() - base.double()).to(dtype)
        if key.endswith(".bias"):
            return {f"{key.removesuffix('.bias')}.diff_b": value}
        return {f"{key.removesuffix('.weight')}.diff": value}

    def _key(self, name: str) -> str:
        return f"diffusion_model.{self.part(name)[1]}"

    def _fate(self, info: TensorInfo) -> Fate:
        if self.part(info.name)[0].startswith("text_encoder"):
            return Fate("dropped", "a text encoder, which the comfy layout has no name for")
        if not info.dtype.is_floating_point:
            return Fate("dropped", "no floating numbers, of which the comfy layout holds changes")
        return LOW_RANK if self._is_layer(info) else WHOLE


class DiffusersWriter(_PipelineWriter):
    """``unet.X.lora_A.weight`` and ``lora_B.weight``; alpha is the rank."""

    name = "diffusers"

    def entries(self, layer: LowRank) -> Entries:
        """Return the entries of a change of low rank."""
        up, down = self._thin(layer)
        part, rest = self.part(layer.name)
        module = f"{part}.{rest.removesuffix('.weight')}"
        return {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}


def kohya_metadata(scales: Mapping[int, float], about: str) -> dict[str, str]:
    """Return what kohya's tools look for.

    Parameters
    ----------
    scales : mapping of int to float
        Scale of the layers by their rank.
    about : str
        What was done.
    """
    several = len(scales) > 1
    rank, scale = next(iter(scales.items()), (1, 1.0))
    return {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "Dynamic" if several else str(rank),
        "ss_network_alpha": "Dynamic" if several else f"{rank * scale:g}",
        COMMENT_KEY: about,
    }


def alpha_of(layer: LowRank) -> Tensor:
    """Return alpha, in the dtype of the matrices where that holds it."""
    alpha = torch.tensor(layer.rank * layer.scale, dtype=torch.float64)
    narrow = alpha.to(layer.B.dtype)
    return narrow if torch.equal(narrow.double(), alpha) else alpha.float()


LAYOUTS: dict[str, type[LayoutWriter]] = {
    one.name: one for one in (PeftWriter, KohyaWriter, ComfyWriter, DiffusersWriter)
}


def layout_writer(name: str) -> type[LayoutWriter]:
    """Return the writer of a layout.

    Raises
    ------
    UsageError
        If there is none.
    """
    if name not in LAYOUTS:
        raise UsageError(no_such("layout", name, LAYOUTS))
    return LAYOUTS[name]


__all__ = [
    "CONFIG_FILE",
    "LAYOUTS",
    "BaseModel",
    "ComfyWriter",
    "DiffusersWriter",
    "Fate",
    "KohyaWriter",
    "LayoutWriter",
    "PeftWriter",
    "layout_writer",
]
