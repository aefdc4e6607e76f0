"""What ``svf_config.json`` says of a factor checkpoint, as dataclasses, and its validation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from svftool.checkpoints import Selection, dtype_named
from svftool.checkpoints.views import View, matrix_shape
from svftool.errors import FactorsError, system_fault
from svftool.files.given import check_factors
from svftool.files.header import json_text
from svftool.files.names import FACTORS_FILE

SCHEMA_VERSION = 1
CONFIG_FILE = FACTORS_FILE


@dataclass(frozen=True)
class LayerRecord:
    """One decomposed tensor.

    Attributes
    ----------
    name : str
        Tensor name as in the base's file.
    shape : tuple of int
        Shape of the tensor.
    dtype : str
        Its dtype in the base, such as ``"bfloat16"``.
    view : {"matrix", "batch"}
        How the tensor is seen as matrices.
    matrix : tuple of int
        ``(m, n)``, or ``(E, m, n)`` for the batch view.
    rank : int
        Number of singular values kept, k.
    method : str
        Which way the factors were computed, and passed its checks.
    reconstruction_error : float
        ``||W - U diag(S) Vh||_F / ||W||_F``; 0 for a zero matrix. Includes what truncation dropped.
        An estimate from random probes for float32 factors, exact for half-precision ones.
    orthogonality_error : float
        The larger of ``max |U'U - I|`` and ``max |Vh Vh' - I|``.
    energy : float
        Share of ``||W||_F^2`` that the kept singular values hold; 1 at full rank.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    view: View
    matrix: tuple[int, ...]
    rank: int
    method: str
    reconstruction_error: float
    orthogonality_error: float
    energy: float

    @property
    def full_rank(self) -> bool:
        """Whether nothing was truncated."""
        return self.rank == min(self.matrix[-2:])


@dataclass(frozen=True)
class BaseRecord:
    """The checkpoint that was decomposed.

    Attributes
    ----------
    place : str
        The path relative to the factor folder, never an absolute one; or a hub id.
    hub : bool
        Whether `place` is a hub id.
    fingerprint : str
        SHA-256 over all its tensors, see `svftool.checkpoints.fingerprint`.
    """

    place: str
    hub: bool
    fingerprint: str


@dataclass(frozen=True)
class FactorConfig:
    """Everything that ``svf_config.json`` holds.

    Attributes
    ----------
    base : BaseRecord
        Where the factors came from.
    fingerprint : str
        Fingerprint of the factors themselves.
    selection : Selection
        The globs that chose the layers.
    rank : str
        The rank rule as given.
    method : str
        The method as asked for; each layer records the one that gave its factors.
    dtype : str
        Storage dtype of ``U`` and ``Vh``.
    layers_only : bool
        Whether tensors that are not decomposed were left out.
    layers : mapping of str to LayerRecord
        The decomposed tensors in file order.
    left_whole : mapping of str to str
        Every other tensor of the base, with the reason.
    digests : mapping of str to str
        SHA-256 of each tensor in the folder; empty in folders of older versions.
    """

    base: BaseRecord
    fingerprint: str
    selection: Selection
    rank: str
    method: str
    dtype: str
    layers_only: bool
    layers: Mapping[str, LayerRecord]
    left_whole: Mapping[str, str] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)


def config_to_json(config: FactorConfig, *, version: str) -> str:
    """Serialise a configuration; the same configuration gives the same bytes."""
    document = {
        "schema_version": SCHEMA_VERSION,
        "svftool_version": version,
        "base": asdict(config.base),
        "fingerprint": config.fingerprint,
        "selection": asdict(config.selection),
        "rank": config.rank,
        "method": config.method,
        "dtype": config.dtype,
        "layers_only": config.layers_only,
        "plan": {},  # a key of schema 1 that nothing reads
        "layers": [asdict(layer) for layer in config.layers.values()],
        "left_whole": [{"name": k, "reason": v} for k, v in config.left_whole.items()],
        "digests": dict(config.digests),
    }
    return json_text(document, indent=2) + "\n"


def read_config(folder: Path) -> FactorConfig:
    """Read and validate ``svf_config.json`` of a factor folder.

    Raises
    ------
    FactorsError
        If it is missing, is not JSON, or does not follow the schema.
    """
    path = folder / CONFIG_FILE
    check_factors(folder)
    try:
        document = json.loads(path.read_bytes())
        if not isinstance(document, dict):
            raise TypeError(f"a JSON {type(document).__name__}, expected an object")  # noqa: TRY301
        _check_version(path, document["schema_version"])
        return _config_from(document)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        system_fault(error, path)
        reason = str(error).partition("\n")[0][:200]
        raise FactorsError(
            f"{path}: not a valid configuration ({type(error).__name__}: {reason}). "
            "Run 'svftool decompose' again."
        ) from error


def _check_version(path: Path, found: Any) -> None:
    if found != SCHEMA_VERSION:
        raise FactorsError(
            f"{path}: schema version {found!r}, expected {SCHEMA_VERSION}. "
            "Use the svftool version that wrote it, or run 'svftool decompose' again."
        )


def _config_from(document: Mapping[str, Any]) -> FactorConfig:
    selection = document["selection"]
    layers = [layer_from_json(item) for item in _typed(document, "layers", list)]
    left = _typed(document, "left_whole", list)
    base = BaseRecord(**document["base"])
    _check_base(base)
    config = FactorConfig(
        base=base,
        fingerprint=_typed(document, "fingerprint", str),
        selection=Selection(
            include=tuple(map(str, _typed(selection, "include", list))),
            exclude=tuple(map(str, _typed(selection, "exclude", list))),
            views=tuple((str(glob), view) for glob, view in _typed(selection, "views", list)),
        ),
        rank=str(document["rank"]),
        method=str(document["method"]),
        dtype=str(document["dtype"]),
        layers_only=_typed(document, "layers_only", bool),
        layers={layer.name: layer for layer in layers},
        left_whole={_typed(item, "name", str): _typed(item, "reason", str) for item in left},
        digests=_digests(document),
    )
    if len(config.layers) < len(layers):
        raise ValueError("layers names one tensor twice, expected each once")
    return config


def _typed(item: Mapping[str, Any], key: str, kind: type) -> Any:
    value = item[key]
    if not isinstance(value, kind):
        found, expected = type(value).__name__, kind.__name__
        raise TypeError(f"{key} is a JSON {found}, expected {expected}")
    return value


def _digests(document: Mapping[str, Any]) -> dict[str, str]:
    """Return the digests; folders of older versions have none."""
    digests = _typed({"digests": {}, **document}, "digests", dict)
    return {name: _typed(digests, name, str) for name in digests}


def _check_base(base: BaseRecord) -> None:
    facts = asdict(base)
    place = _typed(facts, "place", str)
    _typed(facts, "hub", bool)
    _typed(facts, "fingerprint", str)
    if not place or "\0" in place or len(place) > _LONGEST_PLACE:
        raise ValueError("place is no path, expected where the base is")


_LONGEST_PLACE = 4096


def layer_from_json(item: Mapping[str, Any]) -> LayerRecord:
    """Make a record from what JSON holds of it.

    Raises
    ------
    KeyError, TypeError, ValueError
        If something is missing, of another type, or does not fit the rest.
    """
    sides = {key: tuple(_typed(item, key, list)) for key in ("shape", "matrix")}
    layer = LayerRecord(**{**item, **sides})
    for key in ("name", "dtype", "view", "method"):
        _typed(item, key, str)
    sizes: tuple[Any, ...] = (*layer.shape, *layer.matrix, layer.rank)
    for side in sizes:
        if not isinstance(side, int) or isinstance(side, bool) or not 0 < side < _LARGEST:
            raise ValueError(f"layer {layer.name!r}: {str(side)[:40]}, expected a size")
    if (
        layer.view not in ("matrix", "batch")
        or matrix_shape(layer.shape, layer.view) != layer.matrix
    ):
        raise ValueError(
            f"layer {layer.name!r}: matrix {layer.matrix}, expected the {layer.view!r} view of "
            f"{layer.shape}"
        )
    dtype_named(layer.dtype)
    for key in ("reconstruction_error", "orthogonality_error", "energy"):
        if not isinstance(item[key], int | float):
            raise TypeError(f"layer {layer.name!r}: {key}, expected a number")
    return layer


_LARGEST = 1 << 62
