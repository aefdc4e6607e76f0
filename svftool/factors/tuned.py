"""The tuned file: trained singular values of some layers and whatever was trained along.

It is what people keep, share and mix: tens of kilobytes for a 25-million-parameter network.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from svftool.checkpoints import (
    Checkpoint,
    SafetensorsWriter,
    dtype_name,
    open_checkpoint,
    parse_json,
)
from svftool.errors import CheckpointError, FactorsError, brief, counted, shortlist
from svftool.factors.spectral import PARTS, SpectralChange
from svftool.factors.store import FactorStore
from svftool.files.hub import named_in_cache
from svftool.files.names import TUNED_KEY

# A seeded probe of each layer's singular vectors, small enough to travel in a tuned file.


Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Probe:
    """Projections of a layer's singular vectors on fixed random signs.

    Attributes
    ----------
    left : (..., k) ndarray
        ``g' U``.
    right : (..., k) ndarray
        ``Vh h``.
    """

    left: Float64
    right: Float64

    def mismatch(self, other: Probe, delta: Float64) -> float:
        """Estimate the share of a delta that would land on other singular vectors.

        Parameters
        ----------
        other : Probe
            Probe of the other factors, of the same shape.
        delta : (..., k) ndarray
            Change of each singular value; directions that did not change do not count.

        Returns
        -------
        float
            Root of the `delta`-weighted mean square distance of the vector pairs, where a common
            change of sign of ``u_i`` and ``vh_i`` counts as none. About 0 for the same vectors and
            1.4 for unrelated ones.
        """
        weights = np.square(delta)
        total = float(weights.sum())
        if total == 0.0:
            return 0.0
        apart = np.minimum(self._distance(other, 1.0), self._distance(other, -1.0))
        return float(np.sqrt((weights * apart).sum() / (2.0 * total)))

    def signs(self, other: Probe) -> Float64:
        """Return -1 for each pair of vectors that has the other joint sign in `other`, else 1."""
        flipped = self._distance(other, -1.0) < self._distance(other, 1.0)
        return np.where(flipped, -1.0, 1.0)

    def _distance(self, other: Probe, sign: float) -> Float64:
        left, right = self.left - sign * other.left, self.right - sign * other.right
        return np.asarray(np.square(left) + np.square(right), dtype=np.float64)


def probe(name: str, U: Tensor, Vh: Tensor) -> Probe:
    """Probe the singular vectors of one layer.

    Parameters
    ----------
    name : str
        Tensor name; it seeds the signs.
    U : (..., m, k) Tensor
        Left singular vectors.
    Vh : (..., k, n) Tensor
        Right singular vectors.
    """
    g = _signs(f"{name}\0left", U.shape[-2])
    h = _signs(f"{name}\0right", Vh.shape[-1])
    left = torch.einsum("m,...mk->...k", g, U.double().cpu())
    right = torch.einsum("...kn,n->...k", Vh.double().cpu(), h)
    return Probe(left.numpy(), right.numpy())


def _signs(seed: str, count: int) -> Tensor:
    # The raw stream of a bit generator is fixed for good, unlike the distributions on top of it.
    key = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:16], "little")
    words = np.random.Philox(key=key).random_raw(-(-count // 64)).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")[:count]
    return torch.from_numpy(1.0 - 2.0 * bits.astype(np.float64))


def encode_probe(value: Probe) -> dict[str, str]:
    """Pack a probe as base64 of little-endian float16 for a file's metadata."""
    return {"left": _pack(value.left), "right": _pack(value.right)}


def decode_probe(packed: dict[str, str], shape: tuple[int, ...]) -> Probe:
    """Unpack `encode_probe`'s result into arrays of `shape`."""
    return Probe(_unpack(packed["left"], shape), _unpack(packed["right"], shape))


def _pack(values: Float64) -> str:
    return base64.b64encode(values.astype("<f2").tobytes()).decode()


def _unpack(text: str, shape: tuple[int, ...]) -> Float64:
    return np.frombuffer(base64.b64decode(text), dtype="<f2").astype(np.float64).reshape(shape)


METADATA_KEY = TUNED_KEY
SCHEMA_VERSION = 1
PARTS_VERSION = 2
"""Schema of a file that holds more of a layer than singular values; others stay what they were."""

PROBE_TOLERANCE = 1e-2
"""Largest share of a delta that may land on other singular vectors, see `Probe.mismatch`."""

S_TOLERANCE = 1e-4
"""Largest distance of two decompositions' singular values, relative to the largest of the layer."""


@dataclass(frozen=True)
class TunedFile:
    """Contents of a tuned file.

    Attributes
    ----------
    path : Path
        Where it was read from.
    S : mapping of str to Tensor
        Trained singular values by tensor name, float32, shape (k,) or (E, k); float64 in a
        mixture, where float32 would not keep their change.
    S_base : mapping of str to Tensor
        Singular values that training started from.
    whole : mapping of str to Tensor
        Other tensors that were trained along (a head, norms, biases), by name.
    base_fingerprint, factors_fingerprint : str
        What the values belong to.
    probes : mapping of str to Probe
        A seeded probe of each layer's singular vectors.
    task : str or None
        What was trained for.
    classes : tuple of str or None
        Class names in the order of the head's outputs.
    training : mapping
        Summary of the training run.
    parts : mapping of str to mapping of str to Tensor
        What a layer holds beside singular values, by tensor name: ``row``, ``col``, ``index``,
        ``value``, ``B``, ``A``; see `SpectralChange`.
    """

    path: Path
    S: Mapping[str, Tensor]
    S_base: Mapping[str, Tensor]
    whole: Mapping[str, Tensor]
    base_fingerprint: str
    factors_fingerprint: str
    probes: Mapping[str, Probe]
    task: str | None = None
    classes: tuple[str, ...] | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    def delta(self, name: str) -> Tensor:
        """Change of one layer's singular values, ``S - S_base``, in float64."""
        return self.S[name].double() - self.S_base[name].double()

    def change(self, name: str) -> SpectralChange:
        """Everything that changes in one layer, in float64."""
        return SpectralChange.of_parts(self.delta(name), self.parts.get(name, {}))


def is_tuned(path: str | os.PathLike[str]) -> bool:
    """Whether a path looks like a tuned file."""
    file = named_in_cache(Path(path))
    if not file.is_file() or file.suffix != ".safetensors":
        return False
    try:
        with open_checkpoint(file) as tensors:
            return METADATA_KEY in tensors.metadata
    except CheckpointError:
        return False


def read_tuned(path: str | os.PathLike[str]) -> TunedFile:
    """Read a tuned file written by `write_tuned`.

    Raises
    ------
    FactorsError
        If it is missing, broken, or no tuned file.
    """
    file = Path(path)
    try:
        tensors = open_checkpoint(file)
    except CheckpointError as error:
        raise FactorsError(str(error)) from error
    with tensors:
        facts = _read_facts(file, tensors.metadata)
        try:
            return _tuned_from(file, tensors, facts)
        except (KeyError, TypeError, ValueError, RuntimeError, CheckpointError) as error:
            raise FactorsError(
                f"{file}: a broken tuned file ({type(error).__name__}: {error}). Train again."
            ) from error


def _read_facts(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if METADATA_KEY not in metadata:
        raise FactorsError(
            f"{path}: no {METADATA_KEY!r} metadata, expected a tuned file written by "
            "'svftool finetune' or 'svftool extract'."
        )
    try:
        facts = parse_json(metadata[METADATA_KEY])
    except ValueError as error:
        raise FactorsError(f"{path}: unreadable {METADATA_KEY!r} metadata. Train again.") from error
    if not isinstance(facts, dict):
        kind = type(facts).__name__
        raise FactorsError(
            f"{path}: {METADATA_KEY!r} metadata holds a JSON {kind}, expected an object. "
            "Train again."
        )
    if facts.get("schema_version") not in (SCHEMA_VERSION, PARTS_VERSION):
        found = brief(facts.get("schema_version"))
        raise FactorsError(
            f"{path}: schema version {found}, expected {SCHEMA_VERSION} or {PARTS_VERSION}. "
            "Use the svftool version that wrote it."
        )
    return facts


def _tuned_from(path: Path, tensors: Checkpoint, facts: Mapping[str, Any]) -> TunedFile:
    layers = _strings(facts["layers"], "layers")
    held = _parts_held(facts, layers)
    factor_names = {f"{name}{suffix}" for name in layers for suffix in (".S", ".S_base")}
    factor_names |= {f"{name}.{part}" for name, parts in held.items() for part in parts}
    both = [name for name in layers if name in tensors.infos and name not in factor_names]
    if both:
        raise ValueError(
            f"{shortlist(both, 2)}: singular values and the whole tensor, expected one"
        )
    for name in layers:
        _check_values(name, tensors)
        _check_parts(name, held.get(name, ()), tensors)
    S = {name: tensors.read(f"{name}.S").clone() for name in layers}
    packed = facts["probes"]
    classes = None if facts["classes"] is None else tuple(_strings(facts["classes"], "classes"))
    return TunedFile(
        path=path,
        S=S,
        S_base={name: tensors.read(f"{name}.S_base").clone() for name in layers},
        whole={
            name: tensors.read(name).clone() for name in tensors.infos if name not in factor_names
        },
        base_fingerprint=_string(facts["base_fingerprint"], "base_fingerprint"),
        factors_fingerprint=_string(facts["factors_fingerprint"], "factors_fingerprint"),
        probes={name: decode_probe(packed[name], tuple(S[name].shape)) for name in layers},
        task=None if facts["task"] is None else _string(facts["task"], "task"),
        classes=classes,
        training=dict(facts["training"]),
        parts={
            name: {part: tensors.read(f"{name}.{part}").clone() for part in parts}
            for name, parts in held.items()
        },
    )


def _parts_held(facts: Mapping[str, Any], layers: Sequence[str]) -> dict[str, list[str]]:
    """Return what the file holds of each layer beside singular values."""
    if facts["schema_version"] == SCHEMA_VERSION:
        return {}
    found = {name: _strings(parts, "parts") for name, parts in dict(facts["parts"]).items()}
    for name, parts in found.items():
        pairs = {"index": "value", "value": "index", "B": "A", "A": "B"}
        alone = [part for part in parts if part in pairs and pairs[part] not in parts]
        if name not in layers or not set(parts) <= set(PARTS) or alone:
            raise ValueError(
                f"{name}: parts {', '.join(parts)}, expected some of {', '.join(PARTS)} of a "
                "layer, index with value and B with A"
            )
    return found


def _string(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{key} is a JSON {type(value).__name__}, expected a string")
    return value


def _strings(values: Any, key: str) -> list[str]:
    if not isinstance(values, list):
        raise TypeError(f"{key} is a JSON {type(values).__name__}, expected a list")
    if len(set(map(str, values))) != len(values):
        raise ValueError(f"{key} names one thing twice, expected each once")
    return [_string(value, key) for value in values]


def _check_values(name: str, tensors: Checkpoint) -> None:
    """Refuse singular values that are not what a layer can have."""
    after, before = (tensors.infos[f"{name}{suffix}"] for suffix in (".S", ".S_base"))
    for info in (after, before):
        if not info.dtype.is_floating_point or len(info.shape) not in (1, 2):
            raise ValueError(
                f"{info.name} is {dtype_name(info.dtype)} of shape {info.shape}, expected floating "
                "numbers of shape (k,) or (E, k)"
            )
        if not bool(tensors.read(info.name).double().isfinite().all()):
            raise ValueError(f"{info.name} holds values that are not finite, expected numbers")
    if after.shape != before.shape:
        raise ValueError(
            f"{after.name} has shape {after.shape}, expected {before.shape} as {before.name} has"
        )


def _check_parts(name: str, parts: Sequence[str], tensors: Checkpoint) -> None:
    """Refuse entries, scales and remainders that are not what a layer can have."""
    shapes = {part: tuple(tensors.infos[f"{name}.{part}"].shape) for part in parts}
    *stack, k = tensors.infos[f"{name}.S"].shape
    for part, shape in shapes.items():
        info, inner = tensors.infos[f"{name}.{part}"], 2 if part in "AB" else 1
        value = tensors.read(info.name)
        if part == "index":
            sound = value.dtype in (torch.int32, torch.int64) and bool(
                ((value >= 0) & (value < k * k) & (value.long() % (k + 1) != 0)).all()
            )
            wanted = f"places beside the diagonal of {k} x {k}, as int32 or int64"
        else:
            sound = info.dtype.is_floating_point and bool(value.double().isfinite().all())
            wanted = "finite floating numbers"
        if not sound or shape[:-inner] != tuple(stack) or len(shape) != len(stack) + inner:
            raise ValueError(
                f"{info.name} is {dtype_name(info.dtype)} of shape {shape}, expected {wanted}"
            )
    ranks = shapes.get("B", (0,))[-1], (*shapes.get("A", ()), 0, 0)[len(stack)]
    if shapes.get("index") != shapes.get("value") or ranks[0] != ranks[1]:
        raise ValueError(f"{name}: parts of shapes {shapes}, expected ones that belong together")


def write_tuned(
    path: Path,
    *,
    store: FactorStore,
    S: Mapping[str, Tensor],
    parts: Mapping[str, Mapping[str, Tensor]] | None = None,
    whole: Mapping[str, Tensor] | None = None,
    task: str | None = None,
    classes: Sequence[str] | None = None,
    training: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> None:
    """Write a tuned file at exactly `path`; the caller takes care of partial files.

    Parameters
    ----------
    path : Path
        The file.
    store : FactorStore
        The factors that the values belong to; their ``S`` becomes ``S_base``.
    S : mapping of str to Tensor
        Trained singular values by tensor name, shape (k,) or (E, k).
    parts : mapping of str to mapping of str to Tensor, optional
        What else some of these layers changed, as `TunedFile.parts`.
    whole : mapping of str to Tensor, optional
        Other trained tensors by name, stored as they are.
    task : str, optional
        What was trained for.
    classes : sequence of str, optional
        Class names in the order of the head's outputs.
    training : mapping, optional
        JSON-ready summary of the run; no times and no absolute paths, so that the same run gives
        the same bytes.
    dtype : torch.dtype or None
        Of the singular values; None stores each as it is.
    """
    tensors: dict[str, Tensor] = {}
    held = {name: dict(parts[name]) for name in S if parts and parts.get(name)}
    own = {name: [f"{name}.{part}" for part in ("S", "S_base", *held.get(name, ()))] for name in S}
    taken = [name for one in S for name in (one, *own[one]) if name in (whole or {})]
    if taken:
        raise FactorsError(
            f"{path}: {shortlist(taken, 3)}: the name of a tensor that is stored whole is that of "
            "another's singular values, expected names of their own. Leave that layer whole: "
            "decompose with --exclude."
        )
    for name in S:
        tensors[f"{name}.S"] = S[name].detach().to(dtype or S[name].dtype).cpu()
        tensors[f"{name}.S_base"] = store.read_S(name).float()
        for part, value in held.get(name, {}).items():
            tensors[f"{name}.{part}"] = _as_stored(part, value, dtype, S[name].shape[-1])
    tensors |= {name: value.detach().cpu() for name, value in (whole or {}).items()}
    facts = {
        "schema_version": PARTS_VERSION if held else SCHEMA_VERSION,
        "base_fingerprint": store.base_fingerprint,
        "factors_fingerprint": store.fingerprint,
        "task": task,
        "classes": None if classes is None else list(classes),
        "training": dict(training or {}),
        "layers": list(S),
        "probes": {name: encode_probe(_probe_layer(store, name)) for name in S},
    }
    if held:
        facts["parts"] = {name: list(values) for name, values in held.items()}
    metadata = {"format": "pt", METADATA_KEY: json.dumps(facts, sort_keys=True)}
    layout = {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}
    with SafetensorsWriter(path, layout, metadata=metadata) as writer:
        for name, value in tensors.items():
            writer.write(name, value)


def _as_stored(part: str, value: Tensor, dtype: torch.dtype | None, k: int) -> Tensor:
    found = value.detach().cpu().contiguous()
    if part == "index":
        return found.to(torch.int32 if k * k <= torch.iinfo(torch.int32).max else torch.int64)
    return found.to(dtype or found.dtype)


def _probe_layer(store: FactorStore, name: str) -> Probe:
    factors = store.read(name)
    return probe(name, factors.U, factors.Vh)


def check_tuned(tuned: TunedFile, store: FactorStore) -> TunedFile:
    """Refuse a tuned file that does not belong to these factors.

    The same factors are accepted by their fingerprint. Other factors of the same base (a
    colleague's own decomposition) are accepted where the singular vectors that were trained agree.

    Returns
    -------
    TunedFile
        The file as it reads with these factors: where a pair of vectors has the other sign, entries
        beside the diagonal do too.

    Raises
    ------
    FactorsError
        If the base is another, or layers are missing, truncated differently or rotated; each such
        layer is named.
    """
    if tuned.base_fingerprint != store.base_fingerprint:
        raise FactorsError(
            f"{tuned.path}: was trained on the base {tuned.base_fingerprint[:12]}, expected "
            f"{store.base_fingerprint[:12]}, the base of {store.path}. "
            "Use the factors of the base it was trained on."
        )
    same = tuned.factors_fingerprint == store.fingerprint
    wrong = list(_misfits(tuned, store)) if same else list(_disagreements(tuned, store))
    if wrong:
        raise FactorsError(
            f"{tuned.path}: {counted(len(wrong), 'layers', 'do')} not fit the factors in "
            f"{store.path}: {shortlist(wrong, 3)}. Use the factors it was trained on."
        )
    signed = [name for name, parts in tuned.parts.items() if "index" in parts]
    if same or not signed:
        return tuned
    probes = {name: _probe_layer(store, name) for name in signed}
    turned = {name: in_signs_of(tuned, name, probes[name]) for name in signed}
    return replace(tuned, parts={**tuned.parts, **turned})


def in_signs_of(tuned: TunedFile, name: str, other: Probe | None) -> dict[str, Tensor]:
    """Return a layer's parts as they read with other factors, whose pairs may be flipped.

    Without a probe of them, or with one of another rank, they are as they are.
    """
    parts = dict(tuned.parts[name])
    if other is None or other.left.shape != tuned.probes[name].left.shape:
        return parts
    signs = torch.from_numpy(tuned.probes[name].signs(other))
    index, k = parts["index"].long(), signs.shape[-1]
    both = signs.gather(-1, index // k) * signs.gather(-1, index % k)
    parts["value"] = parts["value"] * both.to(parts["value"].dtype)
    return parts


def _misfits(tuned: TunedFile, store: FactorStore) -> Iterable[str]:
    """Yield layers that are not in the factors, or not of their rank and shape."""
    for name, S in tuned.S.items():
        layer = store.layers.get(name)
        if layer is None:
            yield f"{name} (not decomposed)"
        elif tuple(S.shape) != (*layer.matrix[:-2], layer.rank):
            yield f"{name} (rank {layer.rank}, expected {S.shape[-1]})"
        elif other := _other_shape(tuned.parts.get(name, {}), layer.matrix):
            yield f"{name} ({other})"


def _other_shape(parts: Mapping[str, Tensor], matrix: tuple[int, ...]) -> str:
    """Say which part is not of a layer's shape; empty where all are."""
    m, n = matrix[-2:]
    sides = {"row": (-1, m), "col": (-1, n), "B": (-2, m), "A": (-1, n)}
    for part, (dim, size) in sides.items():
        if part in parts and parts[part].shape[dim] != size:
            return f"{part} of {parts[part].shape[dim]}, expected {size}"
    return ""


def _disagreements(tuned: TunedFile, store: FactorStore) -> Iterable[str]:
    yield from _misfits(tuned, store)
    for name in tuned.S:
        layer = store.layers.get(name)
        ours, theirs = (
            (None, None)
            if layer is None
            else (store.read_S(name).double(), tuned.S_base[name].double())
        )
        if ours is None or theirs is None or ours.shape != theirs.shape:
            continue
        if float((ours - theirs).abs().max()) > S_TOLERANCE * float(theirs.abs().max()):
            yield f"{name} (other singular values)"
        elif _rotated(tuned, store, name):
            yield f"{name} (other singular vectors)"


def _rotated(tuned: TunedFile, store: FactorStore, name: str) -> bool:
    moved = movement(tuned, name)
    if not moved.any():
        return False
    return tuned.probes[name].mismatch(_probe_layer(store, name), moved) > PROBE_TOLERANCE


def movement(tuned: TunedFile, name: str) -> Float64:
    """Return how much each pair of singular vectors takes part in what a layer changed, (..., k).

    The root of the squares of its change and of the entries in its row and its column of M, half
    each: the squares of all pairs add up to those of the change.
    """
    change = tuned.change(name)
    squares = change.delta.square()
    if change.index is not None and change.value is not None:
        k = squares.shape[-1]
        half = change.value.square() / 2.0
        squares = squares.scatter_add(-1, change.index // k, half)
        squares = squares.scatter_add(-1, change.index % k, half)
    return np.asarray(squares.sqrt().numpy(), dtype=np.float64)
