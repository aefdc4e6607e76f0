"""Which part of a pipeline a tensor of a base belongs to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePath
from typing import Any

from svftool.checkpoints import TensorInfo, wrapper_prefix

DENOISER = "denoiser"
"""What an adapter's file calls ``unet``, ``transformer`` or ``diffusion_model``."""

_PREFIXES: tuple[tuple[str, str], ...] = (
    ("model.diffusion_model.", "unet"),
    ("diffusion_model.", "unet"),
    ("unet.", "unet"),
    ("cond_stage_model.transformer.", "text_encoder"),
    ("conditioner.embedders.0.transformer.", "text_encoder"),
    ("conditioner.embedders.1.model.", "text_encoder_2"),
    ("text_encoder.", "text_encoder"),
    ("text_encoder_2.", "text_encoder_2"),
    ("text_encoder_3.", "text_encoder_3"),
)
_CLASSES = (("CLIPText", "text_encoder"), ("T5Encoder", "text_encoder"), ("UNet", "unet"))
_UNET = re.compile(r"(^|\.)(down_blocks|up_blocks|mid_block|input_blocks|output_blocks)\.")
_FOLDER = re.compile(r"unet|transformer(_\d)?|text_encoder(_\d)?")


@dataclass(frozen=True)
class BaseModel:
    """What a writer knows of the base.

    Attributes
    ----------
    infos : mapping of str to TensorInfo
    config : mapping
        ``config.json``; empty where there is none.
    path : str
        What the user called it.
    parts : mapping of str to (str, str)
        Part of a pipeline and the name within it, of tensors where they are known.
    renamed : mapping of str to str
        What the live model calls tensors, where that is something else.
    """

    infos: Mapping[str, TensorInfo]
    config: Mapping[str, Any] = field(default_factory=dict)
    path: str = ""
    parts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def _wrapper(self) -> str:
        return wrapper_prefix(self.infos)

    def live(self, name: str) -> str:
        """Return the name on the live model, without what wrappers put before all names."""
        return self.renamed.get(name) or name.removeprefix(self._wrapper)

    def part(self, name: str) -> tuple[str, str]:
        """Split a name into the part of a pipeline and the module or tensor within it."""
        if name in self.parts:
            return self.parts[name]
        live = self.live(name)
        for prefix, part in _PREFIXES:
            if live.startswith(prefix):
                return part, live.removeprefix(prefix)
        return self._part_of_all, live

    @cached_property
    def _part_of_all(self) -> str:
        stated = [self.config.get("_class_name"), *self._architectures()]
        folder = PurePath(self.path).name
        found = next(
            (part for one in stated if one for word, part in _CLASSES if word in str(one)), None
        )
        if _FOLDER.fullmatch(folder) and (found is None or folder.startswith(found)):
            return folder
        if found is not None:
            return found
        names = [self.live(name) for name in self.infos]
        if names and all(name.startswith("text_model.") for name in names):
            return "text_encoder"
        return "unet" if any(map(_UNET.search, names)) else "transformer"

    def _architectures(self) -> list[str]:
        found = self.config.get("architectures")
        return found if isinstance(found, list) else []


def role_of(part: str) -> str:
    """Return the part as adapters tell them apart: text encoders by number, or the denoiser.

    Examples
    --------
    >>> role_of("transformer"), role_of("text_encoder_2")
    ('denoiser', 'text_encoder_2')
    """
    return part if part.startswith("text_encoder") else DENOISER
