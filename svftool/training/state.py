"""The state of a run on disk, from which another process goes on as if nothing had happened."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from svftool.checkpoints import fingerprint, write_errors
from svftool.errors import kept_work

SECONDS = 30.0
"""Least time between two writings, where no number of steps is given."""

LARGEST_SHARE = 0.05
"""Largest share of the time that writing may take, where no number of steps is given."""

_FACTS, _DIGEST = "svftool", "sha256"


@dataclass(frozen=True)
class State:
    """Everything that a run's next step depends on and that its seed does not give.

    Attributes
    ----------
    tensors : mapping of str to Tensor
        Trained and set aside weights, the optimiser's state, buffers that changed.
    facts : mapping
        Plain values: the step, the smoothed loss ...
    """

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose names begin with ``prefix.``, without it."""
        start = f"{prefix}."
        return {
            name.removeprefix(start): value
            for name, value in self.tensors.items()
            if name.startswith(start)
        }


class StateFile:
    """The file of a run's state; each writing replaces it whole.

    Parameters
    ----------
    path : Path
        Where it is kept.
    every : int or None
        Steps between two writings; None goes by the clock, see `SECONDS` and `LARGEST_SHARE`.
    """

    def __init__(self, path: Path, *, every: int | None = None) -> None:
        self.path = path
        self._every = every
        self._cost = 0.0
        self._last = time.perf_counter()

    def due(self, steps: int) -> bool:
        """Whether to write after so many steps."""
        if self._every is not None:
            return steps % self._every == 0
        return time.perf_counter() - self._last >= max(SECONDS, self._cost / LARGEST_SHARE)

    def write(self, state: State) -> None:
        """Put a state in the place of the former one.

        Raises
        ------
        ResourceError
            If the disk refuses it.
        """
        begun = time.perf_counter()
        fresh = self.path.with_name(f"{self.path.name}.new")
        tensors = {name: value.detach().cpu().contiguous() for name, value in state.tensors.items()}
        with write_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            facts = json.dumps(dict(state.facts))
            save_file(tensors, fresh, metadata={_FACTS: facts, _DIGEST: _digest(facts, tensors)})
            replace_safely(fresh, self.path)
        self._last = time.perf_counter()
        self._cost = self._last - begun

    def read(self) -> State | None:
        """Return the last state; None where there is none.

        Raises
        ------
        FactorsError
            If it is not what `write` gave it.
        """
        if not self.path.exists():
            return None
        with kept_work(self.path), safe_open(self.path, framework="pt") as file:
            facts, digest = file.metadata()[_FACTS], file.metadata()[_DIGEST]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if digest != _digest(facts, tensors):
                raise ValueError("it is not what was written")
            return State(tensors, json.loads(facts))

    def remove(self) -> None:
        """Forget the state, once the run is written."""
        self.path.unlink(missing_ok=True)


def _digest(facts: str, tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(f"{facts}{fingerprint(tensors.items())}".encode()).hexdigest()


def write_safely(text: str, path: Path) -> None:
    """Write a text to a file that is never seen half written."""
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_text(text, encoding="utf-8")
    replace_safely(fresh, path)


def replace_safely(fresh: Path, path: Path) -> None:
    """Rename a file that was written beside its place, once the disk holds all of it."""
    with fresh.open("rb") as stream:
        os.fsync(stream.fileno())
    fresh.replace(path)
