"""Write a merged checkpoint in the form of its base: names, shards, metadata, side files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from svftool.checkpoints import (
    PICKLE_SUFFIXES,
    CheckpointWriter,
    SafetensorsWriter,
    TensorInfo,
    plan_shards,
    save_pickled,
    side_files,
    write_errors,
)
from svftool.factors import CONFIG_FILE
from svftool.factors.mixture import LayerChange, Mixture
from svftool.progress import Progress


def write_dense(
    mixture: Mixture, partial: Path, *, target: Path, max_bytes: int | None, progress: Progress
) -> list[LayerChange]:
    """Write every tensor of a mixture.

    Parameters
    ----------
    mixture : Mixture
        What to write.
    partial : Path
        Where to write it now.
    target : Path
        Its later name, whose suffix decides between file and folder.
    max_bytes : int or None
        Where a new shard begins; shards as the base's if None.
    progress : Progress
        Told how many tensors are done.

    Returns
    -------
    list of LayerChange
        What became of each decomposed layer.
    """
    changes: list[LayerChange] = []
    tensors = _compute(mixture, changes, progress)
    if mixture.base is not None and target.suffix in PICKLE_SUFFIXES:
        save_pickled(partial, mixture.base, dict(tensors))
        return changes
    with _writer(mixture, partial, target, max_bytes) as writer:
        for name, tensor in tensors:
            writer.write(name, tensor)
    if target.suffix != ".safetensors":
        _copy_side_files(mixture, partial)
    return changes


def _compute(
    mixture: Mixture, changes: list[LayerChange], progress: Progress
) -> Iterator[tuple[str, Tensor]]:
    with progress.task("merging", len(mixture.infos), unit="tensors") as task:
        for name in mixture.infos:
            tensor, change = mixture.tensor(name)
            if change is not None:
                changes.append(change)
            yield name, tensor
            task.advance(detail=name)


def _writer(
    mixture: Mixture, partial: Path, target: Path, max_bytes: int | None
) -> SafetensorsWriter | CheckpointWriter:
    base, infos = mixture.base, mixture.infos
    dense = base is not None and base.format == "safetensors"
    metadata = {"format": "pt", **(base.metadata if base is not None and dense else {})}
    if target.suffix == ".safetensors":
        layout = {info.name: (info.dtype, info.shape) for info in infos.values()}
        return SafetensorsWriter(partial, layout, metadata=metadata)
    partial.mkdir()
    if base is None or max_bytes is not None:
        planned = plan_shards(infos.values(), max_bytes)
        return CheckpointWriter(partial, shards=_shards(mixture, planned), metadata=metadata)
    groups = [list(shard.names) for shard in base.shards]
    groups[-1] += mixture.added
    own_names = dense and base.is_folder
    return CheckpointWriter(
        partial,
        shards=_shards(mixture, groups),
        metadata=[{"format": "pt", **shard.metadata} for shard in base.shards] if dense else None,
        index_metadata=base.index_metadata,
        files=[shard.file for shard in base.shards] if own_names else None,
        index_file=base.index_file if own_names else None,
    )


def _shards(mixture: Mixture, groups: Sequence[Sequence[str]]) -> list[list[TensorInfo]]:
    return [[mixture.infos[name] for name in names] for names in groups]


def _copy_side_files(mixture: Mixture, partial: Path) -> None:
    base = mixture.base
    if base is not None and not base.is_folder:
        return
    for file in side_files(mixture.store.path if base is None else base.path):
        if file.name != CONFIG_FILE:
            with write_errors(partial / file.name):
                shutil.copy(file, partial / file.name)
    config = partial / "config.json"
    if mixture.classes is not None and config.is_file():
        text = follow_classes(json.loads(config.read_text(encoding="utf-8")), mixture.classes)
        with write_errors(config):
            config.write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")


def follow_classes(config: dict[str, Any], classes: Sequence[str]) -> dict[str, Any]:
    """Make ``config.json`` name the classes of a new head, as transformers and timm read it.

    Examples
    --------
    >>> follow_classes({"model_type": "vit"}, ["cat", "dog"])["id2label"]
    {'0': 'cat', '1': 'dog'}
    >>> follow_classes({"architecture": "resnet50", "num_classes": 1000}, ["cat"])["num_classes"]
    1
    """
    if "architecture" in config:
        return {**config, "num_classes": len(classes), "label_names": list(classes)}
    names = list(map(str, classes))
    config = {**config, "id2label": {str(i): name for i, name in enumerate(names)}}
    config["label2id"] = {name: i for i, name in enumerate(names)}
    if "num_labels" in config:
        config["num_labels"] = len(names)
    return config
