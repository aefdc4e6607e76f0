"""Write an adapter whose ranks are known only once every layer is done."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from svftool.adapters.low_rank import LowRank
from svftool.adapters.peft_config import CONFIG_FILE
from svftool.adapters.writers import Entries
from svftool.checkpoints import SafetensorsWriter, open_checkpoint
from svftool.errors import write_errors

Source = Callable[[], Iterator[Entries]]


class LayersOnDisk:
    """Layers that wait on the disk.

    Parameters
    ----------
    folder : Path
        An empty one that goes afterwards.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._places: dict[str, tuple[Path, float]] = {}

    def keep(self, layer: LowRank) -> LowRank:
        """Write a layer away; return one of the same shapes that holds no numbers."""
        path = self._folder / f"{len(self._places)}.safetensors"
        parts = {"B": layer.B, "A": layer.A}
        layout = {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()}
        with SafetensorsWriter(path, layout) as writer:
            for name, part in parts.items():
                writer.write(name, part)
        self._places[layer.name] = path, layer.scale
        return LowRank(layer.name, layer.B.to("meta"), layer.A.to("meta"), layer.scale)

    def load(self, name: str) -> LowRank:
        """Read a layer back."""
        path, scale = self._places[name]
        with open_checkpoint(path) as file:
            return LowRank(name, file.read("B"), file.read("A"), scale)


def write_adapter(
    partial: Path,
    sources: Sequence[Source],
    *,
    metadata: Mapping[str, str],
    weights_file: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> int:
    """Write an adapter.

    Parameters
    ----------
    partial : Path
        The file; with `weights_file` the folder.
    sources : sequence of callable
        Each yields entries; it is asked twice, for the shapes and for the values.
    metadata : mapping of str to str
    weights_file : str, optional
    config : mapping, optional
        What stands beside the weights.

    Returns
    -------
    int
        Bytes of the tensors.
    """
    path = partial
    if weights_file is not None:
        path = partial / weights_file
        with write_errors(partial):
            partial.mkdir()
            text = json.dumps(dict(config or {}), indent=2)
            (partial / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    layout = {key: (value.dtype, tuple(value.shape)) for key, value in _all(sources)}
    with SafetensorsWriter(path, layout, metadata=metadata) as file:
        for key, value in _all(sources):
            file.write(key, value)
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in layout.values())


def _all(sources: Sequence[Source]) -> Iterator[tuple[str, Tensor]]:
    for source in sources:
        for entries in source():
            yield from entries.items()
