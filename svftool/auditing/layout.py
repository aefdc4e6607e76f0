"""Which side of each weight is its output."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from svftool.checkpoints import TensorInfo, table_role

Axis = Literal["rows", "columns"]

_WEIGHT = re.compile(r"weight$")


def output_axes(infos: Mapping[str, TensorInfo]) -> dict[str, Axis]:
    """Tell which side of each weight of two dimensions or more is its output.

    Linear layers and convolutions hold (out, in), tables of embeddings (entries, out). A Conv1D, as
    GPT-2 has them, holds (in, out): its bias is as long as a row, not as a column. What biases say
    of the weights that are not square holds for the square ones with a bias too.

    Parameters
    ----------
    infos : mapping of str to TensorInfo
        All tensors of a checkpoint.
    """
    said: dict[str, Axis | None] = {}
    for name, info in infos.items():
        if len(info.shape) >= 2:
            said[name] = "columns" if _is_table(info) else _by_bias(info, infos)
    layers = [axis for name, axis in said.items() if not _is_table(infos[name])]
    turned = layers.count("columns") > layers.count("rows")
    return {
        name: axis or ("columns" if turned and _bias(infos[name], infos) else "rows")
        for name, axis in said.items()
    }


def _is_table(info: TensorInfo) -> bool:
    return len(info.shape) == 2 and "embedding" in (table_role(info) or "")


def _bias(info: TensorInfo, infos: Mapping[str, TensorInfo]) -> TensorInfo | None:
    """Return the bias beside a plain weight."""
    found = infos.get(_WEIGHT.sub("bias", info.name)) if _WEIGHT.search(info.name) else None
    return found if found is not None and len(info.shape) == 2 and len(found.shape) == 1 else None


def _by_bias(info: TensorInfo, infos: Mapping[str, TensorInfo]) -> Axis | None:
    """Return what the length of the bias says; None where it says nothing."""
    bias = _bias(info, infos)
    if bias is None or info.shape[0] == info.shape[1]:
        return None
    return {info.shape[0]: "rows", info.shape[1]: "columns"}.get(bias.shape[0])  # type: ignore[return-value]
