"""What a weight file or a folder of them holds, from its headers alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svftool.errors import CheckpointError, counted, shortlist
from svftool.files.folder import Place, check_shards, find_weights, read_config
from svftool.files.gguf import MAGIC as GGUF_MAGIC
from svftool.files.gguf import gguf_parts, read_gguf_header
from svftool.files.header import DTYPES, announces_header, read_header
from svftool.files.names import EXACT_KEY


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as its header states it.

    Attributes
    ----------
    name : str
    dtype : str
        Torch's name of it, or the type of a GGUF block such as ``"Q4_1"``.
    shape : tuple of int
        In the order of torch.
    nbytes : int
        Bytes in the file.
    file : str
        Name of the file, without folder.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass
class Contents:
    """What was found.

    Attributes
    ----------
    path : Path
    format : str
        ``safetensors``, ``gguf`` or ``pickle``.
    files : dict of str to int
        Bytes of each weight file by its name.
    tensors : list of TensorEntry
    metadata : dict
        Of the first file.
    config : mapping or None
        ``config.json`` beside the weights.
    notes, problems : list of str
        What was passed over; what does not hold together.
    """

    path: Path
    format: str
    files: dict[str, int] = field(default_factory=dict)
    tensors: list[TensorEntry] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Where its files lie."""
        return self.path if self.path.is_dir() else self.path.parent


def is_readable(path: Path) -> bool:
    """Tell whether the first bytes of a file are those of safetensors or GGUF."""
    with path.open("rb") as file:
        start = file.read(16)
    header = announces_header(start, path.stat().st_size) or path.suffix == ".safetensors"
    return start.startswith(GGUF_MAGIC) or header


def is_exact_delta(path: Path) -> bool:
    """Tell whether a file is an exact delta, which `merge` applies to a checkpoint."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            start, size = file.read(16), path.stat().st_size
            if not announces_header(start, size):
                return False
            file.seek(0)
            return EXACT_KEY in read_header(file, path, size).metadata
    except (CheckpointError, OSError):
        return False


def read_contents(path: Path, *, stem: str | None = None) -> Contents | None:
    """List a file or folder of safetensors or GGUF.

    Parameters
    ----------
    path : Path
    stem : str, optional
        In a folder, only ``STEM.safetensors`` or its shards.

    Returns
    -------
    Contents or None
        None where the weights are pickles, whose headers say nothing.

    Raises
    ------
    CheckpointError
        If there are no weights.
    """
    if path.is_file():
        if not is_readable(path):
            return None
        found = Contents(path, "safetensors")
        _add_all(found, gguf_parts(path))
        return found
    return _read_folder(path, stem)


def _read_folder(folder: Path, stem: str | None) -> Contents | None:
    place, files, problem = _find(folder, stem)
    if not all(map(is_readable, files)):
        return None
    found = Contents(folder, "safetensors", config=place.config, notes=list(place.notes))
    if problem:
        found.problems.append(problem)
    held = _add_all(found, files)
    if place.weight_map is not None:
        found.problems += _against_index(place, held, found.tensors)
    return found


def _find(folder: Path, stem: str | None) -> tuple[Place, Sequence[Path], str]:
    """Find a folder's weight files; where its index is broken, those that are there, and why."""
    try:
        files, place = find_weights(folder, stem)
    except CheckpointError as error:
        indexed = any(".index." in one.name for one in folder.glob("*.json"))
        kinds = ("*.safetensors", "*.gguf") if indexed else ("*.gguf",)
        files = tuple(one for kind in kinds for one in sorted(folder.glob(kind)))
        if not files:
            raise
        broken = str(error) if indexed else ""
        return Place(folder, config=read_config(folder)), files, broken
    return place, files, ""


def _add_all(found: Contents, files: Sequence[Path]) -> dict[str, list[str]]:
    """Add files; of one that is broken, say so and go on. Returns each file's tensors."""
    held: dict[str, list[str]] = {}
    for path in files:
        try:
            entries, metadata, kind = _entries(path)
        except CheckpointError as error:
            found.problems.append(str(error))
            entries, metadata, kind = [], {}, found.format
        found.format = kind
        found.metadata = found.metadata or metadata
        found.files[path.name] = path.stat().st_size
        found.tensors += entries
        held[path.name] = [one.name for one in entries]
    return held


def _entries(path: Path) -> tuple[list[TensorEntry], dict[str, Any], str]:
    with path.open("rb") as file:
        if file.read(4) != GGUF_MAGIC:
            file.seek(0)
            header = read_header(file, path, path.stat().st_size)
            tensors = [
                TensorEntry(
                    one.name, DTYPES[one.code][0], one.shape, one.end - one.begin, path.name
                )
                for one in header.entries
            ]
            return tensors, dict(header.metadata), "safetensors"
    blocks = read_gguf_header(path)
    tensors = [
        TensorEntry(one.name, one.kind, one.shape, one.nbytes, path.name) for one in blocks.entries
    ]
    return tensors, dict(blocks.metadata), "gguf"


def _against_index(
    place: Place, held: Mapping[str, Collection[str]], tensors: Sequence[TensorEntry]
) -> Iterator[str]:
    """Say where an index and its shards differ."""
    try:
        check_shards(place, held)
    except CheckpointError as error:
        yield str(error)
    weight_map = place.weight_map or {}
    extra = [one.name for one in tensors if one.name not in weight_map]
    if extra:
        few = shortlist(extra, 3)
        yield (
            f"{place.index_file}: {counted(len(extra), 'tensors', 'are')} in the shards and "
            f"not in it: {few}"
        )
    twice = [name for name, count in Counter(one.name for one in tensors).items() if count > 1]
    if twice:
        yield (
            f"{place.path}: {counted(len(twice), 'tensors', 'lie')} in two shards: "
            f"{shortlist(twice, 3)}"
        )
    stated = place.index_metadata.get("total_size")
    total = sum(one.nbytes for one in tensors)
    if isinstance(stated, int) and stated != total and not twice:
        yield f"{place.index_file}: total_size is {stated}, the tensors have {total} bytes"


# How the values are stored, told by the names that each scheme leaves.


_SCHEMES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("bitsandbytes 4-bit", (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")),
    ("bitsandbytes int8", (".SCB",)),
    ("compressed-tensors", (".weight_packed",)),
    ("GPTQ", (".g_idx",)),
    ("AWQ or GPTQ", (".qweight",)),
    ("fp8 with block scales", (".weight_scale_inv",)),
    ("MXFP4", ("_blocks",)),
    ("codes with scales", (".weight_scale", ".scale_weight")),
)


_PLAIN_GGUF = ("F64", "F32", "F16", "BF16", "I8", "I16", "I32", "I64")


def storage_of(contents: Contents) -> str | None:
    """Say how values are quantised; None where they are numbers.

    What ``config.json`` says comes first, then the names that each scheme leaves.
    """
    stated = (contents.config or {}).get("quantization_config")
    method = stated.get("quant_method") if isinstance(stated, Mapping) else None
    if contents.format == "gguf":
        codes = Counter(one.dtype for one in contents.tensors if one.dtype not in _PLAIN_GGUF)
        return f"GGUF, {' and '.join(kind for kind, _ in codes.most_common(2))}" if codes else None
    names = [one.name for one in contents.tensors]
    found = next(
        (scheme for scheme, ends in _SCHEMES if any(name.endswith(ends) for name in names)), None
    )
    if isinstance(method, str):
        return method if found is None else f"{method} ({found})"
    narrow = any(one.dtype.startswith(("float8", "float4", "float6")) for one in contents.tensors)
    return found or ("8-bit or narrower floats without scales" if narrow else None)


def tied_names(contents: Contents) -> list[tuple[str, str]]:
    """List pairs of names that share their values: (left out, stored).

    Safetensors' metadata names what a writer left out because it was tied.
    """
    stored = {one.name for one in contents.tensors}
    pairs = [
        (name, str(same))
        for name, same in contents.metadata.items()
        if name not in stored and same in stored
    ]
    tied = (contents.config or {}).get("tie_word_embeddings") is True
    table = next((n for n in stored if n.endswith(("embed_tokens.weight", "wte.weight"))), None)
    if tied and table and "lm_head.weight" not in stored and not pairs:
        pairs.append(("lm_head.weight", table))
    return pairs
