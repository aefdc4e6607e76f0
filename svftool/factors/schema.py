"""What ``svf_config.json`` says of a factor checkpoint, as dataclasses, and its validation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from svftool.checkpoints import Selection
from svftool.checkpoints.views import View
from svftool.errors import FactorsError

SCHEMA_VERSION = 1
CONFIG_FILE = "svf_config.json"


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
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def read_config(folder: Path) -> FactorConfig:
    """Read and validate ``svf_config.json`` of a factor folder.

    Raises
    ------
    FactorsError
        If it is missing, is not JSON, or does not follow the schema.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FactorsError(
            f"{folder}: no {CONFIG_FILE}, expected a folder written by 'svftool decompose'. "
            "Run 'svftool decompose CHECKPOINT -o FACTORS' first."
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        _check_version(path, document["schema_version"])
        return _config_from(document)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FactorsError(
            f"{path}: not a valid configuration ({type(error).__name__}: {error}). "
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
    return FactorConfig(
        base=BaseRecord(**document["base"]),
        fingerprint=str(document["fingerprint"]),
        selection=Selection(
            include=tuple(selection["include"]),
            exclude=tuple(selection["exclude"]),
            views=tuple((glob, view) for glob, view in selection["views"]),
        ),
        rank=str(document["rank"]),
        method=str(document["method"]),
        dtype=str(document["dtype"]),
        layers_only=bool(document["layers_only"]),
        layers={item["name"]: layer_from_json(item) for item in document["layers"]},
        left_whole={item["name"]: item["reason"] for item in document["left_whole"]},
    )


def layer_from_json(item: Mapping[str, Any]) -> LayerRecord:
    """Make a record from what JSON holds of it."""
    return LayerRecord(**{**item, "shape": tuple(item["shape"]), "matrix": tuple(item["matrix"])})
