"""Write a factor checkpoint: shards that are whole layers, each complete or absent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from svftool.checkpoints import (
    SafetensorsWriter,
    TensorInfo,
    plan_shards,
    shard_names,
    write_errors,
    write_index,
)
from svftool.checkpoints.dtypes import CODE_OF_DTYPE, dtype_name
from svftool.errors import CheckpointError, shortlist
from svftool.factors.schema import CONFIG_FILE, FactorConfig, config_to_json
from svftool.factors.store import STEM
from svftool.version import __version__


@dataclass(frozen=True)
class FactorShard:
    """One weight file of a factor checkpoint.

    Attributes
    ----------
    file : str
        Its name.
    layers : tuple of str
        Layers whose factors it holds.
    infos : tuple of TensorInfo
        All its tensors.
    """

    file: str
    layers: tuple[str, ...]
    infos: tuple[TensorInfo, ...]


def factor_infos(
    name: str, matrix: Sequence[int], rank: int, dtype: torch.dtype
) -> tuple[TensorInfo, ...]:
    """List the tensors that hold a layer's factors; ``S`` is float32 whatever `dtype` is."""
    *batch, m, n = matrix
    return (
        TensorInfo(f"{name}.U", dtype, (*batch, m, rank), ""),
        TensorInfo(f"{name}.S", torch.float32, (*batch, rank), ""),
        TensorInfo(f"{name}.Vh", dtype, (*batch, rank, n), ""),
    )


def check_storable(infos: Iterable[TensorInfo], *, where: str, way_out: str) -> None:
    """Refuse tensors that safetensors cannot hold, before any work.

    Parameters
    ----------
    infos : iterable of TensorInfo
        What would be written.
    where, way_out : str
        What the error begins and ends with.

    Raises
    ------
    CheckpointError
        Naming each such tensor.
    """
    wrong = [
        f"{info.name!r} ({info.layout if info.layout != 'dense' else dtype_name(info.dtype)})"
        for info in infos
        if info.layout != "dense" or info.dtype not in CODE_OF_DTYPE
    ]
    if wrong:
        raise CheckpointError(
            f"{where}: safetensors cannot hold {shortlist(wrong, 4)}, expected dense tensors of "
            f"its dtypes. {way_out}"
        )


def check_names(layers: Iterable[str], whole: Iterable[str], *, where: str) -> None:
    """Refuse tensors whose name no safetensors can hold, or is that of another's factors.

    Parameters
    ----------
    layers, whole : iterable of str
        Tensors that are decomposed, and that are kept whole.
    where : str
        What the error begins with.

    Raises
    ------
    CheckpointError
        Naming each such tensor.
    """
    layers, kept = list(layers), set(whole)
    broken = [name for name in (*layers, *kept) if name.encode(errors="ignore").decode() != name]
    if broken:
        raise CheckpointError(
            f"{where}: {shortlist(map(repr, broken), 4)}: half of a surrogate pair in the name, "
            "expected Unicode. Save the checkpoint with other names."
        )
    taken = [
        f"{name}{suffix}"
        for name in layers
        for suffix in (".U", ".S", ".Vh", ".S_base")
        if f"{name}{suffix}" in kept
    ]
    if taken:
        owner = taken[0].rpartition(".")[0]
        raise CheckpointError(
            f"{where}: {shortlist(map(repr, taken), 4)}: the name stands for factors of another "
            f"tensor, expected names of their own. Leave {owner!r} whole with --exclude."
        )


def plan_factor_shards(
    layers: Mapping[str, tuple[TensorInfo, ...]],
    whole: Sequence[TensorInfo],
    *,
    max_bytes: int,
) -> list[FactorShard]:
    """Share layers and whole tensors out over shards, in order; a layer is never split.

    Parameters
    ----------
    layers : mapping of str to tuple of TensorInfo
        The factors of each layer, see `factor_infos`, in file order.
    whole : sequence of TensorInfo
        Tensors that are kept as they are; they follow the layers.
    max_bytes : int
        Where a new shard begins.
    """
    tensors = {**layers, **{info.name: (info,) for info in whole}}
    sizes = [
        TensorInfo(name, torch.uint8, (sum(info.nbytes for info in infos),), "")
        for name, infos in tensors.items()
    ]
    groups = plan_shards(sizes, max_bytes)
    return [
        FactorShard(
            file,
            tuple(name for name in group if name in layers),
            tuple(info for name in group for info in tensors[name]),
        )
        for file, group in zip(shard_names(STEM, len(groups)), groups, strict=True)
    ]


def open_shard(path: Path, shard: FactorShard, *, again: bool = False) -> SafetensorsWriter:
    """Open a shard for writing, with its header and full size; see `SafetensorsWriter`."""
    layout = {info.name: (info.dtype, info.shape) for info in shard.infos}
    return SafetensorsWriter(path, layout, metadata={"format": "pt"}, again=again)


def write_shard(path: Path, shard: FactorShard, read: Callable[[str], Tensor]) -> None:
    """Write one shard; its file appears when it is complete and on the disk.

    Parameters
    ----------
    path : Path
        Where.
    shard : FactorShard
        What.
    read : callable
        Gives each tensor by its name in the shard.
    """
    temporary = path.with_suffix(".writing")
    temporary.unlink(missing_ok=True)
    with open_shard(temporary, shard) as writer:
        for info in shard.infos:
            writer.write(info.name, read(info.name))
        writer.sync()
    with write_errors(path):
        temporary.replace(path)


def finish_factors(folder: Path, shards: Sequence[FactorShard], config: FactorConfig) -> None:
    """Write the index, where there are several shards, and ``svf_config.json``."""
    if len(shards) > 1:
        weight_map = {info.name: shard.file for shard in shards for info in shard.infos}
        size = sum(info.nbytes for shard in shards for info in shard.infos)
        write_index(folder / f"{STEM}.safetensors.index.json", weight_map, total_size=size)
    path = folder / CONFIG_FILE
    with write_errors(path):
        path.write_text(config_to_json(config, version=__version__), encoding="utf-8")
