"""Which files of a folder are its weights, which are its index, and which are copied along."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from svftool.checkpoints.base import Place
from svftool.errors import CheckpointError, shortlist

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".th", ".tar", ".ckpt")
WEIGHT_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)
STEMS = ("model", "diffusion_pytorch_model", "open_clip_model", "pytorch_model")
_PICKLE_STEMS = ("pytorch_model", "diffusion_pytorch_model", "open_clip_pytorch_model", "model")

# Weights of other libraries, and pickles of the training state.
_OTHER_WEIGHTS = (
    ".h5", ".hdf5", ".keras", ".msgpack", ".onnx", ".onnx_data", ".pb", ".tflite", ".gguf", ".ggml",
    ".npz", ".npy", ".ot", ".pkl", ".pickle", ".mlmodel", ".mlpackage", ".pdparams", ".engine",
    ".safetensors.partial", ".zip", ".gz", ".xz", ".bz2", ".7z",
)  # fmt: skip
_TRAINING_FILES = (
    "training_args.bin",
    "optimizer.",
    "scheduler.",
    "rng_state",
    "scaler.",
    "optim_",
)
_CACHE_FOLDERS = ("__pycache__", "runs", "wandb", "node_modules")
_MAX_JSON = 256_000_000


def find_weights(folder: Path, stem: str | None = None) -> tuple[tuple[Path, ...], Place]:
    """Decide which weight files a folder's checkpoint consists of.

    Parameters
    ----------
    folder : Path
        An existing folder.
    stem : str, optional
        Look only for ``STEM.safetensors`` or its index.

    Returns
    -------
    files : tuple of Path
        All of one format; more than one only with an index.
    place : Place
        Folder, index, ``config.json``, and notes on what was passed over.

    Raises
    ------
    CheckpointError
        If there are no weights, several that cannot be told apart, or a broken index.
    """
    names = sorted(
        entry.name for entry in folder.iterdir() if entry.is_file() or entry.is_symlink()
    )
    candidates = _candidates(names, stem)
    if not candidates:
        raise CheckpointError(_nothing_found(folder, names))
    chosen = candidates[0]
    notes = []
    if len(candidates) > 1:
        others = shortlist(candidates[1:], 3)
        notes.append(f"{folder.name}: the folder also holds {others}; {chosen} was read")
    config = read_config(folder)
    if not chosen.endswith(".json"):
        return (folder / chosen,), Place(folder, config=config, notes=tuple(notes))
    weight_map, metadata = read_index(folder / chosen)
    files = tuple(folder / name for name in dict.fromkeys(weight_map.values()))
    place = Place(folder, chosen, metadata, weight_map, config, tuple(notes))
    return files, place


def _candidates(names: Sequence[str], stem: str | None) -> list[str]:
    """Return the possible weight files and indexes, the best first."""
    if stem is not None:
        return [
            name
            for name in (f"{stem}.safetensors.index.json", f"{stem}.safetensors")
            if name in names
        ]
    known = [
        name
        for stems, suffix in ((STEMS, ".safetensors"), (_PICKLE_STEMS, ".bin"))
        for one in stems
        for name in (f"{one}{suffix}", f"{one}{suffix}.index.json")
        if name in names
    ]
    return known or _unusual(names)


def _unusual(names: Sequence[str]) -> list[str]:
    """Return what can only be the weights when no usual name is there: a sole index, a sole file."""
    indexes = [name for name in names if name.endswith(".json") and ".index." in name]
    safetensors = [name for name in names if name.endswith(".safetensors")]
    pickles = [
        name
        for name in names
        if name.endswith(PICKLE_SUFFIXES) and not name.startswith(_TRAINING_FILES)
    ]
    return next((kind for kind in (indexes, safetensors, pickles) if len(kind) == 1), [])


def _nothing_found(folder: Path, names: Sequence[str]) -> str:
    several = [name for name in names if name.endswith(WEIGHT_SUFFIXES)]
    if several:
        return (
            f"{folder}: {len(several)} weight files and no index ({shortlist(several, 4)}), "
            "expected one file or an index. Name the file that is meant."
        )
    below = sorted(
        {path.parent.name for suffix in WEIGHT_SUFFIXES for path in folder.glob(f"*/*{suffix}")}
    )
    if below:
        return (
            f"{folder}: no weights here, expected {STEMS[0]}.safetensors or an index. "
            f"Name one of its folders: {shortlist(below, 6)}."
        )
    return (
        f"{folder}: no weights among its {len(names)} files, expected model.safetensors, a shard index, "
        "or one file with the suffix .safetensors, .bin, .pt or .pth. Check the path."
    )


def read_json(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises
    ------
    CheckpointError
        If it is no JSON, or larger than any such file has reason to be.
    """
    if path.stat().st_size > _MAX_JSON:
        raise CheckpointError(
            f"{path}: {path.stat().st_size} bytes, expected a JSON file of less than {_MAX_JSON}."
        )
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:120]
        raise CheckpointError(
            f"{path}: not readable ({reason}), expected JSON. Copy or download the file again."
        ) from None


def read_config(folder: Path) -> Mapping[str, Any] | None:
    """Return ``config.json`` of a folder, or None where there is none.

    Raises
    ------
    CheckpointError
        If it is no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    config = read_json(path)
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{path}: a JSON {type(config).__name__}, expected an object. Copy or download the file again."
        )
    return config


def read_index(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Read and check a shard index.

    Returns
    -------
    weight_map : dict of str to str
        Tensor name to the plain name of a file beside the index.
    metadata : dict
        The index's own metadata.

    Raises
    ------
    CheckpointError
        If it is no index, or names a file outside its folder or one that is missing.
    """
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path}: no weight_map, expected a shard index with tensor and file names. Copy or download it again."
        )
    for name, file in weight_map.items():
        if not is_plain_name(file):
            raise CheckpointError(
                f"{path}: {name}: the shard is {file!r}, expected the plain name of a file in the same folder. "
                "Do not use this index unless you trust it."
            )
    missing = [
        file for file in dict.fromkeys(weight_map.values()) if not (path.parent / file).is_file()
    ]
    if missing:
        raise CheckpointError(
            f"{path}: {shortlist(missing, 4)}: no such file, expected {len(set(weight_map.values()))} "
            "shards beside the index. Copy or download what is missing."
        )
    metadata = index.get("metadata")
    return weight_map, metadata if isinstance(metadata, dict) else {}


def is_plain_name(name: object) -> bool:
    """Tell whether `name` is that of a weight file in the same folder, judged without looking there.

    Examples
    --------
    >>> is_plain_name("model-00001-of-00002.safetensors"), is_plain_name("../model.safetensors")
    (True, False)
    """
    if not isinstance(name, str) or any(char in name for char in "/\\:\0"):
        return False
    return not name.startswith(".") and name.endswith(WEIGHT_SUFFIXES)


def side_files(folder: Path) -> list[Path]:
    """Return what belongs to a checkpoint beside its weights: config, tokenizer, code, licence.

    Weights in any format, shard indexes, training state, hidden files, caches, and subfolders
    with weights of their own are left out. Judged by name; symbolic links count as files.

    Returns
    -------
    list of Path
        Files, sorted; those of subfolders keep their place relative to `folder`.
    """
    found: list[Path] = []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_file():
            found += [entry] if _is_side_file(entry.name) else []
        elif entry.is_dir() and not entry.is_symlink() and _is_side_folder(entry):
            found += side_files(entry)
    return found


def _is_side_file(name: str) -> bool:
    lower = name.lower()
    if lower.endswith(
        (*WEIGHT_SUFFIXES, *_OTHER_WEIGHTS, ".index.json", ".lock", ".partial", ".incomplete")
    ):
        return False
    if ".index." in lower and lower.endswith(".json"):
        return False
    return not lower.startswith(("svf_config.json", "events.out.tfevents"))


def _is_side_folder(folder: Path) -> bool:
    if folder.name in _CACHE_FOLDERS:
        return False
    return not any(
        path.name.lower().endswith((*WEIGHT_SUFFIXES, *_OTHER_WEIGHTS))
        for path in folder.rglob("*")
    )
