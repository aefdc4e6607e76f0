"""Codes that are places in a table of values, times a scale a block: nf4, fp4, MXFP4, NVFP4.

- bitsandbytes, 4 bits: https://github.com/bitsandbytes-foundation/bitsandbytes
  (``functional.QuantState``); the high half of a byte comes first, the table lies in the file. With
  double quantisation the scales are codes themselves.
- bitsandbytes, int8: rows of ``codes * SCB / 127``.
- MXFP4: OCP Microscaling Formats 1.0; low half first, scales are powers of two, as in
  https://huggingface.co/openai/gpt-oss-20b. Experts come ``(E, in, out)``, as in transformers.
- NVFP4: compressed-tensors' ``nvfp4-pack-quantized``; a scale of 16, divided by one of all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from svftool.checkpoints.quantised.coded import Coded, Numbers, StoredParts, gaps, looked_up

_FP4 = torch.tensor(
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
)
_PER_127 = 7.874015718698502e-3
_KINDS = ("nf4", "fp4")
_MOST = 1 << 20


def bitsandbytes_4bit(source: StoredParts) -> Iterator[Coded]:
    """Find packed weights beside which bitsandbytes' state lies."""
    for kind in _KINDS:
        for name, info in source.ending(f".quant_state.bitsandbytes__{kind}"):
            facts = _facts(source.read(info.name)) if info.numel < _MOST else None
            parts = {
                "codes": name,
                "absmax": f"{name}.absmax",
                "table": f"{name}.quant_map",
                "state": info.name,
            }
            nested = facts is not None and "nested_offset" in facts
            if nested:
                parts |= {
                    "nested_absmax": f"{name}.nested_absmax",
                    "nested_table": f"{name}.nested_quant_map",
                }
            if facts is None or not _fits(source, parts, facts):
                continue
            shape = tuple(facts["shape"])
            storage = f"bitsandbytes {kind}" + (" with double quantisation" if nested else "")
            yield Coded(name, shape, storage, parts, partial(_decode_4bit, facts=facts))


def _facts(packed: Tensor) -> dict[str, Any] | None:
    """Read the JSON that bitsandbytes stores as bytes; None where it does not state enough."""
    try:
        found = json.loads(bytes(packed.to(torch.uint8).tolist()))
        shape, block = found["shape"], found["blocksize"]
    except (ValueError, KeyError, TypeError):
        return None
    sides = isinstance(shape, list) and all(isinstance(side, int) and side > 0 for side in shape)
    return found if sides and isinstance(block, int) and block > 0 else None


def _fits(source: StoredParts, parts: Mapping[str, str], facts: Mapping[str, Any]) -> bool:
    count = math.prod(facts["shape"])
    blocks = -(-count // facts["blocksize"])
    nested = "nested_absmax" in parts
    codes = source.get(parts["codes"], torch.uint8)
    absmax = source.get(parts["absmax"], torch.uint8 if nested else torch.float32)
    table = source.get(parts["table"], torch.float32)
    if codes is None or absmax is None or table is None or table.shape != (16,):
        return False
    if codes.numel != -(-count // 2) or absmax.numel != blocks:
        return False
    if not nested:
        return True
    inner = facts.get("nested_blocksize")
    scales = source.get(parts["nested_absmax"], torch.float32)
    levels = source.get(parts["nested_table"], torch.float32)
    if not isinstance(inner, int) or inner < 1 or scales is None or levels is None:
        return False
    return levels.shape == (256,) and scales.numel == -(-blocks // inner)


def _decode_4bit(parts: Mapping[str, Tensor], *, facts: Mapping[str, Any]) -> Numbers:
    shape, block = facts["shape"], facts["blocksize"]
    count = math.prod(shape)
    block = min(block, count)
    absmax = parts["absmax"].flatten()
    if "nested_absmax" in parts:
        inner = min(facts["nested_blocksize"], len(absmax))
        scales = parts["nested_absmax"].repeat_interleave(inner)[: len(absmax)]
        offset = torch.tensor(float(facts["nested_offset"]))
        absmax = parts["nested_table"][absmax.int()] * scales + offset
    scale = absmax.repeat_interleave(block)[:count]

    def times(levels: Tensor, scale: Tensor) -> Tensor:
        found = looked_up(parts["codes"].flatten(), levels, high_first=True)[:count]
        return found.mul_(scale).reshape(shape)

    return Numbers(times(parts["table"], scale), lambda: times(gaps(parts["table"]), scale.abs()))


def bitsandbytes_int8(source: StoredParts) -> Iterator[Coded]:
    """Find signed bytes beside which the largest size of each row lies."""
    for name, info in source.ending(".SCB"):
        codes = source.get(f"{name}.weight", torch.int8)
        if codes is None or len(codes.shape) != 2 or info.dtype != torch.float32:
            continue
        if info.shape != codes.shape[:1]:
            continue
        parts = {"codes": codes.name, "scale": info.name}
        form = f"{name}.weight_format"
        if form in source.infos:
            if source.infos[form].numel != 1 or int(source.read(form).flatten()[0]) != 0:
                continue  # rows in an order of some GPU
            parts["format"] = form
        yield Coded(codes.name, codes.shape, "bitsandbytes int8", parts, _decode_int8)


def _decode_int8(parts: Mapping[str, Tensor]) -> Numbers:
    scale = parts["scale"].reshape(-1, 1)
    return Numbers((parts["codes"] * scale).mul_(_PER_127), lambda: scale.abs() * _PER_127)


def mxfp4(source: StoredParts) -> Iterator[Coded]:
    """Find blocks of 32 values of four bits beside which their exponents lie."""
    for name, info in source.ending("_blocks"):
        scales = source.get(f"{name}_scales", torch.uint8)
        if info.dtype != torch.uint8 or scales is None or len(info.shape) < 3:
            continue
        if info.shape[-1] != 16 or info.shape[:-1] != scales.shape:
            continue
        *lead, rows, count, _ = info.shape
        columns = 32 * count
        shape = (*lead, columns, rows) if lead else (rows, columns)
        parts = {"codes": info.name, "scale": scales.name}
        yield Coded(name, shape, "MXFP4", parts, _decode_mxfp4)


def _decode_mxfp4(parts: Mapping[str, Tensor]) -> Numbers:
    scale = torch.pow(2.0, parts["scale"].int() - 127).unsqueeze(-1)

    def times(levels: Tensor) -> Tensor:
        found = looked_up(parts["codes"], levels).mul_(scale).flatten(-2)
        return found.mT if found.ndim > 2 else found

    return Numbers(times(_FP4), lambda: times(gaps(_FP4)))


def nvfp4(source: StoredParts) -> Iterator[Coded]:
    """Find compressed-tensors' four-bit floats in blocks of 16."""
    for name, info in source.ending(".weight_packed"):
        scale = source.get(f"{name}.weight_scale", torch.float8_e4m3fn)
        over = source.get(f"{name}.weight_global_scale", torch.float32)
        if info.dtype != torch.uint8 or len(info.shape) != 2 or scale is None or over is None:
            continue
        rows, columns = info.shape[0], 2 * info.shape[1]
        if scale.shape != (rows, columns // 16) or columns % 16 or over.numel != 1:
            continue
        parts = {"codes": info.name, "scale": scale.name, "over": over.name}
        yield Coded(f"{name}.weight", (rows, columns), "NVFP4", parts, _decode_nvfp4)


def _decode_nvfp4(parts: Mapping[str, Tensor]) -> Numbers:
    scale = (parts["scale"].float() / parts["over"].reshape(())).unsqueeze(-1)

    def times(levels: Tensor, scale: Tensor) -> Tensor:
        found = looked_up(parts["codes"], levels)
        return found.view(len(found), -1, 16).mul_(scale).flatten(1)

    return Numbers(times(_FP4, scale), lambda: times(gaps(_FP4), scale.abs()))
