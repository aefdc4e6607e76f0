"""Fetching a checkpoint from the Hugging Face hub, or from its local cache when offline."""

from __future__ import annotations

import re
from pathlib import Path

from svftool.checkpoints.folder import PICKLE_SUFFIXES, WEIGHT_SUFFIXES
from svftool.errors import CheckpointError, MissingDependencyError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def looks_like_hub_id(text: str) -> bool:
    """Tell whether `text` can only be a repository on the hub: ``owner/name``, no weight file.

    Examples
    --------
    >>> looks_like_hub_id("timm/resnet18.a1_in1k"), looks_like_hub_id("folder/model.safetensors")
    (True, False)
    """
    return bool(_ID.fullmatch(text)) and not text.endswith(WEIGHT_SUFFIXES)


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
        raise MissingDependencyError(
            "huggingface_hub",
            extra="language",
            purpose=f"no file {hub_id!r} exists here; fetching it from the hub",
        ) from None
    try:
        wanted = _wanted(hub.list_repo_files(hub_id))
    except Exception:  # noqa: BLE001 - whatever kept the list away, the cache may have the files
        wanted = None
    try:
        return Path(
            hub.snapshot_download(hub_id, allow_patterns=wanted, local_files_only=wanted is None)
        )
    except Exception as error:  # noqa: BLE001 - the hub's client raises many kinds of its own
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(
            f"{hub_id}: no such file or folder here, and the hub did not give it "
            f"({type(error).__name__}: {reason}), expected a checkpoint. "
            "Check the name, the connection, or download it beforehand."
        ) from None


def _wanted(files: list[str]) -> list[str]:
    """Return the files to download: small ones at the top, and the weights in the best format."""
    top = [file for file in files if "/" not in file]
    safetensors = [file for file in top if file.endswith(".safetensors")]
    pickles = [file for file in top if file.endswith(PICKLE_SUFFIXES)]
    small = [file for file in top if not file.endswith(WEIGHT_SUFFIXES) and file.endswith(_SMALL)]
    return [*small, *(safetensors or pickles)]


_SMALL = (".json", ".txt", ".model", ".py", ".md", ".jinja", ".vocab", ".tiktoken", "LICENSE")
