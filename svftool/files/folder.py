"""Which files of a folder are its weights, and what its index and configuration say of them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svftool.errors import CheckpointError, ModelError, brief, counted, shortlist
from svftool.files.header import parse_json
from svftool.files.names import WEIGHT_SUFFIXES, is_plain_name

STEMS = ("model", "diffusion_pytorch_model", "open_clip_model", "pytorch_model")
"""Names of weight files, without suffix, in the order in which they are looked for."""

_PICKLE_STEMS = ("pytorch_model", "diffusion_pytorch_model", "open_clip_pytorch_model", "model")
_TRAINING_STATE = (
    "training_args.", "optimizer.", "scheduler.", "scaler.", "rng_state", "random_states",
)  # fmt: skip
_MAX_JSON = 256_000_000
_AGAIN = "Copy or download the file again."


@dataclass(frozen=True)
class Place:
    """Where a checkpoint was found.

    Attributes
    ----------
    path : Path
        The file or folder.
    index_file : str or None
        Name of the shard index.
    index_metadata : mapping
        What the index says beside its weight map.
    weight_map : mapping of str to str, or None
        Tensor name to shard name, where there is an index.
    config : mapping or None
        ``config.json`` beside the weights.
    notes : tuple of str
        Sentences for the user.
    hub_id : str or None
        ``owner/name`` where it came from the hub.
    """

    path: Path
    index_file: str | None = None
    index_metadata: Mapping[str, Any] = field(default_factory=dict)
    weight_map: Mapping[str, str] | None = None
    config: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    hub_id: str | None = None


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
        More than one only with an index; sorted by name.
    place : Place
        Folder, index, ``config.json``, and notes on what was passed over.

    Raises
    ------
    CheckpointError
        If there are no weights, several that cannot be told apart, or a broken index.
    """
    names = sorted(entry.name for entry in folder.iterdir() if not entry.is_dir())
    candidates = weight_candidates(names, stem)
    if not candidates:
        raise CheckpointError(_nothing_found(folder, names))
    chosen = candidates[0]
    config = read_config(folder)
    if not chosen.endswith(".json"):
        place = Place(folder, config=config, notes=_others(folder, names, (chosen,), stem))
        return (folder / chosen,), place
    weight_map, metadata = read_index(folder / chosen)
    shards = sorted(set(weight_map.values()))
    notes = _others(folder, names, (chosen, *shards), stem)
    files = tuple(folder / name for name in shards)
    return files, Place(folder, chosen, metadata, weight_map, config, notes)


def _others(
    folder: Path, names: Sequence[str], read: Sequence[str], stem: str | None
) -> tuple[str, ...]:
    """Say which files of a folder were taken for its weights, and which were not."""
    if stem is not None:
        return ()
    rest = [name for name in names if name not in read and (_is_index(name) or _is_weights(name))]
    if not rest:
        return ()
    return (f"{folder.name}: the folder also holds {shortlist(rest, 3)}; {read[0]} was read",)


def weight_candidates(names: Sequence[str], stem: str | None = None) -> list[str]:
    """Return the weight files and indexes among a folder's file names, the best first.

    Examples
    --------
    >>> weight_candidates(["config.json", "pytorch_model.bin", "model.safetensors"])
    ['model.safetensors', 'pytorch_model.bin']
    """
    if stem is not None:
        own = (f"{stem}.safetensors", f"{stem}.safetensors.index.json")
        return [name for name in own if name in names]
    usual = [
        name
        for stems, suffix in ((STEMS, ".safetensors"), (_PICKLE_STEMS, ".bin"))
        for one in stems
        for name in (f"{one}{suffix}", f"{one}{suffix}.index.json")
    ]
    return [name for name in usual if name in names] or _unusual(names)


def _unusual(names: Sequence[str]) -> list[str]:
    """Return what can only be the weights where no usual name is: a sole index, a sole file.

    The first kind that is there decides: one of several safetensors is not passed over for the sole
    pickle beside them.
    """
    indexes = [name for name in names if _is_index(name)]
    weights = [name for name in names if _is_weights(name)]
    safetensors = [name for name in weights if name.endswith(".safetensors")]
    blocks = [name for name in names if name.endswith(".gguf")]
    parts = {re.sub(r"-\d{5}-of-", "-of-", name) for name in blocks}
    first = indexes or safetensors or weights or (blocks[:1] if len(parts) == 1 else [])
    return first if len(first) == 1 else []


def _is_weights(name: str) -> bool:
    return name.endswith(WEIGHT_SUFFIXES) and not name.startswith(_TRAINING_STATE)


def _is_index(name: str) -> bool:
    return name.endswith(".json") and (".safetensors.index." in name or ".bin.index." in name)


def _nothing_found(folder: Path, names: Sequence[str]) -> str:
    several = [name for name in names if name.endswith(WEIGHT_SUFFIXES)]
    if several:
        return (
            f"{folder}: {len(several)} weight files and no index ({shortlist(several, 4)}), "
            "expected one file or an index. Name the file that is meant."
        )
    deeper = (path for suffix in WEIGHT_SUFFIXES for path in folder.glob(f"*/*{suffix}"))
    below = sorted({path.parent.name for path in deeper})
    if below:
        return (
            f"{folder}: no weights, expected {STEMS[0]}.safetensors or an index. "
            f"Name one of the folders in it: {shortlist(below, 6)}."
        )
    return (
        f"{folder}: no weights among {counted(len(names), 'files')}, expected model.safetensors, "
        "a shard index, or one file with the suffix .safetensors, .bin, .pt or .pth. "
        "Check the path."
    )


def read_object(path: Path, expected: str) -> dict[str, Any]:
    """Return what a JSON file holds.

    Parameters
    ----------
    path : Path
    expected : str
        What it should be, for messages.

    Raises
    ------
    CheckpointError
        If it is no JSON object, or far too long.
    """
    size = path.stat().st_size
    if size > _MAX_JSON:
        raise CheckpointError(f"{path}: {size} bytes, expected {expected} of less than {_MAX_JSON}")
    try:
        value = parse_json(path.read_bytes())
    except ValueError as error:
        reason = str(error).splitlines()[0][:100]
        raise CheckpointError(
            f"{path}: not readable ({reason}), expected {expected}. {_AGAIN}"
        ) from None
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise CheckpointError(f"{path}: a JSON {kind}, expected {expected}. {_AGAIN}")
    return value


def read_config(folder: Path) -> Mapping[str, Any] | None:
    """Return ``config.json`` of a folder, or None where there is none.

    Raises
    ------
    CheckpointError
        If it is no JSON object.
    """
    path = folder / "config.json"
    return read_object(path, "a JSON object") if path.is_file() else None


def class_labels(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the names of a head's outputs by ``config.json``, or None where it has none.

    Raises
    ------
    ModelError
        If they are not names by number.

    Examples
    --------
    >>> class_labels({"id2label": {"10": "c", "0": "a", "9": "b"}})
    ('a', 'b', 'c')
    """
    known = config.get("id2label")
    if not isinstance(known, Mapping) or not known:
        return None
    numbered = all(str(key).isdecimal() and len(str(key)) < 10 for key in known)
    if not numbered or any(isinstance(name, list | dict) for name in known.values()):
        raise ModelError(
            f"config.json: id2label is {brief(dict(known))}, expected names of classes by number. "
            "Repair config.json, or give the classes with --classes."
        )
    return tuple(str(known[key]) for key in sorted(known, key=int))


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
    index = read_object(path, "a shard index")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: no weight_map, expected a shard index. {_AGAIN}")
    for name, file in weight_map.items():
        if not is_plain_name(file):
            raise CheckpointError(
                f"{path}: {name}: the shard is {brief(file)}, expected the plain name of a weight "
                "file in the same folder. Do not trust this index."
            )
    shards = sorted(set(weight_map.values()))
    missing = [file for file in shards if not (path.parent / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{path}: {shortlist(missing, 4)}: no such file, expected "
            f"{counted(len(shards), 'shards')} beside the index. Copy or download what is missing."
        )
    metadata = index.get("metadata")
    return weight_map, metadata if isinstance(metadata, dict) else {}


def check_shards(place: Place, held: Mapping[str, Collection[str]]) -> None:
    """Check that each shard holds what the index says.

    Parameters
    ----------
    place : Place
    held : mapping of str to collection of str
        Name of each shard to the names of its tensors.

    Raises
    ------
    CheckpointError
        If a tensor of the index is not in its shard.
    """
    weight_map = place.weight_map or {}
    missing = [name for name, file in weight_map.items() if name not in held[file]]
    if missing:
        raise CheckpointError(
            f"{place.path / weight_map[missing[0]]}: {shortlist(missing, 4)}: not in the file, "
            f"expected it there as {place.index_file} says. Copy or download the shards again."
        )
