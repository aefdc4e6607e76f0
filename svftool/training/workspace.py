"""Where a comparison of runs is kept until it is finished: ``OUTPUT.partial.runs``.

It holds the outputs of finished runs, their results, the state of the run in progress, and what
was asked for. What is published when the work ends or is interrupted is a copy, so that an
interrupted comparison can be used and continued.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svftool.checkpoints import PARTIAL, parse_json, replace_output, write_errors
from svftool.errors import UsageError, kept_work, shortlist
from svftool.files.output import remove
from svftool.training.plan import Run, run_from_plain, run_to_plain
from svftool.training.request import differences
from svftool.training.state import StateFile, write_safely

SUFFIX = f"{PARTIAL}.runs"
_REQUEST, _OUTPUTS, _PUBLISHED = "request.json", "outputs", "published.json"


@dataclass
class Workspace:
    """The folder of a comparison that is not finished.

    Attributes
    ----------
    target : Path
        What is published.
    every : int or None
        Steps between two writings of a run's state; see `svftool.training.StateFile`.
    finished : bool
        Set when all runs are done: the folder is of no further use then.
    """

    target: Path
    every: int | None = None
    finished: bool = False

    @property
    def folder(self) -> Path:
        """Where everything is."""
        return self.target.with_name(self.target.name + SUFFIX)

    @property
    def outputs(self) -> Path:
        """What is published: a run's own file or folder, or the folder of all of them."""
        return self.folder / _OUTPUTS

    @property
    def journal(self) -> Journal:
        """Finished runs, and the state of the one in progress."""
        return Journal(self.folder, every=self.every)

    def may_replace(self) -> bool:
        """Whether the target is what an interrupted process published from here."""
        try:
            known = parse_json((self.folder / _PUBLISHED).read_bytes())
            return bool(known == _identity(self.target))
        except (OSError, ValueError):
            return False

    def begin(self, request: Mapping[str, Any], *, resume: bool) -> None:
        """Start anew, or go on where the same request was interrupted.

        Raises
        ------
        UsageError
            If another request was interrupted; says what differs.
        """
        path = self.folder / _REQUEST
        plain = json.loads(json.dumps(request))
        if resume and path.exists():
            self.check(request)
            return
        remove(self.folder)
        with write_errors(self.folder):
            self.folder.mkdir(parents=True)
            write_safely(json.dumps(plain), path)

    def check(self, request: Mapping[str, Any]) -> None:
        """Refuse to go on where another request was interrupted.

        Raises
        ------
        UsageError
            Says what differs.
        """
        path = self.folder / _REQUEST
        if not path.exists():
            return
        plain = json.loads(json.dumps(request))
        with kept_work(path):
            changed = list(differences(dict(parse_json(path.read_bytes())), plain))
        if changed:
            raise UsageError(
                f"{self.target}: --resume would go on with another comparison: "
                f"{shortlist(changed, 4)}. Give what was given before, or leave --resume out to "
                "begin anew."
            )

    def publish(self, partial: Path) -> None:
        """Put a copy of the outputs at `partial`."""
        # A finished comparison's folder goes at once: no copy of large files is needed then.
        copy = _link if self.finished else shutil.copy2
        if self.outputs.is_dir():
            shutil.copytree(self.outputs, partial, copy_function=copy)
        else:
            copy(self.outputs, partial)

    def leave(self) -> None:
        """Remove what is finished; remember what was published of what is not."""
        if self.finished:
            remove(self.folder)
            return
        with write_errors(self.folder):
            write_safely(json.dumps(_identity(self.target)), self.folder / _PUBLISHED)


@contextmanager
def open_workspace(
    target: Path,
    *,
    force: bool,
    resume: bool,
    inputs: Sequence[Path],
    every: int | None,
) -> Iterator[Workspace]:
    """Claim an output, and publish it when the block ends without an error.

    Parameters
    ----------
    target : Path
        The output.
    force : bool
        Whether an existing one may be replaced.
    resume : bool
        Go on with an interrupted comparison; the output may then be what it published.
    inputs : sequence of Path
        What the output must lie apart from.
    every : int or None
        See `Workspace`.

    Yields
    ------
    Workspace
        Call `Workspace.begin` first.

    Raises
    ------
    UsageError
        As `svftool.checkpoints.replace_output`.
    """
    work = Workspace(target, every)
    may = force or (resume and work.may_replace())
    with replace_output(target, force=may, inputs=inputs) as partial:
        try:
            yield work
            with write_errors(partial):
                work.publish(partial)
        except BaseException:
            if not work.journal.holds_work:
                remove(work.folder)
            raise
    work.leave()


def describe_files(path: Path) -> dict[str, Any] | None:
    """Say what lies at a path, so that a change is noticed: sizes and times of files.

    Parameters
    ----------
    path : Path
        A file, or a folder with all that is in it.

    Returns
    -------
    dict or None
        (size, time of the last change in nanoseconds) by relative name; None where nothing is.
    """
    if path.is_file():
        return {path.name: _stamp(path)}
    if not path.is_dir():
        return None
    return {
        str(file.relative_to(path)): _stamp(file)
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _identity(path: Path) -> list[int]:
    status = path.lstat()
    return [status.st_ino, status.st_mtime_ns]


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


# What is kept of a comparison while it goes on, so that another process can continue it.


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
        """Return the file of a run's state."""
        return StateFile(self.folder / STATES / f"{stem}.safetensors", every=self._every)

    def finish(self, run: Run) -> None:
        """Note that a run is finished and written; its state is no longer needed."""
        self.note(run.stem, run_to_plain(run))
        self.state_of(run.stem).remove()

    def finished(self, stem: str) -> Run | None:
        """Return a finished run; None if it is not."""
        value = self.noted(stem)
        with kept_work(self.folder):
            return None if value is None else run_from_plain(value)

    def note(self, name: str, value: Mapping[str, Any]) -> None:
        """Keep plain values under a name.

        Raises
        ------
        ResourceError
            If the disk refuses it.
        """
        path = self.folder / RECORDS / f"{name}.json"
        with write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_safely(json.dumps({"sha256": _digest(value), "value": value}), path)

    def noted(self, name: str) -> dict[str, Any] | None:
        """Return the values kept under a name; None if there are none.

        Raises
        ------
        FactorsError
            If they are not as `note` left them.
        """
        path = self.folder / RECORDS / f"{name}.json"
        if not path.exists():
            return None
        with kept_work(path):
            kept = parse_json(path.read_bytes())
            value = dict(kept["value"])
            if kept["sha256"] != _digest(value):
                raise ValueError("its values are not those that were written")
            return value


def _digest(value: Mapping[str, Any]) -> str:
    """Hash plain values, so that a value of the wrong type or size is never gone on from."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
