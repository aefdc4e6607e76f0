"""What belongs to a checkpoint beside its weights: config, tokenizer, code, licence."""

from __future__ import annotations

from pathlib import Path

from svftool.checkpoints.folder import WEIGHT_SUFFIXES

# Weights of this and other libraries, archives, and work in progress.
_LEFT_OUT = (
    *WEIGHT_SUFFIXES,
    ".h5", ".hdf5", ".keras", ".msgpack", ".onnx", ".onnx_data", ".pb", ".tflite", ".gguf",
    ".ggml", ".npz", ".npy", ".ot", ".pkl", ".pickle", ".mlmodel", ".mlpackage", ".pdparams",
    ".engine", ".zip", ".gz", ".xz", ".bz2", ".7z", ".lock", ".partial", ".incomplete",
)  # fmt: skip
_CACHES = ("__pycache__", "runs", "wandb", "node_modules")


def side_files(folder: Path) -> list[Path]:
    """Return what is copied along with a checkpoint.

    Weights in any format, shard indexes, training state, hidden files, caches, and subfolders
    with weights of their own are left out. Judged by name; links to files count as files.

    Parameters
    ----------
    folder : Path

    Returns
    -------
    list of Path
        Files, sorted; those of subfolders keep their place relative to `folder`.
    """
    found: list[Path] = []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_file() and _belongs(entry.name):
            found.append(entry)
        elif entry.is_dir() and not entry.is_symlink() and _is_part(entry):
            found += side_files(entry)
    return found


def _belongs(name: str) -> bool:
    lower = name.lower()
    index = lower.endswith(".json") and ".index." in lower
    own = lower in ("svf_config.json",) or lower.startswith("events.out.tfevents")
    return not (index or own or lower.endswith(_LEFT_OUT))


def _is_part(folder: Path) -> bool:
    if folder.name in _CACHES:
        return False
    return not any(path.name.lower().endswith(_LEFT_OUT) for path in folder.rglob("*"))
