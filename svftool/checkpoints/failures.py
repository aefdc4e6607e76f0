"""Turning what the file system refuses into errors that name the file and the way out."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from svftool.errors import ResourceError

_WAYS_OUT = {
    errno.ENOSPC: (
        "no space left",
        "enough free space on the disk. Free some, or choose another disk",
    ),
    errno.EDQUOT: (
        "the disk quota is used up",
        "room in the quota. Free some, or choose another disk",
    ),
    errno.EFBIG: ("the file system does not take files of this size", "room. Choose another disk"),
    errno.EACCES: (
        "no permission",
        "permission to write. Choose another place, or change the permissions",
    ),
    errno.EPERM: (
        "no permission",
        "permission to write. Choose another place, or change the permissions",
    ),
    errno.EROFS: ("the file system is read-only", "a writable one. Choose another place"),
    errno.EMFILE: ("too many open files", "a higher limit. Raise it with ulimit -n"),
    errno.ENFILE: ("too many open files", "a higher limit. Close other programs"),
    errno.ENOMEM: ("no memory left", "more memory. Close other programs"),
    errno.ENAMETOOLONG: ("the name is too long", "a shorter one. Choose another name"),
    errno.EIO: ("the disk reports an input or output error", "a sound disk. Choose another disk"),
}


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Raise ResourceError, naming `path`, for what the system refuses while writing there.

    Raises
    ------
    ResourceError
        For a full disk, a missing permission, a read-only file system and the like.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _WAYS_OUT:
            raise
        found, expected = _WAYS_OUT[error.errno]
        named = error.filename if isinstance(error.filename, str) else path
        raise ResourceError(f"{named}: {found}, expected {expected}.") from error
