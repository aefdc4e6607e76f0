"""Every error that svftool raises on purpose, with the exit code of the command line.

::

    SvftoolError                 1
    ├── UsageError               2   options that contradict each other, an existing output
    ├── CheckpointError          3   a checkpoint cannot be read, or is not the expected one
    ├── FactorsError             4   a factor checkpoint or tuned file does not fit
    ├── NumericalError           5   non-finite weights, a bound that cannot be met
    ├── DataError                6   images, labels or text of a data set
    ├── ModelError               7   a model cannot be built, or does not take the weights
    ├── ResourceError            8   memory, disk space or permission
    ├── MissingDependencyError   9   an optional package is not installed
    └── GateError               10   a threshold or policy of ``inspect`` tripped

Messages read ``<file>: <tensor or layer>: <found>, expected <what>`` and end with the way out.
"""

from __future__ import annotations

import errno
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar


class SvftoolError(Exception):
    """Base of all errors that name a cause the user can act on."""

    exit_code: ClassVar[int] = 1
    reported_elsewhere = False
    """Whether another process of the same command says it."""


class UsageError(SvftoolError):
    """Options or paths that cannot be used together."""

    exit_code = 2


class CheckpointError(SvftoolError):
    """A checkpoint that cannot be read or is not the expected one."""

    exit_code = 3


class UnchangedError(CheckpointError):
    """A fine-tune in which nothing differs from its base."""


class FactorsError(SvftoolError):
    """A factor checkpoint or tuned file that is broken or belongs to another base."""

    exit_code = 4


class NumericalError(SvftoolError):
    """Weights that are not finite, or an accuracy bound that cannot be met."""

    exit_code = 5


class DataError(SvftoolError):
    """A data set that cannot be read or does not hold what was asked for."""

    exit_code = 6


class ModelError(SvftoolError):
    """A model that cannot be built or does not take the weights."""

    exit_code = 7


class ResourceError(SvftoolError):
    """Not enough memory or disk space, or no permission."""

    exit_code = 8


class MissingDependencyError(SvftoolError):
    """An optional package that is not installed.

    Parameters
    ----------
    package : str
        Name of the package as it is imported.
    extra : str or None
        svftool's extra that installs it; None where it has none.
    purpose : str
        What needs the package, as the start of a sentence.
    """

    exit_code = 9

    def __init__(self, package: str, *, extra: str | None, purpose: str) -> None:
        wanted = package if extra is None else shlex.quote(f"{_source()}[{extra}]")
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed. "
            f"Install it with: pip install {wanted}"
        )
        self.package = package
        self.extra = extra


def _source() -> str:
    """Return what pip can install this package from again: its clone, or its name."""
    import json
    from importlib import metadata
    from urllib.parse import unquote, urlsplit

    clone = Path(__file__).parents[1]
    if (clone / "pyproject.toml").is_file():
        return str(clone)
    try:
        stated = metadata.distribution("svftool").read_text("direct_url.json")
        url = json.loads(stated or "{}").get("url", "")
    except (metadata.PackageNotFoundError, ValueError, AttributeError):
        return "svftool"
    folder = Path(unquote(urlsplit(url).path))
    return str(folder) if url.startswith("file:") and folder.is_dir() else "svftool"


class GateError(SvftoolError):
    """A threshold or policy of ``svftool inspect`` that was exceeded."""

    exit_code = 10


def shortlist(items: Iterable[object], limit: int = 10) -> str:
    """Join the first items with commas and count the rest.

    Examples
    --------
    >>> shortlist(["a", "b", "c"], limit=2)
    'a, b and 1 more'
    >>> shortlist(["a", "b"])
    'a, b'
    """
    texts = [str(item) for item in items]
    head = ", ".join(texts[:limit])
    return head if len(texts) <= limit else f"{head} and {len(texts) - limit} more"


_SINGULAR = {"matrices": "matrix"}
_OF_ONE = {"are": "is", "were": "was", "have": "has", "do": "does"}


def counted(count: int, things: str, verb: str = "", *, of: int | None = None) -> str:
    """Write a number of things, of one in the singular, and the verb that goes with it.

    Examples
    --------
    >>> counted(1, "images"), counted(0, "classes"), counted(1, "classes", "have")
    ('1 image', '0 classes', '1 class has')
    >>> counted(1, "layers", "are", of=12)
    '1 of 12 layers is'
    """
    among = count if of is None else of
    one = _SINGULAR.get(things) or things.removesuffix("es" if things.endswith("sses") else "s")
    said = f"{count} " if of is None else f"{count} of {of} "
    said += one if among == 1 else things
    return f"{said} {agreeing(count, verb)}" if verb else said


def agreeing(count: int, verb: str) -> str:
    """Return a verb as it goes with a number of things.

    Examples
    --------
    >>> agreeing(1, "are"), agreeing(1, "differ"), agreeing(2, "differ")
    ('is', 'differs', 'differ')
    """
    return _OF_ONE.get(verb, f"{verb}s") if count == 1 else verb


def brief(value: object, limit: int = 60) -> str:
    """Return a value out of somebody's file as an error line can hold it.

    Examples
    --------
    >>> brief("x" * 90, limit=8)
    "'xxxxxxx..."
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # longer or deeper than Python writes
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= limit else f"{text[:limit]}..."


def did_you_mean(name: str, names: Iterable[object]) -> str:
    """Say which of a closed set of names was probably meant; nothing where none is near.

    A name that contains what was written comes before one that is spelt alike.

    Examples
    --------
    >>> did_you_mean("drift", ["delta_norm", "weight_drift"])
    " Did you mean 'weight_drift'?"
    >>> did_you_mean("untouchd", ["untouched", "low rank"])
    " Did you mean 'untouched'?"
    >>> did_you_mean("xyz", ["untouched", "low rank"])
    ''
    """
    import difflib  # only an error needs it

    known = {str(one).casefold(): str(one) for one in names}
    plain = name[:200].strip().casefold().replace("-", "_")

    def likeness(other: str) -> float:
        return difflib.SequenceMatcher(None, plain, other.replace("-", "_")).ratio()

    ranked = sorted(known, key=likeness, reverse=True)
    inside = [one for one in ranked if len(plain) > 2 and plain in one.replace("-", "_")]
    near = inside or [one for one in ranked if likeness(one) >= _NEAR]
    return f" Did you mean {known[near[0]]!r}?" if near else ""


_NEAR = 0.6
"""Share of letters in common from which a name counts as misspelt."""


def no_such(what: str, name: str, names: Iterable[object]) -> str:
    """Return the message about a name that is none of a closed set.

    Examples
    --------
    >>> no_such("verdict", "lowrank", ["untouched", "low rank"])
    "verdict 'lowrank', expected one of untouched, low rank. Did you mean 'low rank'?"
    """
    listed = list(names)
    return (
        f"{what} {brief(name)}, expected one of {shortlist(listed, _LISTED)}."
        f"{did_you_mean(name, listed)}"
    )


_LISTED = 16
"""Names that a message lists."""


# Turning what the file system refuses into errors that name the file and the way out.


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
def kept_work(path: Path) -> Iterator[None]:
    """Raise FactorsError for whatever broken work of an interrupted run leads to.

    Raises
    ------
    FactorsError
    """
    try:
        yield
    except (SvftoolError, OSError):
        raise
    except Exception as error:  # it may hold anything, and is used everywhere
        reason = " ".join(str(error).split())[:200]
        raise FactorsError(
            f"{path}: the work of the interrupted run is broken ({type(error).__name__}: {reason})"
            ", expected it as it was left. Start anew without --resume."
        ) from error


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Raise ResourceError, naming `path`, for what the system refuses while writing there.

    Raises
    ------
    ResourceError
        For a full disk, a missing permission, a read-only file system, and whatever else it
        refuses.
    """
    try:
        yield
    except OSError as error:
        raise refused(error, path) from error


_OF_THE_NAME = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL,
    errno.EOVERFLOW, None,
}  # fmt: skip
"""What is wrong with a path or with a file's content, and not with the system."""


def system_fault(error: BaseException, path: object) -> None:
    """Raise ResourceError where the system, and not the file, is why it could not be read.

    Raises
    ------
    ResourceError
        For a disk with errors, a missing permission, too many open files ...

    Examples
    --------
    >>> system_fault(FileNotFoundError(errno.ENOENT, "No such file"), "x")
    >>> system_fault(ValueError("no number"), "x")
    """
    if isinstance(error, OSError) and error.errno not in _OF_THE_NAME:
        raise refused(error, path, reading=True) from error


def refused(error: OSError, path: object, *, reading: bool = False) -> ResourceError:
    """Return the error that says in one line what the system refused at `path`.

    Parameters
    ----------
    error : OSError
    path : object
        Named where the error names no file.
    reading : bool
        It was to be read, not written.

    Examples
    --------
    >>> str(refused(OSError(errno.ESTALE, "Stale file handle"), "out"))
    'out: Stale file handle (ESTALE), expected a place that can be written. Choose another place.'
    """
    named = error.filename if isinstance(error.filename, str) else path
    code = error.errno
    if code in _WAYS_OUT:
        found, expected = _WAYS_OUT[code]
        expected = expected.replace("to write. Choose", "to read. Choose") if reading else expected
    else:
        name = "" if code is None else f" ({errno.errorcode.get(code, code)})"
        found = f"{error.strerror or error}{name}"
        expected = "a place that can be written. Choose another place"
        if reading:
            expected = "a file that can be read. Try again, or copy it to another disk"
    return ResourceError(f"{named}: {found}, expected {expected}.")
