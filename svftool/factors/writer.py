"""Write a factor checkpoint: the layout is known beforehand, layers come in any order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

import svftool
from svftool.checkpoints import CheckpointWriter, TensorInfo, plan_shards, tensor_digest
from svftool.checkpoints.failures import write_errors
from svftool.factors.schema import CONFIG_FILE, FactorConfig, config_to_json
from svftool.factors.store import STEM, LayerFactors


@dataclass(frozen=True)
class LayerLayout:
    """Sizes of one layer's factors, known before they are computed.

    Attributes
    ----------
    name : str
        Tensor name.
    matrix : tuple of int
        ``(m, n)`` or ``(E, m, n)``.
    rank : int
        Number of singular values kept, k.
    """

    name: str
    matrix: tuple[int, ...]
    rank: int

    def infos(self, dtype: torch.dtype) -> list[TensorInfo]:
        """List the tensors that hold the factors; ``S`` is float32 whatever `dtype` is."""
        *batch, m, n = self.matrix
        k = self.rank
        return [
            TensorInfo(f"{self.name}.U", dtype, (*batch, m, k), ""),
            TensorInfo(f"{self.name}.S", torch.float32, (*batch, k), ""),
            TensorInfo(f"{self.name}.Vh", dtype, (*batch, k, n), ""),
        ]


class FactorWriter:
    """Writes a factor checkpoint into a folder; a context manager.

    Parameters
    ----------
    folder : Path
        Existing folder, usually a partial one.
    layers : sequence of LayerLayout
        What will be written, in file order.
    whole : sequence of TensorInfo
        Tensors that are kept as they are.
    dtype : torch.dtype
        Storage dtype of ``U`` and ``Vh``.
    max_shard_bytes : int or None
        Where a new shard begins.
    """

    def __init__(
        self,
        folder: Path,
        layers: Sequence[LayerLayout],
        whole: Sequence[TensorInfo],
        *,
        dtype: torch.dtype,
        max_shard_bytes: int | None,
    ) -> None:
        infos = {info.name: info for layer in layers for info in layer.infos(dtype)}
        infos |= {info.name: info for info in whole}
        shards = [
            [infos[name] for name in names]
            for names in plan_shards(infos.values(), max_shard_bytes)
        ]
        self._writer = CheckpointWriter(folder, shards=shards, stem=STEM)

    def write_layer(self, name: str, factors: LayerFactors) -> dict[str, str]:
        """Store the factors of one layer, in the dtypes of the layout.

        Returns
        -------
        dict of str to str
            SHA-256 of each tensor by its name, for the factors' fingerprint.
        """
        stored = {f"{name}.U": factors.U, f"{name}.S": factors.S, f"{name}.Vh": factors.Vh}
        for key, tensor in stored.items():
            self._writer.write(key, tensor)
        return {key: tensor_digest(tensor) for key, tensor in stored.items()}

    def write_whole(self, name: str, tensor: Tensor) -> None:
        """Store a tensor that is not decomposed."""
        self._writer.write(name, tensor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writer.__exit__(kind, error, trace)


def write_config(folder: Path, config: FactorConfig) -> None:
    """Write ``svf_config.json``, the last file of a factor checkpoint."""
    path = folder / CONFIG_FILE
    with write_errors(path):
        path.write_text(config_to_json(config, version=svftool.__version__), encoding="utf-8")
