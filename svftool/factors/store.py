"""Read a factor checkpoint: one layer at a time, checked against its configuration."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from svftool.checkpoints import (
    Checkpoint,
    Fingerprint,
    TensorInfo,
    dtype_name,
    dtype_named,
    fingerprint_checkpoint,
    open_checkpoint,
    tensor_digest,
)
from svftool.checkpoints.base import Closing
from svftool.errors import CheckpointError, FactorsError, counted, shortlist
from svftool.factors.schema import CONFIG_FILE, FactorConfig, LayerRecord, read_config
from svftool.files.names import real
from svftool.progress import SILENT, Progress

STEM = "svf"


@dataclass(frozen=True)
class LayerFactors:
    """Factors of one layer, ``W = U diag(S) Vh`` up to truncation and rounding.

    Attributes
    ----------
    U : (..., m, k) Tensor
        Left singular vectors as columns, in the storage dtype.
    S : (..., k) Tensor
        Singular values, non-increasing, float32 or better.
    Vh : (..., k, n) Tensor
        Right singular vectors as rows, in the storage dtype.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor


def is_factors(path: str | os.PathLike[str]) -> bool:
    """Whether a path looks like a factor checkpoint."""
    return (Path(path) / CONFIG_FILE).is_file()


def open_factors(path: str | os.PathLike[str]) -> FactorStore:
    """Open a factor checkpoint written by `svftool.decompose`.

    Parameters
    ----------
    path : path-like
        The folder.

    Returns
    -------
    FactorStore
        Reads lazily; a context manager.

    Raises
    ------
    FactorsError
        If the folder, its configuration or its tensors are not what they should be.
    """
    folder = Path(path)
    config = read_config(folder)
    try:
        tensors = open_checkpoint(folder, stem=STEM)
    except CheckpointError as error:
        raise FactorsError(str(error)) from error
    try:
        return FactorStore(folder, config, tensors)
    except FactorsError:
        tensors.close()
        raise


class FactorStore(Closing):
    """A factor checkpoint opened for reading; see `open_factors`.

    Attributes
    ----------
    path : Path
        The folder.
    config : FactorConfig
        What ``svf_config.json`` says.
    layers : mapping of str to LayerRecord
        The decomposed tensors, in file order.
    whole : tuple of str
        Names of the tensors kept whole in the folder.
    """

    def __init__(self, path: Path, config: FactorConfig, tensors: Checkpoint) -> None:
        self.path = path
        self.config = config
        self.layers: Mapping[str, LayerRecord] = config.layers
        self._tensors = tensors
        factor_names = {f"{name}.{part}" for name in self.layers for part in ("U", "S", "Vh")}
        self.whole = tuple(name for name in tensors.infos if name not in factor_names)
        self._check(factor_names)
        self._seal = _Seal(config, self._tensors, factor_names)

    @property
    def base_fingerprint(self) -> str:
        """Fingerprint of the checkpoint that was decomposed."""
        return self.config.base.fingerprint

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the factors themselves."""
        return self.config.fingerprint

    @property
    def own_files(self) -> tuple[str, ...]:
        """Names of its weight files and its index."""
        return self._tensors.own_files

    def read(self, name: str) -> LayerFactors:
        """Read the factors of one layer."""
        parts = (self._seal.read(f"{name}.{part}") for part in ("U", "S", "Vh"))
        return LayerFactors(*parts)

    def read_S(self, name: str) -> Tensor:
        """Read the singular values of one layer, shape (k,) or (E, k)."""
        return self._seal.read(f"{name}.S")

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor of the base, decomposed or kept whole."""
        layer = self.layers.get(name)
        if layer is None:
            return self._tensors.infos[name]
        return TensorInfo(name, dtype_named(layer.dtype), layer.shape, "")

    def read_whole(self, name: str) -> Tensor:
        """Read a tensor that was not decomposed."""
        return self._seal.read(name)

    def open_base(
        self, override: str | os.PathLike[str] | None = None, *, progress: Progress = SILENT
    ) -> Checkpoint:
        """Open the base checkpoint and check that it is the one that was decomposed.

        Parameters
        ----------
        override : path-like, optional
            Where the base is; the recorded place if None.
        progress : Progress
            Told how far the fingerprint is.

        Raises
        ------
        FactorsError
            If no base is at the recorded place.
        CheckpointError
            If it cannot be read or its fingerprint is another.
        """
        base = open_checkpoint(self._place() if override is None else override)
        found = fingerprint_checkpoint(base, progress=progress)
        if found != self.base_fingerprint:
            base.close()
            raise CheckpointError(
                f"{base.path}: fingerprint {found[:12]}, expected {self.base_fingerprint[:12]} "
                f"as recorded in {self.path}. Give the checkpoint that was decomposed with "
                "--base, or decompose this one."
            )
        return base

    def _place(self) -> str | Path:
        base = self.config.base
        if base.hub:
            return base.place
        # The place is relative to the folder itself, which links may stand for, as may its files.
        own = real(self.path / CONFIG_FILE).parent
        folders = (real(self.path), own, self.path)
        places = [Path(os.path.normpath(folder / base.place)) for folder in folders]
        path = next((one for one in places if one.exists()), None)
        if path is None:
            raise FactorsError(
                f"{self.path}: its base is not at the recorded place {base.place!r}. "
                "Give the checkpoint that was decomposed with --base."
            )
        return path

    def _check(self, factor_names: set[str]) -> None:
        missing = sorted(factor_names - set(self._tensors.infos))
        if missing:
            raise FactorsError(
                f"{self.path}: {counted(len(missing), 'factors', 'are')} missing that "
                f"{CONFIG_FILE} names ({shortlist(missing, 3)}). Run 'svftool decompose' again."
            )
        for name, layer in self.layers.items():
            self._check_layer(name, layer)

    def _check_layer(self, name: str, layer: LayerRecord) -> None:
        *batch, m, n = layer.matrix
        expected = {"U": (*batch, m, layer.rank), "S": (*batch, layer.rank)}
        expected["Vh"] = (*batch, layer.rank, n)
        for part, shape in expected.items():
            found = self._tensors.infos[f"{name}.{part}"].shape
            if found != shape:
                raise FactorsError(
                    f"{self.path}: layer {name!r}: {part} has shape {found}, expected {shape}. "
                    "Run 'svftool decompose' again."
                )

    def close(self) -> None:
        """Close the files."""
        self._tensors.close()


class _Seal:
    """Reads the tensors of a factor folder and holds each against what `decompose` wrote.

    What is never read is never hashed, and nothing is claimed of it. Folders of older versions
    record one fingerprint of all factors: there it is checked once the last of them was read.
    """

    def __init__(self, config: FactorConfig, tensors: Checkpoint, factor_names: set[str]) -> None:
        self._tensors = tensors
        self._expected = config.digests
        self._total = config.fingerprint
        self._factors = factor_names
        self._seen: dict[str, str] = {}
        if self._expected:
            self._check_record()

    def read(self, name: str) -> Tensor:
        tensor = self._tensors.read(name)
        digest = tensor_digest(tensor)
        if self._expected:
            expected = self._expected.get(name, "none")
            if digest != expected:
                raise self._changed(
                    f"{name!r} has the SHA-256 {digest[:12]}, expected {expected[:12]}"
                )
        elif name in self._factors and name not in self._seen:
            self._seen[name] = digest
            if len(self._seen) == len(self._factors):
                self._check_total(self._seen)
        return tensor

    def _check_record(self) -> None:
        missing = sorted(name for name in self._tensors.infos if name not in self._expected)
        if missing:
            raise self._changed(
                f"{shortlist(map(repr, missing), 3)}: not recorded, expected only tensors that "
                "decompose wrote"
            )
        self._check_total(self._expected)

    def _check_total(self, digests: Mapping[str, str]) -> None:
        total = Fingerprint()
        for name in self._factors:
            info = self._tensors.infos[name]
            total.add_digest(name, dtype_name(info.dtype), info.shape, digests[name])
        if total.hexdigest() != self._total:
            raise self._changed(
                f"the factors have the fingerprint {total.hexdigest()[:12]}, expected "
                f"{self._total[:12]}"
            )

    def _changed(self, found: str) -> FactorsError:
        return FactorsError(
            f"{self._tensors.path}: {found} as {CONFIG_FILE} says. The files changed after they "
            "were decomposed: restore them, or run 'svftool decompose' again."
        )
