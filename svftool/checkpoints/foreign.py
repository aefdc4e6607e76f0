"""Saying what a file that is no checkpoint seems to be."""

from __future__ import annotations

_STARTS: tuple[tuple[bytes, str], ...] = (
    (b"version ", "the file is a Git LFS pointer (git lfs pull fetches the weights)"),
    (b"PK\x03\x04", "the file is a zip archive, as torch writes under other suffixes"),
    (b"\x80\x02", "the file is a pickle, as torch writes under other suffixes"),
    (b"GGUF", "the file is in GGUF format"),
    (b"\x89HDF", "the file is in HDF5 format"),
    (b"\x93NUMPY", "the file is a NumPy array"),
    (b"\x1f\x8b", "the file is compressed with gzip"),
)
_PAGES = (b"<!doc", b"<html", b"<?xml", b"<head")


def describe_start(start: bytes) -> str:
    """Return what a file seems to be, judged by its first bytes (eight or more).

    Examples
    --------
    >>> describe_start(b"GGUF....")
    'the file is in GGUF format'
    >>> describe_start(b"hello there")
    "the file starts with b'hello th'"
    """
    if not start:
        return "the file is empty"
    if start.lstrip().lower().startswith(_PAGES):
        return "the file is a web page"
    known = (what for magic, what in _STARTS if start.startswith(magic))
    return next(known, f"the file starts with {start[:8]!r}")


def is_described(start: bytes) -> bool:
    """Tell whether `describe_start` knows more than the bytes themselves."""
    return "starts with" not in describe_start(start)
