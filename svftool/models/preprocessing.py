"""How a checkpoint's images were prepared: mean, deviation, size and interpolation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from svftool.checkpoints import Checkpoint
from svftool.errors import CheckpointError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PREPROCESSOR_FILE = "preprocessor_config.json"

_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


@dataclass(frozen=True)
class Preprocessing:
    """What happens to an image before the network sees it.

    Attributes
    ----------
    mean, std : tuple of float
        Of each channel, for values from 0 to 1.
    size : (int, int) or None
        Height and width that the network takes; None where nothing says.
    interpolation : str
        As in `torchvision.transforms.InterpolationMode`.
    crop_pct : float or None
        Share of the resized short side that the centre crop keeps.
    source : str
        Where this was found.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    size: tuple[int, int] | None = None
    interpolation: str = "bilinear"
    crop_pct: float | None = None
    source: str = "default"


DEFAULT_PREPROCESSING = Preprocessing()


def find_preprocessing(checkpoint: Checkpoint, model: nn.Module | None = None) -> Preprocessing:
    """Return the preprocessing that belongs to a checkpoint.

    Looked for in ``preprocessor_config.json`` beside the weights (transformers), in the
    ``pretrained_cfg`` of ``config.json`` or of the model (timm); ImageNet's otherwise.

    Parameters
    ----------
    checkpoint : Checkpoint
        The weights.
    model : nn.Module, optional
        The model built for them.

    Raises
    ------
    CheckpointError
        If a file that should say it cannot be understood.
    """
    folder = checkpoint.path if checkpoint.is_folder else checkpoint.path.parent
    if (folder / PREPROCESSOR_FILE).is_file():
        return _read_transformers(folder / PREPROCESSOR_FILE)
    config = checkpoint.config or {}
    for facts, source in (
        (config.get("pretrained_cfg"), "config.json"),
        (getattr(model, "pretrained_cfg", None), "timm"),
    ):
        if isinstance(facts, Mapping) and "mean" in facts:
            return _from_timm(facts, source)
    return DEFAULT_PREPROCESSING


def _read_transformers(file: Path) -> Preprocessing:
    try:
        return _from_transformers(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{file}: unreadable ({type(error).__name__}: {error}), expected the settings of an "
            "image processor. Remove the file to use ImageNet's, or repair it."
        ) from error


def _from_transformers(facts: Mapping[str, Any]) -> Preprocessing:
    normalised = bool(facts.get("do_normalize", True)) and "image_mean" in facts
    resized = _sides(facts.get("size")) if facts.get("do_resize", True) else None
    cropped = _sides(facts.get("crop_size")) if facts.get("do_center_crop", False) else None
    size = cropped or resized
    share = min(1.0, min(size) / min(resized)) if size and resized else None
    return Preprocessing(
        mean=_channels(facts["image_mean"]) if normalised else (0.0, 0.0, 0.0),
        std=_channels(facts["image_std"]) if normalised else (1.0, 1.0, 1.0),
        size=size,
        interpolation=_RESAMPLING.get(facts.get("resample", 2), "bilinear"),
        crop_pct=share,
        source=PREPROCESSOR_FILE,
    )


def _sides(size: Any) -> tuple[int, int] | None:
    """Read height and width from a number, or from one of the dictionaries that are in use."""
    if size is None:
        return None
    if isinstance(size, int):
        return size, size
    if isinstance(size, (list, tuple)):
        return int(size[0]), int(size[1])
    if "height" in size:
        return int(size["height"]), int(size["width"])
    side = size.get("shortest_edge")
    return None if side is None else (int(side), int(side))


def _channels(values: Any) -> tuple[float, ...]:
    numbers = values if isinstance(values, (list, tuple)) else [values] * 3
    return tuple(float(number) for number in numbers)


def _from_timm(facts: Mapping[str, Any], source: str) -> Preprocessing:
    size = facts.get("input_size")
    return Preprocessing(
        mean=_channels(facts["mean"]),
        std=_channels(facts["std"]),
        size=(int(size[1]), int(size[2])) if size else None,
        interpolation=str(facts.get("interpolation") or "bilinear"),
        crop_pct=float(facts["crop_pct"]) if facts.get("crop_pct") else None,
        source=source,
    )
