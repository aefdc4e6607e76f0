"""Finished layers of a decomposition on its way, one file each, so that a run can be resumed.

Each layer is two files: its factors, then a small record that says the factors are complete. Both
are renamed into place, so whatever exists is whole, whenever and wherever a process was killed, and
whichever process wrote it. When a shard of the output has been put together its layers' factors are
removed; their records stay until the end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from svftool.checkpoints import (
    SafetensorsWriter,
    TensorInfo,
    open_checkpoint,
    parse_json,
    tensor_digest,
    write_errors,
)
from svftool.errors import CheckpointError, UsageError, brief, kept_work
from svftool.factors.schema import LayerRecord, layer_from_json
from svftool.factors.store import LayerFactors
from svftool.files.output import sync

_T = TypeVar("_T")
FOLDER = "layers"
RUN_FILE = "run.json"
PARTS = ("U", "S", "Vh")


@dataclass(frozen=True)
class FinishedLayer:
    """What is known of a finished layer.

    Attributes
    ----------
    record : LayerRecord
        As it will stand in the configuration.
    digests : mapping of str to str
        SHA-256 of ``U``, ``S`` and ``Vh`` as stored.
    seconds : float
        Time that the decomposition took.
    """

    record: LayerRecord
    digests: Mapping[str, str]
    seconds: float


class Spool:
    """Finished layers in a folder: of each a file of tensors, then a record that it is complete.

    Parameters
    ----------
    folder : Path
        Where they lie.
    names : sequence of str
        All layers of the run; their order names the files.
    where : Path
        The output, for messages.
    """

    def __init__(self, folder: Path, names: Sequence[str], where: Path) -> None:
        self.folder = folder
        self._numbers = {name: number for number, name in enumerate(names)}
        self._where = where

    def begin(self, run: Mapping[str, Any], *, resume: bool) -> None:
        """Start a run, or check that the one found here is the same.

        Parameters
        ----------
        run : mapping
            Everything that decides the result, ready for JSON.
        resume : bool
            Whether a run may be found here.

        Raises
        ------
        UsageError
            If another run is found: other options, or another checkpoint.
        """
        file = self.folder / RUN_FILE
        text = json.dumps(run, indent=2, sort_keys=True)
        if resume and file.is_file():
            with kept_work(file):
                found = dict(parse_json(file.read_bytes()))
            _check_same(self._where, found, json.loads(text))
            return
        with write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_text(file, text)

    @property
    def holds_layers(self) -> bool:
        """Whether any layer is finished, so that there is something to resume."""
        return any(file.name != RUN_FILE for file in self.folder.glob("*.json"))

    def keep(self, name: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Store what is finished of one layer: its tensors first, then what is known of them."""
        if tensors:
            self._keep_tensors(self._path(name, "safetensors"), tensors)
        path = self._path(name, "json")
        with write_errors(path):
            _write_text(path, json.dumps(record))

    def _keep_tensors(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        layout = {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in tensors.items()}
        temporary = path.with_suffix(".writing")
        temporary.unlink(missing_ok=True)
        with SafetensorsWriter(temporary, layout) as writer:
            for part, tensor in tensors.items():
                writer.write(part, tensor)
            writer.sync()
        with write_errors(path):
            temporary.replace(path)

    def records(self, read: Callable[[dict[str, Any]], _T]) -> dict[str, _T]:
        """List what is known of the finished layers, by name.

        Parameters
        ----------
        read : callable
            Makes it from a record as `keep` was given it.
        """
        found = {name: self.record(name, read) for name in self._numbers}
        return {name: one for name, one in found.items() if one is not None}

    def record(self, name: str, read: Callable[[dict[str, Any]], _T]) -> _T | None:
        """Return what is known of one layer; None while it is not finished."""
        path = self._path(name, "json")
        if not path.is_file():
            return None
        with kept_work(path):
            return read(dict(parse_json(path.read_bytes())))

    def forget(self, names: Iterable[str]) -> None:
        """Remove the records of layers whose tensors are gone."""
        for name in names:
            path = self._path(name, "json")
            with write_errors(path):
                path.unlink(missing_ok=True)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Read the tensors of a finished layer.

        Raises
        ------
        CheckpointError
            If the file is gone or broken.
        """
        with open_checkpoint(self._path(name, "safetensors")) as file:
            return {part: file.read(part) for part in file.infos}

    def has_tensors(self, name: str) -> bool:
        """Whether the file of a layer's tensors is here."""
        return self._path(name, "safetensors").is_file()

    def drop_factors(self, name: str) -> None:
        """Remove a layer's tensors, which now stand in a finished shard."""
        self._path(name, "safetensors").unlink(missing_ok=True)

    def _path(self, name: str, kind: str) -> Path:
        return self.folder / f"{self._numbers[name]:06d}.{kind}"


class LayerSpool(Spool):
    """Finished layers of a decomposition, in its partial folder.

    Parameters
    ----------
    partial : Path
        The partial output.
    names : sequence of str
        All layers of the run.
    """

    def __init__(self, partial: Path, names: Sequence[str]) -> None:
        super().__init__(partial / FOLDER, names, partial)

    def add(self, layer: FinishedLayer, factors: LayerFactors) -> None:
        """Store a finished layer."""
        tensors = {part: getattr(factors, part) for part in PARTS}
        self.keep(layer.record.name, tensors, _as_json(layer))

    def note(self, layer: FinishedLayer) -> None:
        """Say that a layer is finished whose factors are on the disk elsewhere."""
        self.keep(layer.record.name, {}, _as_json(layer))

    def finished(self) -> dict[str, FinishedLayer]:
        """List the layers that are finished, by name."""
        return self.records(_finished)

    def one(self, name: str) -> FinishedLayer | None:
        """Return a layer if it is finished."""
        return self.record(name, _finished)

    def intact(self, layer: FinishedLayer, infos: Sequence[TensorInfo]) -> bool:
        """Whether a finished layer's factors are here and hold what was written.

        Parameters
        ----------
        layer : FinishedLayer
        infos : sequence of TensorInfo
            Of its ``U``, ``S`` and ``Vh``.
        """
        if not self.has_tensors(layer.record.name):
            return False
        try:
            factors = self.read(layer.record.name)
        except (CheckpointError, KeyError):
            return False
        found = [(part.dtype, tuple(part.shape)) for part in (factors.U, factors.S, factors.Vh)]
        if found != [(info.dtype, info.shape) for info in infos]:
            return False
        return digests_of(factors) == dict(layer.digests)

    def read(self, name: str) -> LayerFactors:
        """Read a finished layer's factors."""
        tensors = self.tensors(name)
        return LayerFactors(*(tensors[part] for part in PARTS))


def _as_json(layer: FinishedLayer) -> dict[str, Any]:
    return {
        "record": asdict(layer.record),
        "digests": dict(layer.digests),
        "seconds": layer.seconds,
    }


def _finished(item: Mapping[str, Any]) -> FinishedLayer:
    record = layer_from_json(item["record"])
    return FinishedLayer(record, dict(item["digests"]), float(item["seconds"]))


def digests_of(factors: LayerFactors) -> dict[str, str]:
    """Return the SHA-256 of each factor by its part's name."""
    return {part: tensor_digest(getattr(factors, part)) for part in PARTS}


def _write_text(path: Path, text: str) -> None:
    """Put a text in its place, on the disk before it has its name: a loss of power tears none."""
    temporary = path.with_suffix(".writing-text")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    temporary.replace(path)


def _check_same(where: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    changed = [key for key in expected if found.get(key) != expected[key]]
    if changed:
        what = ", ".join(f"{key} {brief(found.get(key))}, now {expected[key]!r}" for key in changed)
        raise UsageError(
            f"{where}: the interrupted run had another {what}. "
            "Give the same checkpoint and options to --resume, or start anew without it."
        )
