"""What a file, a folder or a repository is, from headers; torch is needed for pickles alone."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from svftool.adapters.layouts import adapter_kind, adapter_layout
from svftool.adapters.peft_config import CONFIG_FILE as ADAPTER_FILE
from svftool.errors import CheckpointError, SvftoolError, counted, shortlist
from svftool.files.contents import Contents, TensorEntry, read_contents, storage_of, tied_names
from svftool.files.folder import read_object
from svftool.files.given import check_exists
from svftool.files.hub_ids import is_on_hub
from svftool.files.names import EXACT_KEY, FACTORS_FILE, TUNED_KEY, real
from svftool.progress import SILENT, Progress

_CHUNK = 1 << 22


@dataclass(frozen=True)
class Info:
    """What was found.

    Attributes
    ----------
    path : str
        As asked for.
    kind : {"checkpoint", "factors", "tuned file", "adapter", "exact delta"}
    contents : Contents
        Files, tensors, metadata, config, and what does not hold together.
    storage : str or None
        How values are quantised; None where they are numbers.
    tied : list of (str, str)
        Names that are left out because they share values with one that is stored.
    facts : mapping of str to object
        What is known of factors, of a tuned file or of an adapter beside its tensors.
    digests : mapping of str to str
        SHA-256 of each weight file, where it was asked for.
    """

    path: str
    kind: str
    contents: Contents
    storage: str | None = None
    tied: list[tuple[str, str]] = field(default_factory=list)
    facts: Mapping[str, Any] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Number of floating values; of GGUF, of all that blocks stand for."""
        floats = ("float", "bfloat", "complex")
        return sum(
            one.numel
            for one in self.contents.tensors
            if self.contents.format == "gguf" or one.dtype.startswith(floats)
        )


def info(path: str | os.PathLike[str], *, check: bool = False, progress: Progress = SILENT) -> Info:
    """Say what a file, a folder or a repository on the hub is.

    Parameters
    ----------
    path : path-like or str
        A weight file, a folder, or a hub id.
    check : bool
        Read every byte: hash the weight files, and hold factors against their fingerprint.
    progress : Progress, optional

    Returns
    -------
    Info
        What does not hold together is in ``contents.problems``.

    Raises
    ------
    CheckpointError
        If there is nothing, or nothing that is a checkpoint.
    """
    place = _local(os.fspath(path))
    found = _describe(place, os.fspath(path))
    return _checked(found, progress) if check else found


def _local(text: str) -> Path:
    """Return the place on this machine, fetching what is on the hub alone."""
    place = Path(text)
    if is_on_hub(text):
        from svftool.files.hub import fetch

        return fetch(text)
    check_exists(text)
    return place


def _describe(place: Path, path: str) -> Info:
    if (place / FACTORS_FILE).is_file():
        return _factors(place, path)
    if (place / ADAPTER_FILE).is_file():
        return _adapter(place, path)
    contents = read_contents(place) or _pickled(place)
    names = [one.name for one in contents.tensors]
    if TUNED_KEY in contents.metadata:
        return Info(path, "tuned file", contents, facts=_tuned_facts(contents))
    if EXACT_KEY in contents.metadata:
        return Info(path, "exact delta", contents, facts=_exact_facts(contents))
    kind = adapter_kind(names)
    if kind is not None:
        return Info(path, "adapter", contents, facts=_adapter_facts(kind, contents, {}))
    return Info(path, "checkpoint", contents, storage_of(contents), tied_names(contents))


def _pickled(place: Path) -> Contents:
    """List a pickle, whose tensors only torch can tell."""
    from svftool.checkpoints import dtype_name, open_checkpoint

    with open_checkpoint(place) as source:
        folder = place if place.is_dir() else place.parent
        return Contents(
            place,
            "pickle",
            files={one.file: (folder / one.file).stat().st_size for one in source.shards},
            tensors=[
                TensorEntry(one.name, dtype_name(one.dtype), one.shape, one.nbytes, one.file)
                for one in source.infos.values()
            ],
            config=source.config,
            notes=list(source.notes),
        )


def _factors(folder: Path, path: str) -> Info:
    contents = read_contents(folder, stem="svf") or _pickled(folder)
    config = read_object(folder / FACTORS_FILE, "a configuration of factors")
    layers = [one for one in _list(config.get("layers")) if isinstance(one, Mapping)]
    held = {one.name for one in contents.tensors}
    missing = [
        f"{layer.get('name')}.{part}"
        for layer in layers
        for part in ("U", "S", "Vh")
        if f"{layer.get('name')}.{part}" not in held
    ]
    if missing:
        contents.problems.append(
            f"{folder}: {counted(len(missing), 'factors', 'are')} not stored that {FACTORS_FILE} "
            f"names: {shortlist(missing, 3)}"
        )
    base = config.get("base")
    facts = {
        "layers": len(layers),
        "left_whole": len(_list(config.get("left_whole"))),
        **_some(config, "rank", "method", "dtype", "fingerprint", "svftool_version"),
        "base": dict(base) if isinstance(base, Mapping) else None,
    }
    return Info(path, "factors", contents, facts=facts)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _some(source: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: source[key] for key in keys if key in source}


def _stated(contents: Contents, key: str) -> dict[str, Any]:
    """Read the JSON object under one key of the metadata; where it is none, say so."""
    try:
        stated = json.loads(contents.metadata[key])
        if not isinstance(stated, dict):
            raise TypeError(f"a JSON {type(stated).__name__}")  # noqa: TRY301
    except (ValueError, TypeError, RecursionError) as error:
        contents.problems.append(
            f"{contents.path}: {key!r} metadata is not readable ({str(error)[:80]})"
        )
        return {}
    return stated


def _tuned_facts(contents: Contents) -> dict[str, Any]:
    """Read what a tuned file says of itself; probes stay out, which only programs read."""
    stated = _stated(contents, TUNED_KEY)
    if not stated:
        return {}
    training = stated.get("training")
    return {
        "layers": len(_list(stated.get("layers"))),
        **_some(stated, "task", "classes", "base_fingerprint", "factors_fingerprint"),
        "training": dict(training) if isinstance(training, Mapping) else {},
    }


def _exact_facts(contents: Contents) -> dict[str, Any]:
    """Read what an exact delta says of itself; `merge` alone checks it."""
    stated = _stated(contents, EXACT_KEY)
    if not stated:
        return {}
    entries = [one for one in _list(stated.get("entries")) if isinstance(one, Mapping)]
    return {
        **_some(stated, "version", "codec", "base_fingerprint", "tuned_fingerprint", "bytes"),
        "restores": len(entries),
        "ways": dict(Counter(str(one.get("way")) for one in entries)),
        "removed": _list(stated.get("removed")),
    }


def _adapter(folder: Path, path: str) -> Info:
    config = read_object(folder / ADAPTER_FILE, "a configuration of an adapter")
    files = [folder / f"adapter_model{suffix}" for suffix in (".safetensors", ".bin")]
    file = next((one for one in files if one.is_file()), None)
    if file is None:
        raise CheckpointError(
            f"{folder}: no adapter_model.safetensors beside {ADAPTER_FILE}, expected the adapter's "
            "weights. Download it again."
        )
    contents = read_contents(file) or _pickled(file)
    kind = str(config.get("peft_type", "")) or adapter_kind([one.name for one in contents.tensors])
    return Info(path, "adapter", contents, facts=_adapter_facts(kind, contents, config))


def _adapter_facts(
    kind: str | None, contents: Contents, config: Mapping[str, Any]
) -> dict[str, Any]:
    names = [one.name for one in contents.tensors]
    downs = ("lora_A.weight", "lora_down.weight", "lora.down.weight")
    pairs = [one for one in contents.tensors if one.name.endswith(downs) and one.shape]
    return {
        "adapter": kind,
        "layout": "peft" if config else adapter_layout(names),
        "ranks": sorted({one.shape[0] for one in pairs}),
        **_some(
            config, "base_model_name_or_path", "r", "lora_alpha", "target_modules", "use_dora",
            "use_rslora", "task_type",
        ),
    }  # fmt: skip


def _checked(found: Info, progress: Progress) -> Info:
    contents = found.contents
    total = sum(contents.files.values())
    with progress.task("hashing", total=total) as task:
        digests = {}
        for name in contents.files:
            digest = hashlib.sha256()
            for block in _blocks(contents.folder / name):
                digest.update(block)
                task.advance(len(block))
            digests[name] = digest.hexdigest()
    contents.problems += _not_the_blob(contents, digests)
    if found.kind == "factors" and not contents.problems:
        contents.problems += _other_factors(contents.path)
    return replace(found, digests=digests)


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            yield block


def _not_the_blob(contents: Contents, digests: Mapping[str, str]) -> Iterator[str]:
    """Hold files of a hub cache against their names, which are their SHA-256."""
    for name, digest in digests.items():
        blob = real(contents.folder / name)
        if blob.parent.name == "blobs" and len(blob.name) == len(digest) and blob.name != digest:
            yield f"{name}: SHA-256 {digest[:12]}, expected {blob.name[:12]} as the cache names it"


def _other_factors(folder: Path) -> Iterator[str]:
    """Read all factors, which holds each against what `decompose` recorded."""
    from svftool.factors import open_factors

    try:
        with open_factors(folder) as store:
            for name in store.layers:
                store.read(name)
            for name in store.whole:
                store.read_whole(name)
    except SvftoolError as error:
        yield str(error)
