"""Fetching a checkpoint from the Hugging Face hub, or from its local cache when offline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from svftool.errors import CheckpointError, MissingDependencyError
from svftool.files.folder import real, weight_candidates

_SIDE_FILES = (
    ".json", ".txt", ".model", ".py", ".md", ".jinja", ".vocab", ".tiktoken", "LICENSE",
)  # fmt: skip


def named_in_cache(path: Path) -> Path:
    """Return a file of a hub cache under the name that its repository gives it.

    The cache holds each file once, under its hash (``models--x--y/blobs/SHA``). Every revision has
    a link to it (``snapshots/REVISION/model.safetensors``), and the name, the configuration and the
    tokenizer are beside the link alone. Of several revisions that of ``refs/main`` comes first.

    Parameters
    ----------
    path : Path
        Any path; one that is not the blob of a cache is returned as it is.
    """
    blob = real(path)
    cache = blob.parent.parent
    if path.is_symlink() or blob.parent.name != "blobs" or not (cache / "snapshots").is_dir():
        return path
    main = cache / "refs" / "main"
    first = main.read_text(encoding="utf-8", errors="replace").strip() if main.is_file() else ""
    links = [link for link in (cache / "snapshots").rglob("*") if real(link) == blob]
    links.sort(key=lambda link: (first not in link.parts, str(link)))
    return links[0] if links else path


def lasting_path(path: Path) -> Path:
    """Return the absolute path to record of a checkpoint: that of the file itself, not of a link.

    A link is kept where what belongs to the file lies beside the link alone, as in a hub cache.
    """
    target = real(path)
    link = real(path.parent) / path.name
    beside_link = (link.parent / "config.json").is_file()
    beside_file = (target.parent / "config.json").is_file()
    in_cache = target.parent.name == "blobs"
    return link if path.is_file() and (in_cache or (beside_link and not beside_file)) else target


def fetch(hub_id: str) -> Path:
    """Return the local folder of a repository, downloading what a checkpoint needs of it.

    Raises
    ------
    MissingDependencyError
        If huggingface_hub is not installed.
    CheckpointError
        If the repository cannot be reached and is not in the cache.
    """
    try:
        import huggingface_hub as hub
    except ImportError:
        purpose = f"there is no file or folder {hub_id!r} here; fetching it from the hub"
        raise MissingDependencyError("huggingface_hub", extra="language", purpose=purpose) from None
    try:
        wanted = wanted_files(hub.list_repo_files(hub_id))
    except Exception as error:  # noqa: BLE001 - the hub's client raises many kinds of its own
        return _cached(hub, hub_id, error)
    try:
        return Path(hub.snapshot_download(hub_id, allow_patterns=wanted))
    except Exception as error:  # noqa: BLE001 - as above
        return _cached(hub, hub_id, error)


def _cached(hub: ModuleType, hub_id: str, cause: Exception) -> Path:
    """Return the repository's folder in the local cache, whatever kept the hub away."""
    try:
        return Path(hub.snapshot_download(hub_id, local_files_only=True))
    except Exception:  # noqa: BLE001 - what matters to the user is why the hub did not answer
        reason = str(cause).strip().partition("\n")[0][:160].rstrip(". ")
    raise CheckpointError(
        f"{hub_id}: no such file or folder here, and the hub did not give it "
        f"({type(cause).__name__}: {reason}), expected a checkpoint. "
        "Check the name and the connection."
    ) from cause


def wanted_files(files: Sequence[str]) -> list[str]:
    """Return what to download of a repository: one set of weights, and the small files beside.

    Examples
    --------
    >>> wanted_files(["config.json", "model.safetensors", "pytorch_model.bin", "onnx/model.onnx"])
    ['config.json', 'model.safetensors']
    """
    top = [file for file in files if "/" not in file]
    small = [file for file in top if file.endswith(_SIDE_FILES)]
    chosen = weight_candidates(top)[:1]
    if chosen and chosen[0].endswith(".json"):
        stem, suffix = chosen[0].split(".")[:2]
        shards = [file for file in top if file.startswith(f"{stem}-")]
        chosen = [file for file in shards if file.endswith(f".{suffix}")]
    return [*small, *chosen]
