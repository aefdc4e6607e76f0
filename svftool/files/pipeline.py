"""Pipelines: folders of several models, each in its own, as ``model_index.json`` says."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from svftool.errors import CheckpointError, shortlist
from svftool.files.folder import read_object, weight_candidates
from svftool.files.hub import PIPELINE_FILE, fetch
from svftool.files.hub_ids import is_on_hub
from svftool.files.names import FACTORS_FILE
from svftool.files.side_files import SideFiles, side_files

INDEX = PIPELINE_FILE
_NAME = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class Pipeline:
    """A folder with a ``model_index.json``.

    Attributes
    ----------
    path : Path
    components : tuple of str
        Names of the folders with weights or factors, in the order of the index.
    absent : tuple of str
        Components that the index lists and that have no folder.
    """

    path: Path
    components: tuple[str, ...]
    absent: tuple[str, ...] = field(default=())

    def rest(self) -> SideFiles:
        """Find everything beside the components: the index, tokenizers, schedulers."""
        found = side_files(self.path)
        own = set(self.components)
        found.kept = [one for one in found.kept if one.relative_to(self.path).parts[0] not in own]
        found.left = {name: size for name, size in found.left.items() if name not in own}
        return found


def located(path: str | os.PathLike[str]) -> Path:
    """Return the folder of a pipeline, fetched if it is on the hub; anything else as it is."""
    text = os.fspath(path)
    if is_on_hub(text) and is_pipeline(here := fetch(text)):
        return here
    return Path(text)


def is_pipeline(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is a pipeline."""
    return (Path(path) / INDEX).is_file()


def read_pipeline(path: str | os.PathLike[str]) -> Pipeline:
    """Read which components a pipeline has.

    Raises
    ------
    CheckpointError
        If the index is broken, or no component has weights.
    """
    folder = Path(path)
    index = read_object(folder / INDEX, "the components of a pipeline")
    listed = [name for name, about in index.items() if _is_component(name, about)]
    found = tuple(name for name in listed if _has_weights(folder / name))
    if not found:
        raise CheckpointError(
            f"{folder}: no component has weights ({INDEX} lists {shortlist(listed, 6) or 'none'}), "
            "expected folders with weights. Check that the download is complete."
        )
    return Pipeline(folder, found, tuple(n for n in listed if not (folder / n).is_dir()))


def _is_component(name: str, about: object) -> bool:
    """Tell components, ``[LIBRARY, CLASS]``, from settings and from what is switched off."""
    stated = isinstance(about, list) and len(about) == 2
    return stated and any(about) and bool(_NAME.fullmatch(name))  # type: ignore[arg-type]


def _has_weights(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    names = sorted(entry.name for entry in folder.iterdir() if not entry.is_dir())
    return FACTORS_FILE in names or bool(weight_candidates(names))


def counterpart_folders(
    base: Pipeline, others: Sequence[str | os.PathLike[str]]
) -> Mapping[str, list[Path | None]]:
    """Find each component's folder in other pipelines.

    Returns
    -------
    mapping of str to list of Path or None
        By component of the base, one entry for each of the others; None where it has none.

    Raises
    ------
    CheckpointError
        If one of them is no pipeline, or has none of the components.
    """
    for other in others:
        if not is_pipeline(other):
            raise CheckpointError(
                f"{other}: no {INDEX}, while {base.path} is a pipeline, expected one with the same "
                "components. Name the component of the base that it is a fine-tune of, such as "
                f"{base.path / base.components[0]}."
            )
    held = [read_pipeline(other) for other in others]
    for one in held:
        if not set(one.components) & set(base.components):
            raise CheckpointError(
                f"{one.path}: components {shortlist(one.components, 6)}, expected those of "
                f"{base.path}: {shortlist(base.components, 6)}. Name a fine-tune of it."
            )
    return {
        name: [one.path / name if name in one.components else None for one in held]
        for name in base.components
    }
