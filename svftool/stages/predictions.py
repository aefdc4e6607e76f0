"""Predictions as a file of JSON lines, with a folder of the pictures that belong to them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from svftool.checkpoints import replace_output
from svftool.errors import UsageError
from svftool.tasks import Draw, Predicts, Task
from svftool.tasks.catalogue import PICTURED


@dataclass(frozen=True)
class Output:
    """Where predictions go; nowhere without a target.

    Attributes
    ----------
    target, partial : Path
        The file, and where it is written until all is measured.
    pictures, partial_pictures : Path or None
        The folder of the pictures that belong to it, likewise; None for tasks without.
    """

    target: Path | None = None
    partial: Path = field(default_factory=Path)
    pictures: Path | None = None
    partial_pictures: Path | None = None

    @classmethod
    def claim(
        cls,
        stack: ExitStack,
        predictions: str | os.PathLike[str] | None,
        task: str,
        *,
        force: bool,
        inputs: Sequence[Path],
    ) -> Output:
        """Take hold of the file and the folder until a stack ends.

        Raises
        ------
        UsageError
            If one of them exists and may not be replaced, or lies in an input.
        """
        if predictions is None:
            return cls()
        target = Path(predictions)
        partial = stack.enter_context(replace_output(target, force=force, inputs=inputs))
        if task not in PICTURED:
            return cls(target, partial)
        pictures = target.with_name(f"{target.stem}-pictures")
        folder = stack.enter_context(replace_output(pictures, force=force, inputs=inputs))
        folder.mkdir()
        return cls(target, partial, pictures, folder)

    def write(self, task: Task, draw: Draw, model: nn.Module) -> None:
        """Add the rows of one task.

        Raises
        ------
        UsageError
            If the task has no predictions.
        """
        if self.target is None:
            return
        if not isinstance(draw, Predicts):
            raise UsageError(f"--predictions: --task {task.name} gives none, expected no file")
        root = self.partial_pictures or self.partial.parent
        folder = root / "-".join(f"{name}{value}" for name, value in task.facts.items())
        if self.partial_pictures is not None:
            folder.mkdir(exist_ok=True)
        with self.partial.open("a", encoding="utf-8") as file:
            for row in _rows(draw, model, folder, root):
                file.write(json.dumps({**task.facts, **row}, ensure_ascii=False) + "\n")


def _rows(draw: Predicts, model: nn.Module, folder: Path, root: Path) -> Iterator[dict[str, Any]]:
    """Give the predictions, with the paths of pictures as they are seen from their folder."""
    for row in draw.predictions(model, "query", folder):
        yield {
            name: str(Path(value).relative_to(root))
            if isinstance(value, str) and value.startswith(f"{root}{os.sep}")
            else value
            for name, value in row.items()
        }
