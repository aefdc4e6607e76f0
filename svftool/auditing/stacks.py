"""Experts that a checkpoint holds one by one, under the names of the stacks they are loaded into.

transformers stacks the experts' matrices when it loads a checkpoint, and adapters trained on such a
model name the stacks: ``experts.gate_up_proj`` is, for each expert, the gate's rows and then those
of the up projection.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from svftool.checkpoints import TensorInfo

_EXPERT = re.compile(r"(?P<module>.+\.experts)\.(?P<index>\d+)\.(?P<part>\w+)\.weight")
_ROLES = {
    "gate_proj": "gate_proj", "w1": "gate_proj",
    "up_proj": "up_proj", "w3": "up_proj",
    "down_proj": "down_proj", "w2": "down_proj",
}  # fmt: skip
_MODULES = ((".block_sparse_moe.", ".mlp."),)


@dataclass(frozen=True)
class Piece:
    """What one tensor of the file is of a parameter of the model.

    Attributes
    ----------
    name : str
        The tensor of the file.
    expert : int or None
        Which matrix of a stack; None for the parameter itself.
    rows : slice
        Which rows of that matrix.
    """

    name: str
    expert: int | None = None
    rows: slice = field(default_factory=lambda: slice(None))


@dataclass(frozen=True)
class Stack:
    """A parameter of the model and the tensors of the file that it is made of."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def stacks(infos: Mapping[str, TensorInfo]) -> dict[str, Stack]:
    """Name the parameters that a checkpoint's tensors become where they are renamed or stacked.

    Parameters
    ----------
    infos : mapping of str to TensorInfo
        Tensors of the file.

    Returns
    -------
    dict of str to Stack
        By the parameter's name; names that the file has itself are left out.
    """
    experts: dict[str, dict[str, dict[int, TensorInfo]]] = {}
    found = {}
    for name, info in infos.items():
        match = _EXPERT.fullmatch(name)
        role = None if match is None else _ROLES.get(match["part"])
        if match is None or role is None or len(info.shape) != 2:
            found[_live(name)] = Stack(info.shape, (Piece(name),))
        else:
            own = experts.setdefault(_live(match["module"] + ".")[:-1], {})
            own.setdefault(role, {})[int(match["index"])] = info
    for module, roles in experts.items():
        for parameter, parts in _parameters(roles).items():
            stack = _stacked(parts)
            if stack is not None:
                found[f"{module}.{parameter}"] = stack
    return {name: stack for name, stack in found.items() if name not in infos}


def _live(name: str) -> str:
    for before, after in _MODULES:
        name = name.replace(before, after)
    return name


def _parameters(
    roles: Mapping[str, Mapping[int, TensorInfo]],
) -> dict[str, list[Mapping[int, TensorInfo]]]:
    joined = {"gate_proj", "up_proj"} <= set(roles)
    found = {role: [parts] for role, parts in roles.items() if role == "down_proj" or not joined}
    if joined:
        found["gate_up_proj"] = [roles["gate_proj"], roles["up_proj"]]
    return found


def _stacked(parts: list[Mapping[int, TensorInfo]]) -> Stack | None:
    """Stack the experts' matrices, one part on top of the other; None where they do not match."""
    count = len(parts[0])
    shapes = {info.shape for part in parts for info in part.values()}
    if len(shapes) != 1 or any(set(part) != set(range(count)) for part in parts):
        return None
    ((rows, columns),) = shapes
    pieces = tuple(
        Piece(part[expert].name, expert, slice(number * rows, (number + 1) * rows))
        for number, part in enumerate(parts)
        for expert in range(count)
    )
    return Stack((count, rows * len(parts), columns), pieces)
