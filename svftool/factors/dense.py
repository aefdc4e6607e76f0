"""Write a mixture: as a checkpoint in the form of its base, or as a tuned file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from svftool.checkpoints import (
    PICKLE_SUFFIXES,
    Checkpoint,
    CheckpointWriter,
    SafetensorsWriter,
    TensorInfo,
    dtype_name,
    is_code,
    open_checkpoint,
    plan_shards,
    save_pickled,
    side_files,
    tensor_digest,
    write_errors,
)
from svftool.errors import NumericalError, counted, shortlist
from svftool.factors import CONFIG_FILE, FactorStore, TunedFile, write_tuned
from svftool.factors.config_shapes import follow_classes, follow_shapes, is_output_head, untie
from svftool.factors.mixture import LayerChange, Mixture
from svftool.factors.stated import MERGED_KEY, Stated
from svftool.files.folder import read_config
from svftool.files.side_files import named
from svftool.numerics import ThreadPool
from svftool.progress import Progress, ProgressTask

_ROOM = 256 << 20
"""Bytes that the tensors at work may hold together; a larger one is worked on alone."""


class DenseValues(Protocol):
    """What is written: the tensors of a merged checkpoint, computed one at a time."""

    @property
    def base(self) -> Checkpoint | None:
        """The base, whose names, shards and side files the result has."""

    @property
    def store(self) -> FactorStore:
        """The factors, where there is no base."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the result."""

    @property
    def added(self) -> tuple[str, ...]:
        """Tensors that the base does not have."""

    @property
    def dtype(self) -> torch.dtype | None:
        """What all numbers are written in, where it is not the base's."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names of a new head."""

    @property
    def reshaped(self) -> Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """Shapes in the base and in the result, where they differ."""

    @property
    def untied(self) -> bool:
        """Whether the output head, which was the embedding, no longer is."""

    def bytes_of(self, name: str) -> int:
        """Bound the bytes that computing a tensor takes."""

    def tensor(
        self, name: str, pool: ThreadPool | None = None
    ) -> tuple[Tensor, LayerChange | None]:
        """Compute one tensor, and what became of it if it is a layer; from several threads."""


def write_dense(
    mixture: DenseValues,
    partial: Path,
    *,
    target: Path,
    max_bytes: int | None,
    progress: Progress,
    stated: Stated | None = None,
) -> tuple[list[LayerChange], dict[str, int]]:
    """Write every tensor of a mixture.

    Parameters
    ----------
    mixture : DenseValues
        What to write, such as a `Mixture`.
    partial : Path
        Where to write it now.
    target : Path
        Its later name, whose suffix decides between file and folder.
    max_bytes : int or None
        Where a new shard begins; shards as the base's if None.
    progress : Progress
        Told how many tensors are done, and of settings that a pickle cannot hand on.
    stated : Stated, optional
        What the tuned files say of themselves; goes into the metadata.

    Returns
    -------
    changes : list of LayerChange
        What became of each decomposed layer.
    left : dict of str to int
        Files beside the base's weights that do not come along, with their bytes.
    """
    changes: list[LayerChange] = []
    with progress.task("merging", len(mixture.infos), unit="tensors") as task:
        tensors = computed(mixture, list(mixture.infos), changes, task)
        if mixture.base is not None and target.suffix in PICKLE_SUFFIXES:
            save_pickled(partial, mixture.base, dict(tensors))
            if stated is not None:
                progress.warn(
                    f"{target}: a pickle has no metadata, so that class names and settings of the "
                    "fine-tune stay behind; write to .safetensors or a folder to keep them"
                )
            return changes, {}
        with _writer(mixture, partial, target, max_bytes, stated) as writer:
            for name, tensor in tensors:
                writer.write(name, tensor)
    if target.suffix == ".safetensors":
        return changes, {}
    return changes, _copy_side_files(mixture, partial, progress)


def computed(
    mixture: DenseValues, names: Sequence[str], changes: list[LayerChange], task: ProgressTask
) -> Iterator[tuple[str, Tensor]]:
    """Compute tensors of a mixture, several at a time; they come in the order given.

    Parameters
    ----------
    mixture : DenseValues
    names : sequence of str
        Which of its tensors.
    changes : list of LayerChange
        What became of layers is added to it.
    task : ProgressTask
        Told of each tensor.
    """
    with ThreadPool(torch.get_num_threads()) as pool:
        work = partial(mixture.tensor, pool=pool)
        with closing(pool.in_order(names, work, size=mixture.bytes_of, room=_ROOM)) as found:
            for name, (tensor, change) in zip(names, found, strict=True):
                if change is not None:
                    changes.append(change)
                yield name, tensor
                task.advance(detail=name)


def _writer(
    mixture: DenseValues, partial: Path, target: Path, max_bytes: int | None, stated: Stated | None
) -> SafetensorsWriter | CheckpointWriter:
    base, infos = mixture.base, mixture.infos
    dense = base is not None and base.format == "safetensors"
    handed = {} if stated is None else {MERGED_KEY: stated.to_text()}
    metadata = {"format": "pt", **(base.metadata if base is not None and dense else {}), **handed}
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
        metadata=[
            {"format": "pt", **(shard.metadata if dense else {}), **handed} for shard in base.shards
        ],
        index_metadata=base.index_metadata,
        files=[shard.file for shard in base.shards] if own_names else None,
        index_file=base.index_file if own_names else None,
    )


def _shards(mixture: DenseValues, groups: Sequence[Sequence[str]]) -> list[list[TensorInfo]]:
    return [[mixture.infos[name] for name in names] for names in groups]


def _copy_side_files(mixture: DenseValues, partial: Path, progress: Progress) -> dict[str, int]:
    """Copy what lies beside the base's weights; return what does not come along."""
    base = mixture.base
    if base is not None and not base.is_folder:
        return {}
    beside = (
        side_files(mixture.store.path, weights=mixture.store.own_files)
        if base is None
        else side_files(base.path, weights=base.own_files)
    )
    beside.copy(partial, without=[CONFIG_FILE])
    if beside.left:
        progress.warn(f"{beside.folder}: not copied: {named(beside.left)}")
    config = partial / "config.json"
    if config.is_file():
        _update(config, mixture, progress)
    return beside.left


def _config(path: Path) -> Any:
    """Read the copied ``config.json``.

    Raises
    ------
    CheckpointError
        If it is no JSON object.
    """
    found = read_config(path.parent)
    assert found is not None
    return dict(found)


def _update(path: Path, mixture: DenseValues, progress: Progress) -> None:
    """Make ``config.json`` describe the merged tensors, where they are not those of the base."""
    before = _config(path)
    config = before
    if not any(is_code(info) for info in mixture.infos.values()):
        config = {key: value for key, value in config.items() if key != "quantization_config"}
    for key in ("dtype", "torch_dtype"):
        if key in config and mixture.dtype is not None:
            config = {**config, key: dtype_name(mixture.dtype)}
    if mixture.classes is not None:
        config = follow_classes(config, mixture.classes)
    config, unexplained = follow_shapes(config, mixture.reshaped)
    own_head = mixture.untied or any(is_output_head(name) for name in mixture.added)
    if own_head and "architecture" not in config:
        config = untie(config)
    if unexplained:
        progress.warn(
            f"config.json: says nothing that fits the new shapes of {shortlist(unexplained, 4)}; "
            "the folder may not load until it does"
        )
    if config != before:
        with write_errors(path):
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def verify_dense(mixture: DenseValues, partial: Path, target: Path, progress: Progress) -> None:
    """Read what was written again and compare it, bit for bit, with what is derived anew.

    Parameters
    ----------
    mixture : DenseValues
        What was written.
    partial, target : Path
        Where it is now, and its later name.
    progress : Progress

    Raises
    ------
    NumericalError
        If a tensor differs; all that do are named.
    """
    with (
        open_checkpoint(partial) as written,
        progress.task("verifying", len(mixture.infos), unit="tensors") as task,
    ):
        wrong = sorted(written.infos.keys() ^ mixture.infos.keys())
        for name in mixture.infos.keys() & written.infos.keys():
            expected, _ = mixture.tensor(name)
            if not identical(written.read(name), expected):
                wrong.append(name)
            task.advance(detail=name)
    if wrong:
        raise NumericalError(
            f"{target}: {counted(len(wrong), 'tensors', 'differ')} from what was computed when "
            f"read back: {shortlist(wrong)}. Expected identical bytes; check the disk and the "
            "memory."
        )


def identical(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors have the same dtype, shape and bytes."""
    same = one.dtype == other.dtype and one.shape == other.shape
    return same and tensor_digest(one) == tensor_digest(other)


def write_mixed(
    mixture: Mixture, partial: Path, progress: Progress
) -> tuple[list[LayerChange], TunedFile]:
    """Write a mixture as a tuned file.

    Every weight that would change is computed, so that what a dense merge refuses is refused.

    Parameters
    ----------
    mixture : Mixture
        What to write; of one tuned file or more.
    partial : Path
        Where to write it now.
    progress : Progress
        Told how many tensors are done.

    Returns
    -------
    changes : list of LayerChange
        What merging the file will do to each decomposed layer.
    tuned : TunedFile
        What was written.
    """
    changes: list[LayerChange] = []
    with progress.task("mixing", len(mixture.store.layers), unit="layers") as task:
        for _ in computed(mixture, list(mixture.store.layers), changes, task):
            pass
    tuned = mixture.mixed()
    write_tuned(
        partial,
        store=mixture.store,
        S=tuned.S,
        parts=tuned.parts,
        whole=tuned.whole,
        task=tuned.task,
        classes=tuned.classes,
        training=tuned.training,
        dtype=None,
    )
    return changes, tuned
