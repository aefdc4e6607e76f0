"""What is kept of a comparison while it goes on, so that another process can continue it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from svftool.checkpoints import write_errors
from svftool.training.plan import Run, run_from_plain, run_to_plain
from svftool.training.state import StateFile, replace_safely

STATES, RECORDS = "states", "records"


class Journal:
    """Finished runs and the state of the one in progress, in a folder.

    Parameters
    ----------
    folder : Path
        Made when something is written.
    every : int or None
        Steps between two writings of a run's state; see `StateFile`.
    """

    def __init__(self, folder: Path, *, every: int | None = None) -> None:
        self.folder = folder
        self._every = every

    @property
    def holds_work(self) -> bool:
        """Whether anything in it is worth going on from."""
        return any((self.folder / name).is_dir() for name in (STATES, RECORDS))

    def state_of(self, stem: str) -> StateFile:
        """Give the file of a run's state."""
        return StateFile(self.folder / STATES / f"{stem}.safetensors", every=self._every)

    def finish(self, run: Run) -> None:
        """Note that a run is finished and written; its state is no longer needed."""
        self.note(run.stem, run_to_plain(run))
        self.state_of(run.stem).remove()

    def finished(self, stem: str) -> Run | None:
        """Give a finished run; None if it is not."""
        value = self.noted(stem)
        return None if value is None else run_from_plain(value)

    def note(self, name: str, value: Mapping[str, Any]) -> None:
        """Keep plain values under a name.

        Raises
        ------
        ResourceError
            If the disk refuses it.
        """
        path = self.folder / RECORDS / f"{name}.json"
        fresh = path.with_name(f"{path.name}.new")
        with write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text(json.dumps(value), encoding="utf-8")
            replace_safely(fresh, path)

    def noted(self, name: str) -> dict[str, Any] | None:
        """Give the values kept under a name; None if there are none."""
        path = self.folder / RECORDS / f"{name}.json"
        if not path.exists():
            return None
        return dict(json.loads(path.read_text(encoding="utf-8")))
