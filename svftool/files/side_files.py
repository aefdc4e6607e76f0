"""What lies beside the weights of a folder and is copied along."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from svftool.errors import shortlist, write_errors
from svftool.files.names import WEIGHT_SUFFIXES, real

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
