"""Which models of timm and torchvision a checkpoint fits: by names and shapes, without weights."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from svftool.checkpoints import Checkpoint
from svftool.errors import SvftoolError
from svftool.models.load import differences

Build = Callable[[str, Checkpoint], nn.Module]

SECONDS = 4.0
"""Time of this process's cores that one library's models are searched for at most."""
MOST = 32
"""Models of one library that are built at most."""

_TORCHVISION = (
    ("layer1.0.conv1.weight", ("resnet", "wide_resnet", "resnext")),
    ("features.0.0.weight", ("mobilenet", "convnext", "swin", "efficientnet")),
    ("features.0.weight", ("vgg", "alexnet", "squeezenet")),
    ("features.conv0.weight", ("densenet",)),
    ("encoder.layers.encoder_layer_0.ln_1.weight", ("vit",)),
    ("layers.0.weight", ("mnasnet",)),
    ("stem.0.weight", ("regnet",)),
    ("conv1.0.weight", ("shufflenet",)),
    ("Conv2d_1a_3x3.conv.weight", ("inception",)),
    ("conv1.conv.weight", ("googlenet",)),
    ("stem.0.0.weight", ("maxvit",)),
    ("backbone.conv1.weight", ("fcn", "deeplabv3_resnet")),
    ("backbone.0.0.weight", ("lraspp", "deeplabv3_mobilenet")),
)
"""A tensor that tells a family by its name, and how the names of its models begin."""

_DEPTHS: dict[tuple[int, ...], tuple[int, ...]] = {
    (1, 1, 1, 1): (10, 14),
    (2, 2, 2, 2): (18, 26),
    (3, 4, 6, 3): (34, 50),
    (3, 4, 23, 3): (101,),
    (3, 8, 36, 3): (152,),
}
"""Blocks of the stages of a ResNet to its layers, with two and with three convolutions a block."""
_WIDTHS = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}
"""What vision transformers are called by their width."""


def proposals(checkpoint: Checkpoint, builders: dict[str, Build]) -> list[str]:
    """Find a model of each library whose tensors are those of a checkpoint, shape by shape.

    The search is bounded by `SECONDS` and `MOST`: what it does not find may still exist.

    Parameters
    ----------
    checkpoint : Checkpoint
        Only names and shapes are read.
    builders : dict of str to callable
        What builds a model of a library by its name, with the checkpoint's number of classes.

    Returns
    -------
    list of str
        Such as ``timm:resnet18``; empty where none fits.
    """
    names = {"timm": _timm_names, "torchvision": _torchvision_names}
    shapes = {
        name.removeprefix(checkpoint.prefix): info.shape for name, info in checkpoint.infos.items()
    }
    found = ((library, _first(checkpoint, names[library](shapes), builders[library]))
             for library in builders)  # fmt: skip
    return [f"{library}:{name}" for library, name in found if name is not None]


def _first(checkpoint: Checkpoint, names: Iterator[str], build: Build) -> str | None:
    begun = time.process_time()
    for count, name in enumerate(names):
        if count == MOST or time.process_time() - begun > SECONDS:
            return None
        try:
            with torch.device("meta"):
                model = build(name, checkpoint)
        except (SvftoolError, RuntimeError, NotImplementedError):  # it cannot be built like this
            continue
        if not any(differences(model, checkpoint).values()):
            return name
    return None


def _torchvision_names(shapes: dict[str, tuple[int, ...]]) -> Iterator[str]:
    starts = next((starts for tensor, starts in _TORCHVISION if tensor in shapes), ())
    if not starts:
        return
    try:
        from torchvision import models
    except ImportError:
        return
    modules = (models, models.segmentation)
    known = [name for module in modules for name in models.list_models(module=module)]
    yield from _ordered([name for name in known if name.startswith(starts)], shapes)


def _timm_names(shapes: dict[str, tuple[int, ...]]) -> Iterator[str]:
    try:
        import timm
    except ImportError:
        return
    known = ((name, timm.get_pretrained_cfg(name)) for name in timm.list_models())
    yield from _ordered([name for name, facts in known if _may_fit(facts, shapes)], shapes)


def _may_fit(facts: Any, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether the first layer and the head that timm tells of a model are in the checkpoint."""
    first, head = _listed(facts, "first_conv"), _listed(facts, "classifier")
    headless = not any(name.startswith(("fc.", "head", "classifier")) for name in shapes)
    return bool(first) and all(
        f"{name}.weight" in shapes for name in [*first, *([] if headless else head)]
    )


def _listed(facts: Any, key: str) -> list[str]:
    value = getattr(facts, key, None) or ()
    return [value] if isinstance(value, str) else list(value)


def _ordered(names: list[str], shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Put first what the shapes speak for; then families take turns, the shorter names first."""
    hints, turns = list(_hints(shapes)), Counter[tuple[str, int]]()
    found = []
    for name in sorted(names, key=lambda name: (len(name), name)):
        family, *words = re.findall(r"[a-z]+|\d+", name)
        agreed = sum(hint in words for hint in hints)
        turns[family, agreed] += 1
        found.append((-agreed, turns[family, agreed], name))
    return [name for _, _, name in sorted(found, key=lambda one: one[:2])]


def _hints(shapes: dict[str, tuple[int, ...]]) -> Iterator[str]:
    """Yield parts of names that depths, widths and sizes of patches speak for."""
    stages = tuple(len(set(_numbers(shapes, rf"layer{stage}\.(\d+)\."))) for stage in range(1, 5))
    depths = _DEPTHS.get(stages, ())
    yield from (
        str(depth) for depth in depths[-1 if "layer1.0.conv3.weight" in shapes else 0 :][:1]
    )
    patch = shapes.get("patch_embed.proj.weight", ())
    if len(patch) == 4:
        yield from (_WIDTHS.get(patch[0], ""), str(patch[-1]))
        places = shapes.get("pos_embed", (1, 0, 0))[-2]
        yield str(int(places**0.5) * patch[-1])


def _numbers(shapes: dict[str, tuple[int, ...]], pattern: str) -> Iterator[int]:
    found = (re.match(pattern, name) for name in shapes)
    return (int(match[1]) for match in found if match)
