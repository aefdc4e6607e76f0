"""Opening a checkpoint, wherever it is and whatever its format."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from svftool.checkpoints.base import Checkpoint, Format, Place, WeightFile
from svftool.checkpoints.folder import PICKLE_SUFFIXES, STEMS, find_weights, read_config
from svftool.checkpoints.hub import fetch, looks_like_hub_id
from svftool.checkpoints.pickle_file import ZIP_MAGIC, PickleFile
from svftool.checkpoints.safetensors_file import SafetensorsFile
from svftool.errors import CheckpointError, shortlist


def open_checkpoint(path: str | os.PathLike[str], *, stem: str | None = None) -> Checkpoint:
    """Open a checkpoint for reading, without reading its tensors.

    Parameters
    ----------
    path : str or path
        A weight file; a folder with one, or with a shard index; or a hub id ``owner/name`` that
        is not the name of anything here.
    stem : str, optional
        In a folder, open only ``STEM.safetensors`` or its shards.

    Returns
    -------
    Checkpoint
        A context manager.

    Raises
    ------
    CheckpointError
        If there is no such checkpoint, or it is cut off, foreign, or carries code.
    MissingDependencyError
        If it could only be on the hub and huggingface_hub is not installed.
    """
    text = os.fspath(path)
    place = Path(text)
    if not place.exists() and looks_like_hub_id(text):
        return _open_folder(fetch(text), stem, hub_id=text)
    try:
        if place.is_dir():
            return _open_folder(place, stem)
        if place.is_file():
            return _open_file(place)
    except OSError as error:
        raise CheckpointError(
            f"{text}: {error.strerror or error}, expected a readable checkpoint."
        ) from error
    kind = "a broken link" if place.is_symlink() else "no such file or folder"
    raise CheckpointError(f"{text}: {kind}, expected a checkpoint. Check the path.")


def _open_file(path: Path) -> Checkpoint:
    stem = path.name.partition(".")[0]
    config = read_config(path.parent) if stem in STEMS else None
    return _open_all([path], Place(path, config=config))


def _open_folder(folder: Path, stem: str | None, *, hub_id: str | None = None) -> Checkpoint:
    if stem is None and (folder / "svf_config.json").is_file():
        raise CheckpointError(
            f"{folder}: svf_config.json says that these are factors, expected a checkpoint. "
            "Run 'svftool merge' on the folder, or name the checkpoint it was made from."
        )
    files, place = find_weights(folder, stem)
    return _open_all(files, replace(place, hub_id=hub_id))


def _open_all(paths: Sequence[Path], place: Place) -> Checkpoint:
    files: list[WeightFile] = []
    try:
        for path in paths:
            files.append(_weight_file(path))
        if place.weight_map is not None:
            _check_index(place.path / str(place.index_file), place.weight_map, files)
        formats: set[Format] = {_format(file) for file in files}
        if len(formats) > 1:
            raise CheckpointError(
                f"{place.path}: shards in several formats ({', '.join(sorted(formats))}), expected one format."
            )
        return Checkpoint(place, files, format=formats.pop())
    except BaseException:
        for file in files:
            file.close()
        raise


def _format(file: WeightFile) -> Format:
    return "safetensors" if isinstance(file, SafetensorsFile) else "pickle"


def _weight_file(path: Path) -> WeightFile:
    """Open one file by what its first bytes and its suffix say."""
    with path.open("rb") as file:
        start = file.read(16)
    pickled = start.startswith((ZIP_MAGIC, b"\x80"))
    if path.suffix in PICKLE_SUFFIXES:
        if not pickled:
            raise CheckpointError(
                f"{path}: {describe_start(path, start)}, expected a pickle of torch. Check where the file came from."
            )
        return PickleFile(path)
    if path.suffix != ".safetensors" and start[8:9] != b"{":
        if pickled:
            return PickleFile(path)
        raise CheckpointError(
            f"{path}: {describe_start(path, start)}, expected safetensors or a pickle of torch. "
            "Check where the file came from."
        )
    return SafetensorsFile(path)


def describe_start(path: Path, start: bytes) -> str:
    """Say what a file that is no checkpoint seems to be."""
    if not start:
        return "the file is empty"
    if start.startswith(b"version https"):
        return "the file is a Git LFS pointer (git lfs pull fetches the weights)"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "the file is a web page"
    if start.startswith(b"GGUF"):
        return "the file is in GGUF format"
    return f"the file starts with {start[:8]!r}"


def _check_index(index: Path, weight_map: Mapping[str, str], files: Sequence[WeightFile]) -> None:
    """Check that each shard holds what the index says."""
    held = {file.path.name: file.infos for file in files}
    missing = [name for name, file in weight_map.items() if name not in held[file]]
    if missing:
        raise CheckpointError(
            f"{index}: {weight_map[missing[0]]} does not hold {shortlist(missing, 4)}, expected every tensor that "
            "the index names in its shard. Copy or download the shards again."
        )
