"""Outputs that appear complete or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import logging
import operator
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from svftool.errors import ResourceError, UsageError, write_errors
from svftool.files.names import WEIGHT_SUFFIXES, real

logger = logging.getLogger(__name__)

PARTIAL = ".partial"
"""Suffix of work in progress, beside the output."""
_LOCK = ".partial.lock"
_REPLACED = ".svftool-replaced"
_MARK = ".svftool-partial"
_PROBES = (".partial.probe", ".partial.probed")


@contextmanager
def replace_output(
    target: Path,
    *,
    force: bool,
    inputs: Sequence[Path],
    keep_partial: bool = False,
    resume: bool = False,
) -> Iterator[Path]:
    """Write an output beside its place and rename it there when the block ends without an error.

    Whatever happens, the target does not exist, or is what it was, or is the complete new one.

    Parameters
    ----------
    target : Path
        File or folder to be written; missing folders above it are created.
    force : bool
        Whether an existing target may be replaced, once the new one is complete.
    inputs : sequence of Path
        Files and folders that are read; none may lie at, inside or around the target.
    keep_partial : bool
        Leave the work in progress when the block fails, for a later call with `resume`.
    resume : bool
        Leave the work in progress of an earlier call where it is; otherwise it is removed.

    Yields
    ------
    Path
        ``TARGET.partial``: make a file or a folder of that name. Locked against other processes.

    Raises
    ------
    UsageError
        If the target exists and `force` is not given, overlaps with an input, or is being
        written by another process.
    ResourceError
        If there is no room or no permission.
    """
    place = _Place(target)
    place.check_apart(inputs)
    place.check_free(force)
    with _parents(place.target.parent), _locked(place):
        place.recover()
        place.check_free(force)
        with write_errors(place.partial):
            place.clear_partial(force=force, resume=resume)
        try:
            with write_errors(place.target):
                place.probe()
            with write_errors(place.partial):
                yield place.partial
                restrict(place.partial, inputs)
                sync_tree(place.partial)
                place.check_free(force)
                place.finish()
        except BaseException:
            # What is said is why the work failed, not that its remains could not be removed.
            with _best_effort():
                place.recover()
            with _best_effort():
                if keep_partial or resume:
                    place.mark_partial()
                else:
                    remove(place.partial)
            raise


def check_output(
    target: Path, *, force: bool, resume: bool = False, inputs: Sequence[Path] = ()
) -> None:
    """Refuse beforehand what `replace_output` would refuse; takes no lock and writes nothing."""
    place = _Place(target)
    place.check_apart(inputs)
    place.check_free(force or resume)


@contextmanager
def _best_effort() -> Iterator[None]:
    """Log what the system refuses while cleaning up."""
    try:
        yield
    except (OSError, ResourceError) as error:
        logger.warning("what was left could not be removed: %s", error)


class _Place:
    """The paths of one output."""

    def __init__(self, target: Path) -> None:
        self.given = target
        # Made absolute here, so that a later change of folder does not move it; links are kept.
        self.target = Path(os.path.abspath(target))  # noqa: PTH100
        if not self.target.name:
            raise UsageError(f"{target}: a whole file system, expected a file or folder to write")
        self.partial = self._beside(PARTIAL)
        self.lock = self._beside(_LOCK)
        self.replaced = self._beside(_REPLACED)
        self.left_behind = False

    def _beside(self, suffix: str) -> Path:
        return self.target.with_name(self.target.name + suffix)

    def check_apart(self, inputs: Sequence[Path]) -> None:
        """Refuse a target that would touch an input."""
        for path in inputs:
            for mine in (self.target, self.partial, self.replaced):
                relation = overlap(mine, path)
                if relation:
                    raise UsageError(
                        f"{self.given}: the output is {relation} the input {path}, "
                        "expected a place apart. Choose another output."
                    )

    def check_free(self, force: bool) -> None:
        """Refuse a target that exists and may not be replaced."""
        if not os.path.lexists(self.target):
            return
        if not force:
            raise UsageError(
                f"{self.given}: exists already, expected a new output. Use --force to replace it."
            )
        if self.target.is_dir() and (
            os.path.ismount(self.target) or _holds(real(self.target), Path.cwd(), Path.home())
        ):
            raise UsageError(
                f"{self.given}: holds the current or the home folder, expected one that may be "
                "replaced. Choose another output."
            )

    def clear_partial(self, *, force: bool, resume: bool) -> None:
        """Remove the work in progress of an earlier call, unless it is resumed.

        A link there is never followed. What an earlier call left has a mark in it, or the lock of a
        killed process beside it; anything else is somebody else's.
        """
        mark = self.partial / _MARK
        if resume and not self.partial.is_symlink():
            mark.unlink(missing_ok=True)
            return
        ours = self.left_behind or os.path.lexists(mark)
        if os.path.lexists(self.partial) and not (force or ours):
            raise UsageError(
                f"{self.partial}: exists already and may be somebody else's, expected nothing "
                "there. Remove it, choose another output, or use --force."
            )
        remove(self.partial)

    def mark_partial(self) -> None:
        """Leave a mark in kept work, so that a later call knows it."""
        if self.partial.is_dir():
            (self.partial / _MARK).touch()

    def recover(self) -> None:
        """Finish or undo the replacement that a killed process left half way."""
        with write_errors(self.target):
            if not os.path.lexists(self.replaced):
                return
            if os.path.lexists(self.target):
                remove(self.replaced)
            else:
                self.replaced.rename(self.target)

    def probe(self) -> None:
        """Do before the work what its end will need, so that a file system that cannot says so now.

        A small file is written, put on the disk and renamed.
        """
        one, other = (self._beside(suffix) for suffix in _PROBES)
        try:
            one.write_bytes(b"svftool")
            sync(one)
            one.replace(other)
            sync(other.parent)
        finally:
            for path in (one, other):
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)

    def finish(self) -> None:
        """Put the finished work in its place; the old one stands until the new one does."""
        folder = self.target.is_dir() and not self.target.is_symlink()
        if os.path.lexists(self.target) and (folder or self.partial.is_dir()):
            self._exchange()
        else:
            self.partial.replace(self.target)
        sync(self.target.parent)

    def _exchange(self) -> None:
        """Put a new folder in the place of an old one, in one step where the system has one.

        Elsewhere it takes two, and `recover` undoes it half way.
        """
        if exchange(self.partial, self.target):
            self.partial.rename(self.replaced)
        else:
            self.target.rename(self.replaced)
            self.partial.rename(self.target)
        sync(self.target.parent)
        try:
            remove(self.replaced)
        except OSError:
            logger.warning("%s: the replaced folder could not be removed", self.replaced)


_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two files or folders in one step; tell whether that was possible."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # another system, or an old C library
        return False
    paths = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other))
    return bool(rename(*paths, _RENAME_EXCHANGE) == 0)


def _holds(folder: Path, *places: Path) -> bool:
    return any(real(place).is_relative_to(folder) for place in places)


def overlap(output: Path, path: Path) -> str:
    """Say how an output lies to an input: ``the same as``, ``inside``, ``around``, or ``""``.

    Both are compared as written and with all links followed.
    """
    for one, two in (
        (Path(os.path.abspath(output)), Path(os.path.abspath(path))),  # noqa: PTH100
        (real(output), real(path)),
    ):
        if one == two:
            return "the same as"
        if one.is_relative_to(two):
            return "inside"
        if two.is_relative_to(one):
            return "around"
    return ""


@contextmanager
def _parents(folder: Path) -> Iterator[None]:
    """Make the missing folders on the way; remove them again if the block fails."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    created: list[Path] = []
    try:
        with write_errors(folder), contextlib.suppress(FileExistsError, NotADirectoryError):
            for path in reversed(missing):
                path.mkdir(exist_ok=True)
                created.append(path)
        _check_folder(folder)
        yield
    except BaseException:
        for path in reversed(created):
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UsageError(f"{folder}: not a folder, expected one to write into")


@contextmanager
def _locked(place: _Place) -> Iterator[None]:
    """Hold the output's lock, which the system gives back whenever the process ends."""
    with write_errors(place.lock):
        handle = _acquire(place)
    try:
        yield
    finally:
        try:
            # Removed while still held: whoever opened the old file finds it gone and looks again.
            with contextlib.suppress(OSError):
                if not (place.left_behind and os.path.lexists(place.partial)):
                    place.lock.unlink()
        finally:
            os.close(handle)


def _acquire(place: _Place) -> int:
    place.left_behind = os.path.lexists(place.lock)  # by a killed process, if it is not held
    while True:
        handle = os.open(place.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise UsageError(
                f"{place.given}: another process is writing it, expected to be alone. "
                "Wait for it, or choose another output."
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                os.close(handle)
                raise
            logger.warning(
                "%s: the file system has no locks; start no second process on this output",
                place.given,
            )
            return handle
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), place.lock.stat()):
                return handle
        os.close(handle)


@contextmanager
def scratch_folder(partial: Path) -> Iterator[Path]:
    """Make a folder beside work in progress, for what is not kept; one of a killed process goes.

    Parameters and errors are those of `kept_folder`.
    """
    folder = kept_folder(partial, resume=False)
    try:
        yield folder
    finally:
        discard_folder(folder)


def kept_folder(partial: Path, *, resume: bool) -> Path:
    """Make a folder beside work in progress, which stays until `discard_folder`.

    Parameters
    ----------
    partial : Path
        As `replace_output` yields it, whose lock keeps other processes away.
    resume : bool
        Whether what an earlier call left there is kept; otherwise it goes.

    Raises
    ------
    UsageError
        If something of that name is there that no earlier call made.
    ResourceError
        If the system refuses it.
    """
    folder = partial.with_name(f".{partial.name}.scratch")
    with write_errors(folder):
        ours = folder.is_dir() and not folder.is_symlink()
        marked = ours and os.path.lexists(folder / _MARK)
        if marked and resume:
            return folder
        if marked or (ours and not any(folder.iterdir())):
            _remove_marked(folder)
        if os.path.lexists(folder):
            raise UsageError(
                f"{folder}: may be somebody else's, expected nothing there. Remove it."
            )
        folder.mkdir()
        (folder / _MARK).touch()
    return folder


def discard_folder(folder: Path) -> None:
    """Remove a folder that `kept_folder` made; what cannot be removed is logged."""
    with _best_effort():
        _remove_marked(folder)


def _remove_marked(folder: Path) -> None:
    """Remove a folder, its mark last: what the system leaves of it is known again."""
    for entry in folder.iterdir():
        if entry.name != _MARK:
            remove(entry)
    remove(folder)


def remove(path: Path) -> None:
    """Remove a file, a link, or a whole folder; nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def restrict(written: Path, inputs: Sequence[Path]) -> None:
    """Let nobody read weights who may not read the weights that they were made from."""
    modes = [path.stat().st_mode for one in inputs for path in _weights(one)]
    closed = 0o066 & ~functools.reduce(operator.and_, modes, 0o066)
    if closed:
        for path in _weights(written):
            path.chmod(path.stat().st_mode & ~closed)


def _weights(path: Path) -> list[Path]:
    if path.is_dir():
        return [one for one in path.iterdir() if one.suffix in WEIGHT_SUFFIXES and one.is_file()]
    return [path] if path.is_file() else []


_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)


def sync(path: Path) -> None:
    """Ask the system to put a file or a folder's entries on the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems cannot do this for folders; files must be safe.
        if not (path.is_dir() and error.errno in _NO_SYNC):
            raise
    finally:
        os.close(handle)


def sync_tree(path: Path) -> None:
    """Put a file, or a folder and all in it, on the disk."""
    if path.is_dir():
        for entry in path.iterdir():
            sync_tree(entry)
    sync(path)
