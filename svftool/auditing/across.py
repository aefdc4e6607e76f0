"""The leading directions of all changes of a comparison, seen together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from svftool.auditing.alignment import align
from svftool.auditing.directional import ChangedMatrix, Directions, Side, Tokens
from svftool.auditing.edits import find_edits
from svftool.auditing.layout import output_axes
from svftool.auditing.results import Comparison, Row
from svftool.auditing.unembedding import Unembedding
from svftool.auditing.verdicts import SPECTRUM_ONLY
from svftool.checkpoints import TensorInfo

SIDES: tuple[Side, Side] = ("output", "input")


def directions_of(
    one: Comparison,
    infos: Mapping[str, TensorInfo],
    count: int,
    unembedding: Callable[[], Unembedding | None],
) -> Directions:
    """Hold the leading directions of a comparison's changes against each other.

    Parameters
    ----------
    one : Comparison
        Whose rows have their leading directions.
    infos : mapping of str to TensorInfo
        All tensors of the base.
    count : int
        Directions that were asked for.
    unembedding : callable
        Reads what turns a direction into tokens; None where there is nothing.
    """
    axes = output_axes(infos)
    places = tuple(place for row in one.matrices for place in _places(row, axes.get(row.name)))
    found = Directions(
        count,
        places,
        align(places),
        find_edits(places, {row.name: _matrices(row) for row in one.matrices}),
        tuple(row.name for row in one.matrices if row.changed and not row.leading),
    )
    rows = unembedding() if places else None
    return found if rows is None else _with_tokens(found, rows)


def _places(row: Row, outputs: str | None) -> Iterator[ChangedMatrix]:
    spectral = row.verdict is not None and row.verdict.name == SPECTRUM_ONLY
    for index, leading in enumerate(row.leading if row.changed else ()):
        yield ChangedMatrix(
            row.name,
            index if len(row.leading) > 1 else None,
            leading,
            "columns" if outputs == "columns" else "rows",
            spectral,
        )


def _matrices(row: Row) -> int:
    return row.matrix[0] if row.matrix is not None and len(row.matrix) == 3 else 1


def _with_tokens(found: Directions, rows: Unembedding) -> Directions:
    """Put in the nearest tokens of every direction that has the unembedding's width."""
    width = rows.weight.shape[1]
    places = [
        (place, side)
        for place in found.places
        for side in SIDES
        if place.directions(side).shape[1] == width
    ]
    spaces = [space for space in found.spaces if space.width == width]
    edits = [edit for edit in found.edits if edit.directions.shape[1] == width]
    asked = [
        *(place.directions(side)[0] for place, side in places),
        *(space.direction for space in spaces),
        *(direction for edit in edits for direction in edit.directions),
    ]
    if not asked:
        return found
    nearest = iter(_nearest(rows, asked))
    by_place: dict[tuple[str, int | None, str], Tokens] = {
        (place.name, place.index, side): next(nearest) for place, side in places
    }
    of_spaces = [
        replace(space, tokens=next(nearest)) if space.width == width else space
        for space in found.spaces
    ]
    of_edits = [
        replace(edit, tokens=tuple(next(nearest) for _ in edit.directions))
        if edit.directions.shape[1] == width
        else edit
        for edit in found.edits
    ]
    return replace(found, spaces=tuple(of_spaces), edits=tuple(of_edits), tokens=by_place)


def _nearest(rows: Unembedding, asked: Sequence[Tensor]) -> list[Tokens]:
    return rows.nearest(torch.stack([one.double() for one in asked]))
