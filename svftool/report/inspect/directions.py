"""The leading directions of changes: the finding in words, a table, a document and tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from rich.text import Text
from torch import Tensor

from svftool.auditing import ChangedMatrix, Comparison, Directions, Edit, SharedSpace, Tokens
from svftool.checkpoints import SafetensorsWriter
from svftool.report import json
from svftool.report.text import number, plain_table, safe

MOST_SPACES = 8
"""Spaces that are shown; the document has all."""

MOST_ENDS = 4
"""Directions of an edit whose tokens are shown."""

TELLING = 0.01
"""Adjusted chance below which directions are said to agree."""

_TINY = -30.0


def finding(edit: Edit) -> str:
    """Say what was done along the directions of an edit, and where.

    Parameters
    ----------
    edit : Edit

    Returns
    -------
    str
        Such as "one output direction removed from 24 of 24 matrices (layers.*.mlp.down_proj)".
    """
    count, members = len(edit.directions), len(edit.members)
    what = f"one {edit.side} direction" if count == 1 else f"{count} {edit.side} directions"
    if edit.axis is not None:
        what += f" (coordinate {edit.axis} alone)"
    where = f"of {edit.of} {'matrix' if edit.of == 1 else 'matrices'}"
    kinds = ", ".join(_short(kind) for kind in edit.kinds)
    if edit.removed == members:
        done = f"removed from {members} {where}"
    elif edit.removed:
        rest = f"scaled by {_range(edit)} in {members - edit.removed} more"
        done = f"removed from {edit.removed} and {rest} {where}"
    else:
        done = f"scaled by {_range(edit)} in {members} {where}"
    if edit.each is not None:
        done += ", each in one" if edit.each == 1 else f", each in {edit.each}"
    return f"{what} {done} ({safe(kinds)})"


def _range(edit: Edit) -> str:
    """Say what is left along the direction where it was not removed."""
    left = sorted(edit.kept)
    if edit.removed:
        left = sorted(left, key=abs)[edit.removed :]
        left.sort()
    low, high = (f"{value:.2f}" for value in (left[0], left[-1]))
    return low if low == high else f"{low} to {high}"


def _short(kind: str) -> str:
    return kind.removesuffix(".weight").rpartition("*.")[2] or kind


def chance(log_p: float) -> str:
    """Write a chance that is given by its natural logarithm."""
    power = log_p / math.log(10.0)
    return "< 1e-30" if power < _TINY else f"{10.0**power:.2g}"


# For people.


def directions(found: Directions) -> Iterator[RenderableType]:
    """Draw the edits, and the spaces whose leading directions were held against each other."""
    count = found.count
    yield Text("directions", "bold").append(
        f" (the leading {count} of each change; {len(found.places)} changed matrices)", "not bold"
    )
    for edit in found.edits:
        yield Text("directional edit", "bold red").append(f": {finding(edit)}", "default not bold")
        yield Text(f"    {_about(edit)}", "dim")
        for tokens in edit.tokens[:MOST_ENDS]:
            yield Text(f"    nearest tokens: {_ends(tokens)}", "dim")
    if found.spaces:
        yield _table(found.spaces)
        for one in found.spaces[:MOST_SPACES]:
            if _told(one) and one.tokens is not None and not _explained(one, found.edits):
                where = f"{one.side}s of width {one.width}"
                yield Text(f"{where}: nearest tokens {_ends(one.tokens)}", "dim")
        yield Text(_LEGEND, "dim")
    elif not found.edits:
        yield Text(
            "none was edited, and no two matrices have outputs or inputs of one width", "dim"
        )
    if found.left_out:
        named = f"{safe(found.left_out[0])}{' ...' if len(found.left_out) > 1 else ''}"
        yield Text(
            f"{len(found.left_out)} changed matrices are known by their singular values alone "
            f"({named})",
            "dim",
        )


_LEGEND = (
    "agreement: mean squared cosine of the leading directions with the one nearest to all; chance: "
    "that directions drawn at random agree so well, corrected for the number of lines"
)


def _about(edit: Edit) -> str:
    rest = "removed" if edit.removed == len(edit.members) else "scaled"
    return (
        f"what was {rest} is {edit.share:.0%} of the change of these matrices; chance that random "
        f"directions agree so: {chance(edit.log_p)}"
    )


def _table(spaces: Sequence[SharedSpace]) -> RenderableType:
    table = plain_table()
    table.add_column("leading directions", no_wrap=True)
    for title in ("width", "matrices", "agreement", "at random", "chance"):
        table.add_column(title, justify="right", no_wrap=True)
    for one in spaces[:MOST_SPACES]:
        table.add_row(
            f"{one.side}s",
            str(one.width),
            str(one.matrices),
            Text(number(one.alignment), "bold" if _told(one) else ""),
            Text(number(one.by_chance), "dim"),
            Text(chance(one.log_adjusted)),
        )
    return table


def _told(one: SharedSpace) -> bool:
    return one.log_adjusted < math.log(TELLING)


def _explained(one: SharedSpace, edits: Sequence[Edit]) -> bool:
    """Whether a space's directions agree because of an edit, which says the same tokens."""
    return any(
        edit.directions.shape[1] == one.width
        and float((edit.directions.double() @ one.direction).square().max()) > _SAME
        for edit in edits
    )


_SAME = 0.9


def _ends(tokens: Tokens) -> str:
    return " | ".join(
        " ".join(_token(one.id, one.text) for one in end) for end in (tokens.along, tokens.against)
    )


def _token(index: int, text: str | None) -> str:
    return f"#{index}" if text is None else repr(safe(text))


# For the page.


def section(found: Directions | None) -> dict[str, Any] | None:
    """Return what a page shows of the directions; None where there is nothing."""
    if found is None:
        return None
    return {
        "edits": [
            (finding(edit), _about(edit), [_ends(tokens) for tokens in edit.tokens[:MOST_ENDS]])
            for edit in found.edits
        ],
        "spaces": [
            {
                "side": f"{one.side}s",
                "width": one.width,
                "matrices": one.matrices,
                "alignment": number(one.alignment),
                "by_chance": number(one.by_chance),
                "chance": chance(one.log_adjusted),
                "tokens": "" if one.tokens is None or not _told(one) else _ends(one.tokens),
            }
            for one in found.spaces[:MOST_SPACES]
        ],
        "legend": _LEGEND,
        "count": found.count,
    }


# For scripts.


def document(found: Directions | None) -> dict[str, Any] | None:
    """Return what is found for scripts; None where directions were not asked for."""
    if found is None:
        return None
    return {
        "count": found.count,
        "edits": [_edit(one) for one in found.edits],
        "spaces": [_space(one) for one in found.spaces],
        "matrices": [_place(one, found) for one in found.places],
        "left_out": found.left_out,
    }


def _edit(one: Edit) -> dict[str, Any]:
    return {
        "finding": finding(one),
        "side": one.side,
        "width": one.directions.shape[1],
        "count": len(one.directions),
        "matrices": [
            {"name": name, "index": index, "kept": kept}
            for (name, index), kept in zip(one.members, one.kept, strict=True)
        ],
        "of": one.of,
        "kinds": one.kinds,
        "removed": one.removed,
        "share": one.share,
        **_chances(one.log_p),
        "coordinate": one.axis,
        "each": one.each,
        "tokens": [_tokens(tokens) for tokens in one.tokens],
    }


def _space(one: SharedSpace) -> dict[str, Any]:
    return {
        "side": one.side,
        "width": one.width,
        "matrices": one.matrices,
        "alignment": one.alignment,
        "by_chance": one.by_chance,
        **_chances(one.log_p),
        "adjusted_p_value": math.exp(one.log_adjusted),
        "tokens": _tokens(one.tokens),
    }


def _chances(log_p: float) -> dict[str, float]:
    return {"p_value": math.exp(log_p), "log10_p": log_p / math.log(10.0)}


def _place(one: ChangedMatrix, found: Directions) -> dict[str, Any]:
    leading = one.leading
    return {
        "name": one.name,
        "index": one.index,
        "values": leading.sizes,
        "shares": leading.shares,
        "above_noise": leading.above,
        "output_axis": one.outputs,
        **{
            side: {
                "width": one.directions(side).shape[1],
                "kept": one.scaling(side).kept,
                "unexplained": one.scaling(side).off,
                "tokens": _tokens(found.tokens.get((one.name, one.index, side))),
            }
            for side in _SIDES
        },
    }


_SIDES: tuple[Any, Any] = ("output", "input")


def _tokens(tokens: Tokens | None) -> dict[str, Any] | None:
    if tokens is None:
        return None
    return {
        end: [{"id": one.id, "text": one.text, "cosine": one.cosine} for one in listed]
        for end, listed in (("along", tokens.along), ("against", tokens.against))
    }


# As tensors.


def tensors(one: Comparison) -> dict[str, Tensor]:
    """Return the directions themselves, as they are saved.

    Returns
    -------
    dict of str to Tensor
        ``NAME.output`` (K, out) and ``NAME.input`` (K, in) in float32, ``NAME.values`` (K,) in
        float64, with E before K for a batch of E matrices: the change is about
        ``output' diag(values) input``, or its transpose where the weight is (in, out). The shared
        directions of each edit are ``edits.I.directions`` (k, width).
    """
    found = one.directions
    groups: dict[str, list[ChangedMatrix]] = {}
    for place in () if found is None else found.places:
        groups.setdefault(place.name, []).append(place)
    held: dict[str, Tensor] = {}
    for name, places in groups.items():
        parts = {side: [place.directions(side) for place in places] for side in _SIDES}
        values = [torch.tensor(place.leading.sizes, dtype=torch.float64) for place in places]
        batch = places[0].index is not None
        for key, listed in {**parts, "values": values}.items():
            held[f"{name}.{key}"] = torch.stack(listed) if batch else listed[0]
    for index, edit in enumerate(() if found is None else found.edits):
        held[f"edits.{index}.directions"] = edit.directions.float()
    return held


def save(one: Comparison, path: Path) -> None:
    """Write the directions of a comparison as safetensors."""
    held = tensors(one)
    found = one.directions
    about = {
        "schema_version": 1,
        "directions": 0 if found is None else found.count,
        "base": one.base.name,
        "tuned": None if one.tuned is None else one.tuned.name,
        "turned": [
            place.name
            for place in (() if found is None else found.places)
            if place.outputs == "columns" and not place.index
        ],
        "edits": [finding(edit) for edit in (() if found is None else found.edits)],
    }
    layout = {name: (value.dtype, tuple(value.shape)) for name, value in held.items()}
    with SafetensorsWriter(path, layout, metadata={"svftool": json.to_json(about)}) as writer:
        for name, value in held.items():
            writer.write(name, value)
