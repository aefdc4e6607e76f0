"""Which files of a folder are its weights, its index, and what is copied along."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svftool.errors import (
    CheckpointError,
    DataError,
    FactorsError,
    ModelError,
    UsageError,
    brief,
    shortlist,
    write_errors,
)
from svftool.files.header import parse_json

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".th", ".tar", ".ckpt")
WEIGHT_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)
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


TUNED_SUFFIX = ".svf.safetensors"
"""How the name of a tuned file ends."""


def is_tuned_name(path: Path) -> bool:
    """Tell whether a file of this name is a tuned file.

    Examples
    --------
    >>> is_tuned_name(Path("birds.svf.safetensors")), is_tuned_name(Path("birds.safetensors"))
    (True, False)
    """
    return path.name.endswith(TUNED_SUFFIX)


def check_dense_name(path: Path, *, tuned: bool = False) -> None:
    """Refuse the name of a tuned file for other weights.

    Parameters
    ----------
    path : Path
        What is to be written.
    tuned : bool
        A tuned file is written.

    Raises
    ------
    UsageError
        Says which name would do.
    """
    stem = path.with_suffix("")
    if stem.suffix != ".svf" or path.suffix not in WEIGHT_SUFFIXES or tuned:
        return
    expected = f"for dense weights one such as {path.with_name(stem.stem + path.suffix)}"
    if not is_tuned_name(path):
        expected += f", for a tuned file {stem}.safetensors"
    raise UsageError(f"{path}: the name of a tuned file, and none is written, expected {expected}")


FACTORS_FILE = "svf_config.json"
"""What makes a folder a factor checkpoint."""

TUNED_KEY = "svftool"
"""Metadata of a safetensors file that makes it a tuned file."""

EXACT_KEY = "svftool.exact"
"""Metadata of a safetensors file that makes it an exact delta."""


def real(path: Path) -> Path:
    """Return the absolute path with all links followed.

    Unlike `Path.resolve` it raises nothing for links that lead in a circle, which Python answers
    with a RuntimeError before 3.13; opening such a path says what is wrong.
    """
    return Path(os.path.realpath(path))


def check_exists(text: str | os.PathLike[str]) -> None:
    """Refuse a name that is neither here nor can be a hub id.

    Raises
    ------
    CheckpointError
        If there is no such file or folder.
    """
    place = Path(text)
    if place.exists() or is_on_hub(os.fspath(text)):
        return
    found = "a link that leads nowhere" if place.is_symlink() else "no such file or folder"
    raise CheckpointError(f"{text}: {found}, expected a checkpoint. Check the path.")


def check_factors(folder: Path) -> None:
    """Refuse a folder that holds no factors.

    Raises
    ------
    FactorsError
        If it has no ``svf_config.json``.
    """
    if not (folder / FACTORS_FILE).is_file():
        raise FactorsError(
            f"{folder}: no {FACTORS_FILE}, expected a folder written by 'svftool decompose'. "
            "Run 'svftool decompose CHECKPOINT -o FACTORS' first."
        )


def check_base(folder: Path, names: Collection[str]) -> None:
    """Refuse a base without factors where tuned files need them; adapters need none.

    Raises
    ------
    FactorsError
        If it has no factors, and nothing is named or a tuned file is.
    """
    tuned = (is_tuned_name(Path(re.sub(r"@[^@]*$", "", name))) for name in names)
    if not names or any(tuned) or not folder.exists():
        check_factors(folder)


def check_tuned_exist(names: Iterable[str]) -> None:
    """Refuse tuned files that are not there; each may carry a weight, ``FILE@0.5``.

    Raises
    ------
    FactorsError
        If one is missing.
    """
    for name in names:
        path = name if Path(name).exists() else name.rpartition("@")[0] or name
        if not Path(path).exists():
            raise FactorsError(
                f"{path}: no such file, expected a tuned file of 'svftool finetune'. "
                "Check the path."
            )


def check_data(path: Path, task: str = "language") -> None:
    """Refuse data that is not there, and texts for a task on images.

    Parameters
    ----------
    path : Path
    task : str
        The value of ``--task``.

    Raises
    ------
    DataError
        If there is no such file or folder, or it holds what another task takes.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder, expected a data set. Check the path.")
    found = None if task in TEXT_TASKS else texts_in(path)
    if found is not None:
        raise DataError(
            f"{path}: {found.what}, expected images for --task {task}. {found.way_out}."
        )


TEXT_TASKS = ("language", "text-classification")
"""Tasks on texts."""
TEXT_COLUMNS = ("text", "prompt", "completion")
"""What an example of ``--task language`` may consist of."""
_LONGEST_HEADER = 1 << 16


@dataclass(frozen=True)
class TextsFound:
    """Texts where something else was expected.

    Attributes
    ----------
    what : str
        What they are.
    labelled : bool
        Whether each has a class, as far as the first row says.
    """

    what: str
    labelled: bool

    @property
    def way_out(self) -> str:
        """Which task takes them."""
        if self.labelled:
            return "Add --task text-classification, or --task language to model the texts"
        return "Add --task language"


def are_labelled(columns: Sequence[str]) -> bool:
    """Whether columns are those of texts with a class each: ``text``, and one other or ``label``.

    Examples
    --------
    >>> are_labelled(["text", "category"]), are_labelled(["prompt", "completion"])
    (True, False)
    """
    others = [column.lower() for column in columns if column.lower() != "text"]
    if len(others) == len(columns) or {"prompt", "completion"} & set(others):
        return False
    return "label" in others or (len(others) == 1 and others[0] not in _NUMBERS)


_NUMBERS = ("", "id", "idx", "index")
"""Columns that number rows, and name no class."""


def texts_in(path: Path) -> TextsFound | None:
    """Say which texts a file or folder holds, by its name and first row; None for no texts."""
    if path.is_dir():
        inside = [one for one in sorted(path.iterdir()) if not one.name.startswith(".")]
        if any(one.is_dir() for one in inside):
            return None
        return next((texts_in(one) for one in inside if one.suffix.lower() == ".jsonl"), None)
    kind = path.suffix.lower()
    if kind not in (".jsonl", ".csv", ".tsv"):
        return None
    with path.open("rb") as stream:
        first = stream.readline(_LONGEST_HEADER).decode("utf-8-sig", "replace")
    if kind == ".jsonl":
        return TextsFound("JSONL of texts", are_labelled(_keys(first)))
    cells = first.split("\t" if kind == ".tsv" else ",")
    columns = [column.strip(' "\r\n').lower() for column in cells]
    named = [column for column in columns if column in TEXT_COLUMNS]
    # A header of path,label is one of images, whatever else stands beside it.
    images = "path" in columns and "label" in columns
    if not named or images:
        return None
    what = f"a {kind[1:].upper()} of texts (column {shortlist(named)})"
    return TextsFound(what, are_labelled(columns))


def _keys(line: str) -> list[str]:
    """Return the keys of a line of JSONL; none where it is no object."""
    try:
        record = parse_json(line)
    except ValueError:
        return []
    return list(record) if isinstance(record, dict) else []


def check_predictions_name(path: Path, *, folder: bool | None = None) -> None:
    """Refuse a name that says nothing of how predictions are written.

    Parameters
    ----------
    path : Path
        What is to be written.
    folder : bool or None
        Whether it is a folder of pictures; None where that is not known yet.

    Raises
    ------
    UsageError
        If the suffix is neither ``.jsonl`` nor ``.csv``, or one for a folder.
    """
    table = path.suffix in (".jsonl", ".csv")
    if folder and table:
        raise UsageError(f"{path}: maps are pictures, expected the name of a folder for them")
    if not table and (folder is False or path.suffix in (".json", ".tsv", ".txt", ".xlsx")):
        raise UsageError(f"{path}: expected a name that ends in .jsonl or .csv")


_PART = r"[A-Za-z0-9][\w.-]*"
_HUB_ID = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:/(?P<folder>{_PART}(?:/{_PART})*))?")
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]*")


@dataclass(frozen=True)
class HubPlace:
    """What a hub id names: ``OWNER/NAME``, ``OWNER/NAME@REVISION``, ``OWNER/NAME/SUBFOLDER``.

    Attributes
    ----------
    repo : str
    folder : str
        Within the repository; empty for the whole.
    revision : str or None
        A branch, a tag, a commit, or ``refs/pr/N``.
    """

    repo: str
    folder: str = ""
    revision: str | None = None


def hub_place(text: str) -> HubPlace | None:
    """Read a hub id; None where it is none.

    Examples
    --------
    >>> hub_place("owner/name/unet@refs/pr/1")
    HubPlace(repo='owner/name', folder='unet', revision='refs/pr/1')
    """
    name, mark, revision = text.partition("@")
    found = _HUB_ID.fullmatch(name)
    if found is None or name.endswith(WEIGHT_SUFFIXES):
        return None
    if (mark or revision) and not _REVISION.fullmatch(revision):
        return None
    return HubPlace(found["repo"], found["folder"] or "", revision or None)


def looks_like_hub_id(text: str) -> bool:
    """Tell whether `text` can be a repository on the hub, or a folder of one; no weight file.

    Examples
    --------
    >>> looks_like_hub_id("timm/resnet18.a1_in1k"), looks_like_hub_id("folder/model.safetensors")
    (True, False)
    """
    return hub_place(text) is not None


def is_on_hub(text: str) -> bool:
    """Tell whether a name can only be on the hub: an id, and no place within anything here."""
    first = Path(text.partition("/")[0])
    return looks_like_hub_id(text) and not os.path.lexists(text) and not os.path.lexists(first)


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
        f"{folder}: no weights among {len(names)} files, expected model.safetensors, "
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
            f"{path}: {shortlist(missing, 4)}: no such file, expected {len(shards)} shards "
            "beside the index. Copy or download what is missing."
        )
    metadata = index.get("metadata")
    return weight_map, metadata if isinstance(metadata, dict) else {}


def is_plain_name(name: object) -> bool:
    """Tell whether `name` is that of a weight file in the same folder, without looking there.

    Examples
    --------
    >>> is_plain_name("model-00001-of-00002.safetensors"), is_plain_name("../model.safetensors")
    (True, False)
    """
    if not isinstance(name, str) or any(char in name for char in "/\\:\0"):
        return False
    return not name.startswith(".") and name.endswith(WEIGHT_SUFFIXES)


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


# What belongs to a checkpoint beside its weights: config, tokenizer, code, licence.


# Weights of this and other libraries, archives, and work in progress.
_LEFT_OUT = (
    *WEIGHT_SUFFIXES,
    ".h5", ".hdf5", ".keras", ".msgpack", ".onnx", ".onnx_data", ".pb", ".tflite", ".gguf",
    ".ggml", ".npz", ".npy", ".ot", ".pkl", ".pickle", ".mlmodel", ".mlpackage", ".pdparams",
    ".engine", ".zip", ".gz", ".xz", ".bz2", ".7z", ".lock", ".partial", ".incomplete",
)  # fmt: skip
_CACHES = ("__pycache__", "runs", "wandb", "node_modules")


_MOST = 16 << 20
"""Largest file, in bytes, that is copied."""
TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "sentencepiece.bpe.model", "spiece.model", "vocab.json",
    "vocab.txt", "merges.txt", "tekken.json",
)  # fmt: skip
_MOST_TOKENIZER = 256 << 20
_LINK_DEPTH = 3  # a hub cache: models--OWNER--NAME/snapshots/REVISION beside .../blobs


@dataclass
class SideFiles:
    """What lies beside a checkpoint's weights.

    Attributes
    ----------
    folder : Path
    kept : list of Path
        Files to copy, sorted; those of subfolders keep their place relative to `folder`.
    left : dict of str to int
        What is left out, by its place in the folder, with its bytes. A subfolder with weights of
        its own is one entry.
    """

    folder: Path
    kept: list[Path] = field(default_factory=list)
    left: dict[str, int] = field(default_factory=dict)

    def copy(self, target: Path, *, without: Collection[str] = ()) -> None:
        """Copy them into a folder, each to its place.

        Raises
        ------
        ResourceError
            If the disk refuses it.
        """
        for file in self.kept:
            place = file.relative_to(self.folder)
            if str(place) not in without:
                with write_errors(target / place):
                    (target / place).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(file, target / place)


def named(left: Mapping[str, int]) -> str:
    """Return a list of what was left out, with its bytes."""
    return shortlist((f"{name} ({size:,} bytes)" for name, size in left.items()), 8)


def side_files(folder: Path, *, weights: Collection[str] = ()) -> SideFiles:
    """Find what is copied along with a checkpoint, and what is not.

    Left out are weights in any format, shard indexes, training state, hidden files, caches,
    subfolders with weights of their own, files over 16 MiB that are no tokenizer, and links that
    lead out of the folder. Judged by name and size.

    Parameters
    ----------
    folder : Path
    weights : collection of str
        Names of the checkpoint's own weights and index, which are not left out but read.
    """
    found = SideFiles(folder)
    _collect(folder, found)
    found.left = {name: size for name, size in found.left.items() if name not in weights}
    return found


def _collect(folder: Path, found: SideFiles) -> None:
    for entry in sorted(folder.iterdir()):
        place = str(entry.relative_to(found.folder))
        if entry.name.startswith(".") or _is_own(entry.name) or entry.name in _CACHES:
            continue
        if entry.is_dir() and not entry.is_symlink():
            if _is_part(entry):
                _collect(entry, found)
            else:
                found.left[place] = sum(_size(path) for path in _walk(entry))
        elif entry.is_file() and _belongs(entry) and _is_inside(entry, found.folder):
            found.kept.append(entry)
        else:
            found.left[place] = _size(entry)


def _walk(folder: Path) -> Iterator[Path]:
    """List the files of a folder; links to folders are not followed."""
    for here, _, names in os.walk(folder):
        yield from (Path(here, name) for name in names)


def _size(path: Path) -> int:
    return path.lstat().st_size


def _is_own(name: str) -> bool:
    return name.lower() in ("svf_config.json",) or name.lower().startswith("events.out.tfevents")


def _belongs(path: Path) -> bool:
    lower = path.name.lower()
    index = lower.endswith(".json") and ".index." in lower
    if index or lower.endswith(_LEFT_OUT):
        return False
    return path.stat().st_size <= (_MOST_TOKENIZER if lower in TOKENIZERS else _MOST)


def _is_inside(path: Path, folder: Path) -> bool:
    """Tell whether a link stays in its folder, or leads to the files of the same hub cache."""
    if not path.is_symlink():
        return True
    target, root = real(path), real(folder)
    caches = list(root.parents)[:_LINK_DEPTH]
    return target.is_relative_to(root) or target.parent in [one / "blobs" for one in caches]


def _is_part(folder: Path) -> bool:
    return not any(path.name.lower().endswith(_LEFT_OUT) for path in _walk(folder))
