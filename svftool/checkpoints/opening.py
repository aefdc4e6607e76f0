"""Opening a checkpoint, wherever it is and whatever its format."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from svftool.checkpoints.base import Checkpoint, Format, WeightFile
from svftool.checkpoints.pickle_file import ZIP_MAGIC, PickleFile
from svftool.checkpoints.quantised import QuantisedCheckpoint, understood
from svftool.checkpoints.quantised.gguf_file import GGUFFile
from svftool.checkpoints.safetensors_file import SafetensorsFile
from svftool.errors import CheckpointError, ResourceError, system_fault
from svftool.files.folder import STEMS, Place, check_shards, find_weights, read_config
from svftool.files.gguf import MAGIC as GGUF_MAGIC
from svftool.files.given import check_exists
from svftool.files.header import announces_header, describe_start
from svftool.files.hub import fetch, named_in_cache
from svftool.files.hub_ids import is_on_hub
from svftool.files.names import EXACT_KEY, FACTORS_FILE, PICKLE_SUFFIXES

_SHARD = re.compile(r".+-(\d{5})-of-(\d{5})\.\w+")


def open_checkpoint(
    path: str | os.PathLike[str], *, stem: str | None = None, stored: bool = False
) -> Checkpoint:
    """Open a checkpoint for reading, without reading its tensors.

    Parameters
    ----------
    path : str or path
        A weight file; a folder with one, or with a shard index; or a hub id that is not the name
        of anything here: ``OWNER/NAME``, ``OWNER/NAME/SUBFOLDER``, each with ``@REVISION``.
    stem : str, optional
        In a folder, open only ``STEM.safetensors`` or its shards.
    stored : bool
        Show codes as they are stored, not as the numbers that they stand for.

    Returns
    -------
    Checkpoint
        A context manager.

    Raises
    ------
    CheckpointError
        If there is no such checkpoint, or it is cut off, foreign, or carries code.
    ResourceError
        If it may not be read, or memory does not suffice for a pickle in the old format.
    MissingDependencyError
        If it could only be on the hub and huggingface_hub is not installed.
    """
    text = os.fspath(path)
    place = Path(text)
    try:
        if is_on_hub(text):
            return _open_folder(fetch(text), stem, stored=stored, hub_id=text)
        if place.is_dir():
            return _open_folder(place, stem, stored=stored)
        if place.is_file():
            return _open_file(named_in_cache(place), stored=stored)
    except PermissionError as error:
        raise ResourceError(
            f"{error.filename or text}: no permission to read, expected a readable checkpoint. "
            "Change the permissions."
        ) from error
    except OSError as error:
        system_fault(error, text)
        reason = error.strerror or error
        raise CheckpointError(f"{text}: {reason}, expected a readable checkpoint.") from error
    check_exists(text)
    raise CheckpointError(f"{text}: neither a file nor a folder, expected a checkpoint.")


def _open_file(path: Path, *, stored: bool) -> Checkpoint:
    usual = path.name.partition(".")[0] in STEMS
    # The parts of a split GGUF are always read together.
    shard = _SHARD.fullmatch(path.name) if path.suffix != ".gguf" else None
    notes: tuple[str, ...] = ()
    if shard is not None:
        notes = (
            f"{path.name}: shard {int(shard[1])} of {int(shard[2])}; only its tensors are read "
            "(the folder's name reads all)",
        )
    config = read_config(path.parent) if usual else None
    return _open_all([path], Place(path, config=config, notes=notes), stored=stored)


def _open_folder(
    folder: Path, stem: str | None, *, stored: bool, hub_id: str | None = None
) -> Checkpoint:
    if stem is None and (folder / FACTORS_FILE).is_file():
        raise CheckpointError(
            f"{folder}: svf_config.json says that these are factors, expected a checkpoint. "
            "Run 'svftool merge' on the folder, or name the checkpoint it was made from."
        )
    if stem is None and (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder}: adapter_config.json says that this is an adapter, expected a whole "
            "checkpoint. Merge the adapter into its base model first."
        )
    files, place = find_weights(folder, stem)
    return _open_all(files, replace(place, hub_id=hub_id), stored=stored)


def _open_all(paths: Sequence[Path], place: Place, *, stored: bool) -> Checkpoint:
    files: list[WeightFile] = []
    try:
        for path in paths:
            files.append(_weight_file(path))
        check_shards(place, {file.path.name: file.infos for file in files})
        _refuse_delta(files)
    except BaseException:
        for file in files:
            file.close()
        raise
    kind = _format(files)
    own = next((one.config for one in files if isinstance(one, GGUFFile)), None)
    if place.config is None and own is not None:
        place = replace(place, config=own)
    checkpoint = Checkpoint(place, files, format=kind)
    coded = {} if stored else understood(checkpoint)
    return QuantisedCheckpoint(place, files, coded, format=kind) if coded else checkpoint


def _refuse_delta(files: Sequence[WeightFile]) -> None:
    for file in files:
        if EXACT_KEY in file.metadata:
            raise CheckpointError(
                f"{file.path}: an exact delta, whose bytes are no weights, expected a checkpoint. "
                "Run 'svftool merge BASE DELTA -o OUT' and name what it writes."
            )


def _format(files: Sequence[WeightFile]) -> Format:
    if any(isinstance(file, PickleFile) for file in files):
        return "pickle"
    return "gguf" if any(isinstance(file, GGUFFile) for file in files) else "safetensors"


def _weight_file(path: Path) -> WeightFile:
    """Open one file by its suffix, and by its first bytes where the suffix does not decide."""
    with path.open("rb") as file:
        start = file.read(32)
    if path.suffix == ".safetensors" or announces_header(start, path.stat().st_size):
        return SafetensorsFile(path)
    if start.startswith((ZIP_MAGIC, b"\x80")):
        return PickleFile(path)
    if start.startswith(GGUF_MAGIC):
        return GGUFFile(path)
    expected = "a pickle of torch" if path.suffix in PICKLE_SUFFIXES else "a checkpoint"
    raise CheckpointError(
        f"{path}: {describe_start(start)}, expected {expected}. Check where the file came from."
    )
