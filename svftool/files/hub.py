"""The Hugging Face hub: checkpoints from it or from its local cache, and outputs to it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from svftool.errors import (
    CheckpointError,
    MissingDependencyError,
    ResourceError,
    UsageError,
    counted,
    shortlist,
)
from svftool.files.folder import weight_candidates
from svftool.files.hub_ids import HubPlace, hub_place
from svftool.files.names import real

PIPELINE_FILE = "model_index.json"
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

    Parameters
    ----------
    hub_id : str
        ``OWNER/NAME``, ``OWNER/NAME/SUBFOLDER``, each with an optional ``@REVISION``.

    Raises
    ------
    MissingDependencyError
        If huggingface_hub is not installed.
    CheckpointError
        If the repository cannot be reached and is not in the cache, or does not hold the folder.
    """
    place = hub_place(hub_id)
    if place is None:
        raise CheckpointError(f"{hub_id}: no hub id, expected OWNER/NAME. Check the name.")
    purpose = f"there is no file or folder {hub_id!r} here; fetching it from the hub"
    hub = hub_package(purpose)
    try:
        files = hub.HfApi().list_repo_files(place.repo, revision=place.revision)
        wanted = wanted_files(files, place.folder)
        _check_some(hub_id, place, files, wanted)
        root = hub.snapshot_download(
            place.repo, revision=place.revision, allow_patterns=wanted, **_endpoint(hub)
        )
    except CheckpointError:
        raise
    except Exception as error:  # noqa: BLE001 - the hub's client raises many kinds of its own
        return _cached(hub, hub_id, place, error)
    return Path(root) / place.folder


def hub_package(purpose: str) -> ModuleType:
    """Import huggingface_hub.

    Raises
    ------
    MissingDependencyError
        If it is not installed; `purpose` says what needs it.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise MissingDependencyError("huggingface_hub", extra="language", purpose=purpose) from None
    return huggingface_hub


def _endpoint(hub: ModuleType) -> dict[str, str]:
    return {"endpoint": hub.constants.ENDPOINT}


def _check_some(hub_id: str, place: HubPlace, files: Sequence[str], wanted: Sequence[str]) -> None:
    if place.folder and not any(file.startswith(f"{place.folder}/") for file in files):
        folders = sorted({file.partition("/")[0] for file in files if "/" in file})
        raise CheckpointError(
            f"{hub_id}: {place.repo} has no folder {place.folder!r}, expected one of "
            f"{shortlist(folders, 8) or 'none'}. Check the name."
        )
    if not wanted:
        raise CheckpointError(
            f"{hub_id}: no weights among {counted(len(files), 'files')} ({shortlist(files, 4)}), "
            "expected safetensors, .bin, .pt or .pth. Check the name."
        )


def _cached(hub: ModuleType, hub_id: str, place: HubPlace, cause: Exception) -> Path:
    """Return the repository's folder in the local cache, whatever kept the hub away."""
    try:
        root = hub.snapshot_download(place.repo, revision=place.revision, local_files_only=True)
    except Exception as error:  # noqa: BLE001 - what matters is why the hub did not answer
        # Only some files of a repository are ever fetched, so it may be called incomplete.
        root = getattr(error, "snapshot_path", None)
    if root is not None and (Path(root) / place.folder).is_dir():
        return Path(root) / place.folder
    raise CheckpointError(
        f"{hub_id}: no such file or folder here, and the hub did not give it "
        f"({why(cause)}), expected a checkpoint. {_way_out(cause, place)}"
    ) from cause


def why(cause: Exception) -> str:
    """Say in a few words why the hub did not do what it was asked for."""
    reason = " ".join(str(cause).split())[:160].rstrip(". ")
    return _SAID.get(type(cause).__name__) or f"{type(cause).__name__}: {reason}"


_SAID = {
    "GatedRepoError": "the repository is gated",
    "RepositoryNotFoundError": "no such repository, or a private one",
    "RevisionNotFoundError": "no such revision",
    "OfflineModeIsEnabled": "offline mode is on, and the cache does not hold it",
    "LocalTokenNotFoundError": "no token is stored here",
}


def _way_out(cause: Exception, place: HubPlace) -> str:
    kind = type(cause).__name__
    if kind == "GatedRepoError":
        return f"Ask for access on the page of {place.repo}, and log in with 'hf auth login'."
    if kind == "RepositoryNotFoundError":
        return "Check the name; a private one needs 'hf auth login'."
    if kind == "RevisionNotFoundError":
        return "Name a branch, a tag or a commit that is there."
    if kind == "OfflineModeIsEnabled":
        return "Unset HF_HUB_OFFLINE, or download it first."
    return "Check the name and the connection."


def check_push(repo: str) -> None:
    """Refuse, before any work, what the hub would refuse at its end.

    Raises
    ------
    MissingDependencyError
        If huggingface_hub is not installed.
    UsageError
        If the name is none, or nobody is logged in.
    """
    hub = hub_package(f"pushing to {repo!r}")
    place = hub_place(repo)
    if place is None or place != HubPlace(place.repo):
        raise UsageError(f"--push-to-hub: {repo!r}, expected a repository, OWNER/NAME")
    try:
        hub.utils.validate_repo_id(repo)
    except ValueError as error:
        raise UsageError(f"--push-to-hub: {' '.join(str(error).split())[:200]}") from None
    if hub.get_token() is None:
        raise UsageError(
            f"--push-to-hub: no token for {repo} is stored here, expected one that may write. "
            "Log in with 'hf auth login', or set HF_TOKEN."
        )


def push(output: Path, repo: str, *, card: str, private: bool, create_pr: bool) -> str:
    """Put a file or a folder on the hub, with a model card that the hub has checked.

    Parameters
    ----------
    output : Path
        What is put there; a folder's own ``README.md`` gives way to the card.
    repo : str
        ``OWNER/NAME``; made if it is not there, unless for a pull request.
    card : str
    private : bool
        Whether a new repository is private.
    create_pr : bool
        Whether to ask the owner to take it.

    Returns
    -------
    str
        The address of the commit, or of the pull request.

    Raises
    ------
    ResourceError
        If the hub does not take it; the output stays as it is.
    """
    hub = hub_package(f"pushing to {repo!r}")
    files = sorted(one for one in output.rglob("*") if one.is_file()) or [output]
    root = output if output.is_dir() else output.parent
    contents: dict[str, str | bytes] = {str(one.relative_to(root)): str(one) for one in files}
    contents["README.md"] = card.encode()
    try:
        hub.ModelCard(card).validate()
        api = hub.HfApi()
        if not create_pr:
            api.create_repo(repo, private=private or None, exist_ok=True)
        done = api.create_commit(
            repo,
            [hub.CommitOperationAdd(name, value) for name, value in contents.items()],
            commit_message=f"Add {output.name} by svftool",
            create_pr=create_pr,
        )
    except Exception as error:
        raise ResourceError(
            f"{repo}: the hub did not take {output} ({why(error)}), expected it to. The output is "
            f"complete here; put it there with 'hf upload {repo} {output}'."
        ) from error
    return str(done.pr_url or done.commit_url)


def wanted_files(files: Sequence[str], folder: str = "") -> list[str]:
    """Return what to download of a repository: one set of weights, and the small files beside.

    Of a pipeline, one with a ``model_index.json``, that of each component.

    Parameters
    ----------
    files : sequence of str
        All that the repository holds.
    folder : str
        Within it; only what is there is wanted.

    Examples
    --------
    >>> wanted_files(["config.json", "model.safetensors", "pytorch_model.bin", "onnx/model.onnx"])
    ['config.json', 'model.safetensors']
    >>> wanted_files(["model_index.json", "unet/a.safetensors", "all.safetensors"])
    ['model_index.json', 'unet/a.safetensors']
    """
    start = f"{folder}/" if folder else ""
    inside = [file.removeprefix(start) for file in files if file.startswith(start)]
    top = [file for file in inside if "/" not in file]
    if PIPELINE_FILE not in top:
        return [f"{start}{file}" for file in _of_one(top)]
    below = dict.fromkeys(file.partition("/")[0] for file in inside if "/" in file)
    found = [f"{start}{file}" for file in top if file.endswith(_SIDE_FILES)]
    for name in below:
        within = [file.removeprefix(f"{name}/") for file in inside if file.startswith(f"{name}/")]
        plain = [file for file in within if "/" not in file]
        found += [f"{start}{name}/{file}" for file in _of_one(plain)]
    return found


def _of_one(top: Sequence[str]) -> list[str]:
    """Choose among the files of one folder."""
    small = [file for file in top if file.endswith(_SIDE_FILES)]
    chosen = weight_candidates(top)[:1]
    if chosen and chosen[0].endswith(".json"):
        stem, suffix = chosen[0].split(".")[:2]
        shards = [file for file in top if file.startswith(f"{stem}-")]
        chosen = [file for file in shards if file.endswith(f".{suffix}")]
    return [*small, *chosen]
