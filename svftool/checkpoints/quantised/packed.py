"""Whole numbers of a few bits in words of 32, with scales and zero points a group of inputs.

- GPTQ: ``qweight (in / k, out)``, low bits first along the inputs; the zero points in the file are
  one too small, but for ``gptq_v2``. https://github.com/AutoGPTQ/AutoGPTQ (``qlinear_cuda.py``)
- AWQ: ``qweight (in, out / 8)``, outputs of a word in the order 0 2 4 6 1 3 5 7.
  https://github.com/casper-hansen/AutoAWQ (``utils/packing_utils.py``)
- compressed-tensors: ``weight_packed (out, in / k)`` of numbers shifted to be positive, zero points
  packed along the outputs. https://github.com/vllm-project/compressed-tensors
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from svftool.checkpoints.base import TensorInfo
from svftool.checkpoints.quantised.coded import SCALES, Coded, Numbers, StoredParts, unpacked

_BITS = (2, 4, 8)
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word the code of each output lies."""


def _stated_sizes(config: Mapping[str, Any]) -> list[int]:
    """List the sizes of groups that a configuration states, at its top or for some layers."""
    groups = config.get("config_groups")
    places = [config, *(groups.values() if isinstance(groups, Mapping) else ())]
    found = []
    for place in places:
        weights = place.get("weights", place) if isinstance(place, Mapping) else {}
        size = weights.get("group_size") if isinstance(weights, Mapping) else None
        if type(size) is int and size > 0:
            found.append(size)
    return found


def _group_size(config: Mapping[str, Any], inputs: int, groups: int) -> int:
    """Return how many inputs share a scale; 0 where it is not certain.

    The last group is smaller where the size that is stated does not divide the inputs.
    """
    fitting = {one for one in _stated_sizes(config) if -(-inputs // one) == groups}
    return fitting.pop() if len(fitting) == 1 else _whole(inputs, groups)


def gptq(source: StoredParts) -> Iterator[Coded]:
    """Find weights packed along their inputs."""
    method = source.config.get("quant_method", "gptq")
    if method not in ("gptq", "auto-round", "intel/auto-round"):
        return
    second = source.config.get("checkpoint_format") == "gptq_v2"
    for name, info, zeros, scales in _quantised_linears(source):
        groups, out = scales.shape
        bits = _whole(32 * zeros.shape[1], out)
        if bits not in _BITS or info.shape[1] != out or zeros.shape[0] != groups:
            continue
        rows = info.shape[0] * 32 // bits
        order = source.infos.get(f"{name}.g_idx")
        if order is not None and (order.shape != (rows,) or order.dtype != torch.int32):
            continue
        size = _group_size(source.config, rows, groups)
        if source.config.get("bits", bits) != bits or (order is None and not size):
            continue
        parts = {"codes": info.name, "zero": zeros.name, "scale": scales.name}
        if order is not None:
            parts["order"] = order.name
        decode = partial(_decode_gptq, bits=bits, shift=0 if second else 1, size=size)
        yield Coded(f"{name}.weight", (out, rows), f"GPTQ, {bits} bits", parts, decode)


def _quantised_linears(
    source: StoredParts,
) -> Iterator[tuple[str, TensorInfo, TensorInfo, TensorInfo]]:
    for name, info in source.ending(".qweight"):
        zeros = source.get(f"{name}.qzeros", torch.int32)
        scales = source.get(f"{name}.scales", *SCALES)
        if info.dtype != torch.int32 or zeros is None or scales is None:
            continue
        if all(len(one.shape) == 2 and 0 not in one.shape for one in (info, zeros, scales)):
            yield name, info, zeros, scales


def _whole(part: int, whole: int) -> int:
    """Return a quotient, 0 where it is no whole number."""
    return part // whole if whole and part % whole == 0 else 0


def _decode_gptq(parts: Mapping[str, Tensor], *, bits: int, shift: int, size: int) -> Numbers:
    codes = unpacked(parts["codes"], bits, dim=0)
    zero = ((unpacked(parts["zero"], bits) + shift) & (2**bits - 1)).float()
    scale, order = parts["scale"].float(), parts.get("order")
    if order is not None and bool((order < 0).any()):
        raise IndexError(f"group {int(order.min())} among {len(scale)}")
    groups = _Groups(0, len(codes), len(scale), size, order)
    values = groups.scaled(codes.float(), zero, scale)
    return Numbers(values.mT, lambda: groups.spread(scale.abs()).mT)


def awq(source: StoredParts) -> Iterator[Coded]:
    """Find weights packed along their outputs, four bits each."""
    config = source.config
    if config.get("quant_method", "awq") != "awq":
        return
    if str(config.get("version", "gemm")).lower() != "gemm" or config.get("bits", 4) != 4:
        return
    for name, info, zeros, scales in _quantised_linears(source):
        groups, out = scales.shape
        rows = info.shape[0]
        size = _group_size(config, rows, groups)
        if 8 * info.shape[1] != out or not size or zeros.shape != (groups, info.shape[1]):
            continue
        if f"{name}.g_idx" in source.infos:
            continue
        parts = {"codes": info.name, "zero": zeros.name, "scale": scales.name}
        decode = partial(_decode_awq, size=size)
        yield Coded(f"{name}.weight", (out, rows), "AWQ, 4 bits", parts, decode)


def _decode_awq(parts: Mapping[str, Tensor], *, size: int) -> Numbers:
    codes, zero = (unpacked(parts[key], 4, order=_AWQ_ORDER).float() for key in ("codes", "zero"))
    scale = parts["scale"].float()
    groups = _Groups(0, len(codes), len(scale), size)
    values = groups.scaled(codes, zero, scale)
    return Numbers(values.mT, lambda: groups.spread(scale.abs()).mT)


def compressed(source: StoredParts) -> Iterator[Coded]:
    """Find compressed-tensors' packed whole numbers."""
    for name, info in source.ending(".weight_packed"):
        scale = source.get(f"{name}.weight_scale", *SCALES)
        stated = source.get(f"{name}.weight_shape", torch.int64, torch.int32)
        if info.dtype != torch.int32 or len(info.shape) != 2 or scale is None or stated is None:
            continue
        if stated.shape != (2,):
            continue
        shape = (int(one) for one in source.read(stated.name))
        out, columns = shape
        bits = _bits(info.shape[1], columns)
        size = _size_of_scales(source.config, scale.shape, out, columns)
        if info.shape[0] != out or bits is None or not size:
            continue
        parts = {"codes": info.name, "scale": scale.name, "shape": stated.name}
        if not _take_more(source, name, parts, (out, columns), scale.shape, bits):
            continue
        decode = partial(_decode_compressed, bits=bits, shape=(out, columns), size=size)
        storage = f"compressed-tensors, {bits} bits"
        yield Coded(f"{name}.weight", (out, columns), storage, parts, decode)


def _bits(words: int, columns: int) -> int | None:
    """Return the bits of a code; None where the words do not decide it."""
    found = [bits for bits in _BITS if columns > 0 and -(-columns * bits // 32) == words]
    return found[0] if len(found) == 1 else None


def _size_of_scales(
    config: Mapping[str, Any], scale: tuple[int, ...], out: int, columns: int
) -> int:
    """Return how many inputs share a scale; 0 where scales of this shape do not fit."""
    if scale in ((), (1,)):
        return columns
    fits = len(scale) == 2 and scale[0] == out and scale[1] > 0
    return _group_size(config, columns, scale[1]) if fits else 0


def _take_more(
    source: StoredParts,
    name: str,
    parts: dict[str, str],
    shape: tuple[int, int],
    scale: tuple[int, ...],
    bits: int,
) -> bool:
    """Add zero points and the order of the groups to the parts; tell whether they fit."""
    zero = source.infos.get(f"{name}.weight_zero_point")
    order = source.infos.get(f"{name}.weight_g_idx")
    if zero is not None:
        parts["zero"] = zero.name
        words = (-(-shape[0] * bits // 32), *scale[1:])
        if zero.dtype != torch.int32 or len(scale) != 2 or zero.shape != words:
            return False
    if order is not None:
        parts["order"] = order.name
        return order.shape == (shape[1],) and len(scale) == 2
    return True


def _decode_compressed(
    parts: Mapping[str, Tensor], *, bits: int, shape: tuple[int, int], size: int
) -> Numbers:
    out, columns = shape
    codes = unpacked(parts["codes"], bits)[:, :columns].float().sub_(2 ** (bits - 1))
    scale = parts["scale"].float()
    if scale.ndim < 2:
        scale = scale.reshape(1, 1)
    zero = None
    if "zero" in parts:
        zero = unpacked(parts["zero"].mT, bits)[:, :out].mT.float().sub_(2 ** (bits - 1))
    order = parts.get("order")
    if order is not None and bool((order < 0).any()):
        order = None
    groups = _Groups(1, columns, scale.shape[1], size, order)
    return Numbers(groups.scaled(codes, zero, scale), lambda: groups.spread(scale.abs()))


class _Groups:
    """Which entries along a dimension have a scale and a zero point in common.

    Parameters
    ----------
    dim, count : int
        The dimension, and its entries.
    groups, size : int
        How many groups there are, and entries of one.
    order : (count,) Tensor, optional
        The group of each entry; one group after the other by default.
    """

    def __init__(
        self, dim: int, count: int, groups: int, size: int, order: Tensor | None = None
    ) -> None:
        plain = torch.arange(count) // size
        self._dim = dim
        self._index = plain if order is None else order.long()
        self._even = groups * size == count and torch.equal(self._index, plain)
        self._size = size

    def spread(self, each: Tensor) -> Tensor:
        """Give each entry what its group has."""
        return each.index_select(self._dim, self._index)

    def scaled(self, codes: Tensor, zero: Tensor | None, scale: Tensor) -> Tensor:
        """Return ``(codes - zero) * scale``, in the memory of the codes."""
        rows, rest = codes.shape[: self._dim], codes.shape[self._dim + 1 :]
        found = codes.reshape(*rows, -1, self._size, *rest) if self._even else codes
        if zero is not None:
            found -= self._fitting(zero)
        return found.mul_(self._fitting(scale)).reshape(codes.shape)

    def _fitting(self, each: Tensor) -> Tensor:
        return each.unsqueeze(self._dim + 1) if self._even else self.spread(each)
