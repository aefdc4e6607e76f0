"""Which tensors are decomposed, under which view, and why the others are left whole."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from svftool.checkpoints.base import TensorInfo
from svftool.checkpoints.dtypes import DECOMPOSABLE, FLOAT8
from svftool.checkpoints.roles import (
    QUANTISATION,
    is_expert_stack,
    output_heads,
    table_role,
)
from svftool.checkpoints.views import View, matrix_shape
from svftool.errors import UsageError


@dataclass(frozen=True)
class Selection:
    """What the user asked for: patterns on tensor names as they are in the file.

    Attributes
    ----------
    include : tuple of str
        Where given, only what matches is decomposed, embeddings and heads too.
    exclude : tuple of str
        What matches is left whole.
    views : tuple of (str, View)
        Views by pattern; the last that matches counts.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    views: tuple[tuple[str, View], ...] = ()


@dataclass(frozen=True)
class Choice:
    """A tensor to decompose, and how it is seen as a matrix."""

    name: str
    view: View


@dataclass(frozen=True)
class LeftWhole:
    """A tensor that stays as it is, and why."""

    name: str
    reason: str


def select(
    infos: Mapping[str, TensorInfo],
    selection: Selection,
    *,
    config: Mapping[str, Any] | None = None,
) -> tuple[list[Choice], list[LeftWhole]]:
    """Decide for every tensor whether it is decomposed.

    Parameters
    ----------
    infos : mapping of str to TensorInfo
        All tensors of the checkpoint.
    selection : Selection
    config : mapping, optional
        ``config.json``, for the number of experts.

    Returns
    -------
    chosen : list of Choice
    whole : list of LeftWhole
        Together every tensor, each list in the order of `infos`.

    Raises
    ------
    UsageError
        If a pattern matches no tensor, or asks for stacks where nothing is 3-D.
    """
    check_patterns(
        (*selection.include, *selection.exclude, *(glob for glob, _ in selection.views)), infos
    )
    _check_views(selection.views, infos)
    heads = output_heads(infos.values())
    chosen: list[Choice] = []
    whole: list[LeftWhole] = []
    for name, info in infos.items():
        view = _view(info, selection.views, config)
        reason = _reason(info, view, selection, heads)
        if reason is None:
            chosen.append(Choice(name, view))
        else:
            whole.append(LeftWhole(name, reason))
    return chosen, whole


def matches(name: str, patterns: Iterable[str]) -> str | None:
    """Return the first pattern that matches a name, or None.

    Examples
    --------
    >>> matches("layer1.conv.weight", ["fc*", "layer?.*"])
    'layer?.*'
    """
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)


def check_patterns(patterns: Iterable[str], names: Iterable[str]) -> None:
    """Refuse patterns that match nothing.

    Raises
    ------
    UsageError
        Naming the pattern and the closest names there are.
    """
    known = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise UsageError(
                f"pattern {pattern!r} matches none of {len(known)} tensors, expected names such as "
                f"{_closest(pattern, known)}. A pattern is for whole names: * stands for any part."
            )


def _closest(pattern: str, names: Sequence[str]) -> str:
    plain = pattern.strip("*")
    inside = [name for name in names if plain and plain in name]
    close = inside or difflib.get_close_matches(plain, names, n=3, cutoff=0.3) or names
    return ", ".join(close[:3])


def _check_views(views: Sequence[tuple[str, View]], infos: Mapping[str, TensorInfo]) -> None:
    for pattern, view in views:
        if view == "batch" and not any(
            len(info.shape) == 3 and fnmatchcase(name, pattern) for name, info in infos.items()
        ):
            raise UsageError(
                f"view {pattern}=batch matches no tensor of three dimensions, "
                "expected stacks of matrices (E, m, n)"
            )


def _view(
    info: TensorInfo, views: Sequence[tuple[str, View]], config: Mapping[str, Any] | None
) -> View:
    asked = next(
        (view for pattern, view in reversed(views) if fnmatchcase(info.name, pattern)), None
    )
    if asked == "matrix" or (asked is None and not is_expert_stack(info, config)):
        return "matrix"
    return "batch" if len(info.shape) == 3 else "matrix"


def _reason(
    info: TensorInfo, view: View, selection: Selection, heads: frozenset[str]
) -> str | None:
    """Return why a tensor is left whole, or None if it is decomposed."""
    excluded = matches(info.name, selection.exclude)
    if excluded is not None:
        return f"excluded by --exclude {excluded}"
    impossible = _impossible(info, view)
    if impossible is not None:
        return impossible
    if selection.include:
        return None if matches(info.name, selection.include) else "not matched by --include"
    return _by_default(info, heads)


def _impossible(info: TensorInfo, view: View) -> str | None:
    """Return what makes a decomposition impossible or pointless, whatever was asked for."""
    if info.layout != "dense":
        return f"{info.layout} storage"
    if info.dtype not in DECOMPOSABLE:
        packed = table_role(info) == QUANTISATION or info.dtype.is_floating_point
        return QUANTISATION if packed else "not floating point"
    if info.numel == 0:
        return "empty"
    if len(info.shape) < 2:
        return "fewer than two dimensions"
    return "one side of the matrix is 1" if 1 in matrix_shape(info.shape, view)[-2:] else None


def _by_default(info: TensorInfo, heads: frozenset[str]) -> str | None:
    if info.dtype in FLOAT8:
        return "float8 values of a quantised layer"
    if info.name in heads:
        return "output head"
    return table_role(info)
