"""Finished layers of a decomposition on its way, one file each, so that a run can be resumed.

Each layer is two files: its factors, then a small record that says the factors are complete. Both
are renamed into place, so whatever exists is whole, whenever and wherever a process was killed, and
whichever process wrote it. When a shard of the output has been assembled its layers' factors are
removed; their records stay until the end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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


class LayerSpool:
    """Finished layers in a partial folder.

    Parameters
    ----------
    partial : Path
        The partial output.
    names : sequence of str
        All layers of the run; their order names the files.
    """

    def __init__(self, partial: Path, names: Sequence[str]) -> None:
        self.folder = partial / FOLDER
        self._numbers = {name: number for number, name in enumerate(names)}

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
            _check_same(file, found, json.loads(text))
            return
        with write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_text(file, text)

    @property
    def holds_layers(self) -> bool:
        """Whether any layer is finished, so that there is something to resume."""
        return any(file.name != RUN_FILE for file in self.folder.glob("*.json"))

    def add(self, layer: FinishedLayer, factors: LayerFactors) -> None:
        """Store a finished layer."""
        path = self._path(layer.record.name, "safetensors")
        tensors = {part: getattr(factors, part) for part in PARTS}
        layout = {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in tensors.items()}
        temporary = path.with_suffix(".writing")
        temporary.unlink(missing_ok=True)
        with SafetensorsWriter(temporary, layout) as writer:
            for part, tensor in tensors.items():
                writer.write(part, tensor)
        with write_errors(path):
            temporary.replace(path)
            text = {
                "record": asdict(layer.record),
                "digests": dict(layer.digests),
                "seconds": layer.seconds,
            }
            _write_text(self._path(layer.record.name, "json"), json.dumps(text))

    def finished(self) -> dict[str, FinishedLayer]:
        """List the layers that are finished, by name."""
        found = {}
        for name in self._numbers:
            path = self._path(name, "json")
            if path.is_file():
                with kept_work(path):
                    item = parse_json(path.read_bytes())
                    record = layer_from_json(item["record"])
                    digests, seconds = dict(item["digests"]), float(item["seconds"])
                    found[name] = FinishedLayer(record, digests, seconds)
        return found

    def intact(self, layer: FinishedLayer, infos: Sequence[TensorInfo]) -> bool:
        """Whether a finished layer's factors are here and hold what was written.

        Parameters
        ----------
        layer : FinishedLayer
        infos : sequence of TensorInfo
            Of its ``U``, ``S`` and ``Vh``.
        """
        path = self._path(layer.record.name, "safetensors")
        if not path.is_file():
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
        with open_checkpoint(self._path(name, "safetensors")) as file:
            return LayerFactors(*(file.read(part) for part in PARTS))

    def drop_factors(self, name: str) -> None:
        """Remove a layer's factors, which now stand in a finished shard."""
        self._path(name, "safetensors").unlink(missing_ok=True)

    def _path(self, name: str, kind: str) -> Path:
        return self.folder / f"{self._numbers[name]:06d}.{kind}"


def digests_of(factors: LayerFactors) -> dict[str, str]:
    """Return the SHA-256 of each factor by its part's name."""
    return {part: tensor_digest(getattr(factors, part)) for part in PARTS}


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_suffix(".writing-text")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _check_same(file: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    changed = [key for key in expected if found.get(key) != expected[key]]
    if changed:
        what = ", ".join(f"{key} {brief(found.get(key))}, now {expected[key]!r}" for key in changed)
        raise UsageError(
            f"{file.parent.parent}: the interrupted run had another {what}. "
            "Give the same checkpoint and options to --resume, or start anew without it."
        )
