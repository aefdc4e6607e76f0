"""How a checkpoint's images were prepared: mean, deviation, size and interpolation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svftool.checkpoints import Checkpoint, parse_json
from svftool.errors import ModelError, counted, system_fault

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PREPROCESSOR_FILE = "preprocessor_config.json"

LARGEST_SIDE = 8192
"""Pixels of the longest side that a file beside the weights may ask for."""

_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
_MODES = frozenset((*_RESAMPLING.values(), "nearest-exact"))

_SHORT_SIDE = (
    "clip",
    "convnext",
    "levit",
    "mobilenet",
    "mobilevit",
    "poolformer",
    "perceiver",
    "bit",
    "videomae",
    "vivit",
    "dinov2",
    "blip",
    "tvlt",
    "bridgetower",
)
"""Image processors for which a bare number is the short side; for the others it is both."""


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
        Share of the resized short side that the centre crop keeps; above 1 the crop is larger
        than the picture, and is black around it.
    source : str
        Where this was found.
    squash : bool
        Both sides are resized, whatever the image's proportions; otherwise the short side.
    flip_channels : bool
        The network takes blue, green, red.
    crop_down : bool
        Where a crop cannot be central, it is nearer to the upper left, as transformers has it.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    size: tuple[int, int] | None = None
    interpolation: str = "bilinear"
    crop_pct: float | None = None
    source: str = "default"
    squash: bool = False
    flip_channels: bool = False
    crop_down: bool = False


DEFAULT_PREPROCESSING = Preprocessing()


def normalise(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    flip_channels: bool = False,
) -> Tensor:
    """Turn pictures into what a network takes, for every task.

    Parameters
    ----------
    images : (N, 3, H, W) uint8 Tensor
        Red, green and blue.
    mean, std : sequence of float
        Of red, green and blue, for values from 0 to 1.
    flip_channels : bool
        The network takes blue, green, red.

    Returns
    -------
    (N, 3, H, W) float32 Tensor
        Values from 0 to 1, less the mean, over the deviation.
    """
    batch = images.to(torch.float32, copy=True).div_(255)
    centre, spread = (batch.new_tensor(tuple(values)).view(1, -1, 1, 1) for values in (mean, std))
    batch = batch.sub_(centre).div_(spread)
    return batch.flip(1) if flip_channels else batch


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
    ModelError
        If a file that should say it cannot be understood.
    """
    folder = checkpoint.path if checkpoint.is_folder else checkpoint.path.parent
    channels = input_channels(model)
    return _fitted(_find(checkpoint, folder, model, channels), channels)


def _find(
    checkpoint: Checkpoint, folder: Path, model: nn.Module | None, channels: int
) -> Preprocessing:
    if (folder / PREPROCESSOR_FILE).is_file():
        return _read_transformers(folder / PREPROCESSOR_FILE, channels)
    config = checkpoint.config or {}
    for facts, source in (
        (config.get("pretrained_cfg"), "config.json"),
        (getattr(model, "pretrained_cfg", None), "timm"),
    ):
        if isinstance(facts, Mapping) and "mean" in facts:
            with _understood(f"{folder}: pretrained_cfg of {source}"):
                return _from_timm(facts, source, channels)
    return DEFAULT_PREPROCESSING


def input_channels(model: nn.Module | None) -> int:
    """Return how many channels a network takes: those of the convolution that it begins with.

    Three where it begins with something else.
    """
    for module in [] if model is None else model.modules():
        if any(True for _ in module.children()) or not any(True for _ in module.parameters()):
            continue
        # The first layer with weights. A layer of another place that is declared first is wide.
        plain = isinstance(module, nn.Conv2d) and module.in_channels <= MOST_CHANNELS
        return module.in_channels if plain and isinstance(module, nn.Conv2d) else 3
    return 3


MOST_CHANNELS = 256
"""Bands of the widest pictures that there are."""


def _fitted(found: Preprocessing, channels: int) -> Preprocessing:
    """Give mean and deviation to each channel: the mean of those known, where there are others."""
    known = len(found.mean)
    if known == channels:
        return found

    def fitted(values: tuple[float, ...]) -> tuple[float, ...]:
        common = math.fsum(values) / known
        return (
            (*values, *[common] * (channels - known)) if channels > known else (common,) * channels
        )

    return replace(found, mean=fitted(found.mean), std=fitted(found.std), flip_channels=False)


def _read_transformers(file: Path, channels: int) -> Preprocessing:
    with _understood(str(file)):
        return _from_transformers(parse_json(file.read_bytes()), channels)


@contextmanager
def _understood(where: str) -> Iterator[None]:
    """Turn whatever a value of another type leads to into one line."""
    try:
        yield
    except (OSError, LookupError, TypeError, ValueError, *_OVERFLOWS) as error:
        system_fault(error, where)
        text = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{where}: unreadable ({type(error).__name__}: {text}), expected the settings of an "
            "image processor. Remove the file to use ImageNet's, or repair it."
        ) from error


_OVERFLOWS = (AttributeError, OverflowError, RecursionError)


def _from_transformers(facts: Mapping[str, Any], channels: int) -> Preprocessing:
    kind = str(facts.get("image_processor_type") or facts.get("feature_extractor_type") or "")
    kind = kind.lower()
    found = replace(
        _geometry(facts, kind),
        interpolation=_RESAMPLING.get(facts.get("resample", 2), "bilinear"),
        flip_channels=bool(facts.get("do_flip_channel_order", kind.startswith("pplcnet"))),
        crop_down=True,
        source=PREPROCESSOR_FILE,
    )
    mean: tuple[float, ...]
    std: tuple[float, ...]
    normalised = facts.get("do_normalize", not kind.startswith("mobilevit"))
    if not normalised or "image_mean" not in facts:
        mean, std = (0.0,) * 3, (1.0,) * 3
    else:
        mean, std = _normalisation(facts["image_mean"], facts["image_std"], channels)
    if kind.startswith("efficientnet") and facts.get("include_top", True) and normalised:
        # EfficientNet's processor divides by the deviation once more.
        std = tuple(value * value for value in std)
    mean, std = _rescaled(facts, mean, std)
    return replace(found, mean=mean, std=std)


def _geometry(facts: Mapping[str, Any], kind: str) -> Preprocessing:
    """Return what a processor resizes to and crops, by its settings and its class."""
    told = facts.get("size") if facts.get("do_resize", True) else None
    if told is not None and facts.get("resize_short"):
        told = {"shortest_edge": facts["resize_short"]}
    resized = _sides(told)
    bare = isinstance(told, (int, float, str))
    squash = resized is not None and (
        not any(name in kind for name in _SHORT_SIDE) if bare else not _is_short_side(told)
    )
    # The class is not named by old files; they have `size` as the size after cropping.
    squash = squash and bool(kind or not bare)
    cropped = _sides(facts.get("crop_size")) if facts.get("do_center_crop", False) else None
    if kind.startswith("convnext") and resized is not None and not squash:
        if resized[0] >= _CONVNEXT_WHOLE:
            return Preprocessing(size=resized, crop_pct=1.0, squash=True)
        return Preprocessing(size=resized, crop_pct=_share(facts.get("crop_pct") or 0.875))
    if resized is not None and not squash:
        resized = _enlarged(resized, facts, kind)
    if kind.startswith("perceiver") and cropped and resized:
        # It crops the same share before it resizes.
        cropped, resized = resized, cropped
        squash = False
    size = cropped or resized
    share = min(size) / min(resized) if size and resized else None
    return Preprocessing(size=size, crop_pct=share, squash=squash)


_CONVNEXT_WHOLE = 384
"""From this size on, ConvNeXt's processor resizes both sides and crops nothing."""


def _enlarged(resized: tuple[int, int], facts: Mapping[str, Any], kind: str) -> tuple[int, int]:
    """Return the short side that some processors resize to before they crop `size`."""
    if kind.startswith("levit"):  # not MobileViT's, whose name holds it
        return (_side(int(256 / 224 * resized[0])),) * 2
    if kind.startswith("poolformer") and facts.get("crop_pct"):
        return (_side(int(resized[0] / _share(facts["crop_pct"]))),) * 2
    return resized


def _rescaled(
    facts: Mapping[str, Any], mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Express a processor's own scale of pixels by mean and deviation for values from 0 to 1."""
    factor = float(facts.get("rescale_factor") or 1 / 255) if facts.get("do_rescale", True) else 1.0
    scale = factor * 255
    if not math.isfinite(scale) or scale <= 0.0:
        raise ValueError(f"rescale_factor is {factor}")
    offset = 1.0 if facts.get("rescale_offset") else 0.0
    if not offset and math.isclose(scale, 1.0, rel_tol=1e-6):
        return mean, std
    return (
        tuple((value + offset) / scale for value in mean),
        tuple(value / scale for value in std),
    )


def _is_short_side(size: Any) -> bool:
    return isinstance(size, Mapping) and "height" not in size


def _sides(size: Any) -> tuple[int, int] | None:
    """Read height and width from a number, or from one of the dictionaries that are in use."""
    if size is None:
        return None
    if isinstance(size, (int, float, str)):
        return _side(size), _side(size)
    if isinstance(size, (list, tuple)):
        return _side(size[0]), _side(size[1])
    if "height" in size:
        return _side(size["height"]), _side(size["width"])
    side = size.get("shortest_edge")
    return None if side is None else (_side(side), _side(side))


def _side(value: Any) -> int:
    side = int(value)
    if isinstance(value, bool) or not 1 <= side <= LARGEST_SIDE:
        raise ValueError(f"a side of {str(value)[:40]} pixels, expected 1 to {LARGEST_SIDE}")
    return side


def _share(value: Any) -> float:
    share = float(value)
    if isinstance(value, bool) or not 0.01 <= share <= 100.0:
        raise ValueError(f"crop_pct is {str(value)[:40]}, expected a share such as 0.875")
    return share


def _normalisation(
    mean: Any, std: Any, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    means, deviations = _channels(mean, channels), _channels(std, channels)
    if not all(map(math.isfinite, means)):
        raise ValueError(f"the mean is {means}")
    if not all(math.isfinite(value) and value > 0.0 for value in deviations):
        raise ValueError(f"the deviation is {deviations}, expected positive numbers")
    return means, deviations


def _channels(values: Any, channels: int) -> tuple[float, ...]:
    numbers = values if isinstance(values, (list, tuple)) else [values]
    if len(numbers) not in {1, 3, channels}:
        raise ValueError(f"{counted(len(numbers), 'channels')}, expected {channels}")
    return tuple(float(number) for number in (numbers * channels if len(numbers) == 1 else numbers))


def _from_timm(facts: Mapping[str, Any], source: str, channels: int) -> Preprocessing:
    size = facts.get("input_size")
    mean, std = _normalisation(facts["mean"], facts["std"], channels)
    mode = str(facts.get("interpolation") or "bilinear")
    if mode == "random":
        mode = "bilinear"
    if mode not in _MODES:
        raise ValueError(f"interpolation is {mode[:40]!r}, expected {', '.join(sorted(_MODES))}")
    return Preprocessing(
        mean=mean,
        std=std,
        size=(_side(size[1]), _side(size[2])) if size else None,
        interpolation=mode,
        crop_pct=_share(facts["crop_pct"]) if facts.get("crop_pct") else None,
        squash=facts.get("crop_mode") == "squash",
        source=source,
    )
