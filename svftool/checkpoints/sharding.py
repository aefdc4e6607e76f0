"""Sharing tensors out over files, the files' names, and the index that says which holds what."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from svftool.checkpoints.base import TensorInfo
from svftool.errors import write_errors


def write_index(
    path: Path,
    weight_map: Mapping[str, str],
    *,
    total_size: int,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a shard index.

    Parameters
    ----------
    path : Path
        The file.
    weight_map : mapping of str to str
        Tensor name to weight file.
    total_size : int
        Bytes of all tensors.
    metadata : mapping, optional
        What the index says beside ``total_size``.

    Raises
    ------
    ResourceError
        If the disk refuses it.
    """
    index = {
        "metadata": {**(metadata or {}), "total_size": total_size},
        "weight_map": dict(weight_map),
    }
    with write_errors(path):
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def shard_names(stem: str, count: int) -> list[str]:
    """Return the names of a checkpoint's weight files.

    Examples
    --------
    >>> shard_names("model", 1)
    ['model.safetensors']
    >>> shard_names("model", 2)
    ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def plan_shards(infos: Iterable[TensorInfo], max_bytes: int | None) -> list[list[str]]:
    """Share tensors out over shards in their order, as huggingface_hub does.

    Parameters
    ----------
    infos : iterable of TensorInfo
    max_bytes : int or None
        Most bytes of tensors a shard may hold; a larger tensor gets a shard of its own. None
        puts everything into one.

    Returns
    -------
    list of list of str
        Names, shard by shard; one empty shard when there are no tensors.
    """
    shards: list[list[str]] = []
    current: list[str] = []
    filled = 0
    for info in infos:
        if max_bytes is not None and info.nbytes > max_bytes:
            shards.append([info.name])
            continue
        if max_bytes is not None and filled + info.nbytes > max_bytes:
            shards.append(current)
            current, filled = [], 0
        current.append(info.name)
        filled += info.nbytes
    if current or not shards:
        shards.append(current)
    return shards
