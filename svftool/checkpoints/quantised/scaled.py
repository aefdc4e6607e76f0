"""Narrow floats and whole numbers with scales: one a tensor, a row, or a block.

``W = (codes - zero point) * scale``, as compressed-tensors, transformers' ``fp8``, DeepSeek's
checkpoints and ComfyUI's scaled fp8 have it: whatever the scale's name, it multiplies.
https://github.com/vllm-project/compressed-tensors (``quantization/lifecycle/forward.py``),
https://huggingface.co/deepseek-ai/DeepSeek-V3 (``inference/kernel.py``, ``weight_dequant``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from svftool.checkpoints.base import TensorInfo
from svftool.checkpoints.dtypes import FLOAT8, dtype_name
from svftool.checkpoints.quantised.coded import SCALES, Coded, Numbers, StoredParts
from svftool.numerics.rounding import spacing

Block = tuple[int, int]

_USUAL_BLOCK = (128, 128)
_E8M0 = getattr(torch, "float8_e8m0fnu", torch.uint8)
_KNOWN = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})
_ENDS = ("_scale_inv", "_scale")


def scaled(source: StoredParts) -> Iterator[Coded]:
    """Find narrow floats and signed bytes beside which scales lie."""
    blocks = _stated_blocks(source.config)
    for name, info in source.infos.items():
        if info.layout != "dense" or not (info.dtype in _KNOWN or info.dtype == torch.int8):
            continue
        scale = _scale_of(source, name)
        if scale is None or len(info.shape) < 2:
            continue
        block = _block(info.shape, scale.shape, blocks)
        if block is None:
            continue
        parts = {"codes": name, "scale": scale.name}
        zero = source.infos.get(f"{name}_zero_point")
        if zero is not None:
            if info.dtype in FLOAT8 or zero.shape != scale.shape or zero.dtype != torch.int8:
                continue
            parts["zero"] = zero.name
        storage = f"{dtype_name(info.dtype)} with {_say(scale.shape, block, info.shape)}"
        yield Coded(name, info.shape, storage, parts, partial(_decode, block=block))


def _scale_of(source: StoredParts, name: str) -> TensorInfo | None:
    owner, _, last = name.rpartition(".")
    names = [name + end for end in _ENDS]
    if last == "weight":
        names.append(f"{owner}.scale_weight")
    kinds = (*SCALES, _E8M0)
    found = [one for one in (source.get(each, *kinds) for each in names) if one is not None]
    return found[0] if len(found) == 1 else None


def _stated_blocks(config: Mapping[str, Any]) -> list[Block]:
    """List the block shapes that a configuration states, at its top or in a group of layers."""
    groups = config.get("config_groups")
    places = [config, *(groups.values() if isinstance(groups, Mapping) else ())]
    found = []
    for place in places:
        weights = place.get("weights", place) if isinstance(place, Mapping) else {}
        for key in ("weight_block_size", "block_structure"):
            stated = weights.get(key) if isinstance(weights, Mapping) else None
            if isinstance(stated, str):
                stated = [int(side) for side in stated.split("x") if side.isdigit()]
            sides = stated if isinstance(stated, list) else []
            if len(sides) == 2 and all(isinstance(side, int) and side > 0 for side in sides):
                found.append((sides[0], sides[1]))
    return found


def _block(shape: tuple[int, ...], scale: tuple[int, ...], stated: list[Block]) -> Block | None:
    """Return the block of one scale in the last two dimensions; None where it is not certain."""
    rows, columns = shape[-2:]
    lead = shape[:-2]
    if all(side == 1 for side in scale) and (not lead or len(scale) < 2):
        return rows, columns
    if scale == (rows,) and not lead:
        return 1, columns
    if scale[:-2] != lead or len(scale) != len(shape):
        return None
    fitting = {
        block
        for block in (stated or _likely(shape, scale))
        if (_count(rows, block[0]), _count(columns, block[1])) == scale[-2:]
    }
    if scale[-2:] in ((rows, 1), (1, 1)):
        fitting = {(_count(rows, scale[-2]), columns)}
    return fitting.pop() if len(fitting) == 1 else None


def _likely(shape: tuple[int, ...], scale: tuple[int, ...]) -> list[Block]:
    """List the block shapes that a grid of scales may have: even parts, and the usual one."""
    even = [
        side // parts if parts and side % parts == 0 else usual
        for side, parts, usual in zip(shape[-2:], scale[-2:], _USUAL_BLOCK, strict=True)
    ]
    return [(even[0], even[1]), _USUAL_BLOCK]


def _count(side: int, block: int) -> int:
    return -(-side // max(1, block))


def _say(scale: tuple[int, ...], block: Block, shape: tuple[int, ...]) -> str:
    if block == (shape[-2], shape[-1]):
        return "a scale"
    if block == (1, shape[-1]):
        return "a scale a row"
    return f"a scale a block of {block[0]} x {block[1]}"


def _decode(parts: Mapping[str, Tensor], *, block: Block) -> Numbers:
    codes = parts["codes"]
    scale = _spread(parts["scale"].float(), block, codes.shape)
    values = codes.float()
    if "zero" in parts:
        values -= _spread(parts["zero"].float(), block, codes.shape)

    def step() -> Tensor:
        whole = codes.dtype == torch.int8
        return (torch.ones(1) if whole else spacing(codes.float(), codes.dtype)) * scale.abs()

    return Numbers(values.mul_(scale), step)


def _spread(scale: Tensor, block: Block, shape: tuple[int, ...]) -> Tensor:
    """Give each entry its scale; what is one for all stays small."""
    rows, columns = shape[-2:]
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.ndim < 2:
        return scale.unsqueeze(-1)
    if block[0] > 1:
        scale = scale.repeat_interleave(block[0], dim=-2)[..., :rows, :]
    if scale.shape[-1] > 1:
        scale = scale.repeat_interleave(block[1], dim=-1)[..., :columns]
    return scale
