"""What a LoRA adapter changes in a base: which tensors, and how each change is formed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from svftool.adapters.adapter import Adapter
from svftool.adapters.live_names import live_names
from svftool.adapters.peft_parameters import AdaptedParameter
from svftool.auditing.compare import Changes, Tuned
from svftool.auditing.matching import Matching, match_names, say_shapes
from svftool.auditing.results import Shape, Unread
from svftool.auditing.sources import AuditSource
from svftool.auditing.tying import Tying, is_tied_copy, refuse_tied_heads, tied_heads, tying_of
from svftool.checkpoints import TensorInfo
from svftool.errors import CheckpointError, shortlist

# Experts that a checkpoint holds one by one, under the names of the stacks they are loaded into.


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


Change = Callable[[Tensor], Tuned]

_ANY = TensorInfo("", torch.float32, (), "")


@dataclass(frozen=True)
class AdapterChanges:
    """An adapter seen from its base.

    Attributes
    ----------
    others : mapping of str to str
        What the adapter calls it, by name in the base.
    changes : mapping of str to callable
        Forms the change from the base's tensor, by name in the base; what is in `others` alone is
        stored whole.
    base_only, tuned_only : tuple of Unread
        What cannot be compared, with the reason.
    misshapen : mapping of str to str
        What the adapter calls a tensor that it stores in another shape, by name in the base.
    total : int
        Tensors that the adapter speaks of.
    notes : tuple of str
        How names were matched.
    adapter : Adapter
        The adapter, whose names are those of the base where they had to be resolved.
    tying : Tying
        What becomes of a head that is tied to an embedding.
    """

    others: Mapping[str, str]
    changes: Mapping[str, Change]
    base_only: tuple[Unread, ...]
    tuned_only: tuple[Unread, ...]
    misshapen: Mapping[str, str]
    total: int
    notes: tuple[str, ...]
    adapter: Adapter
    tying: Tying


def adapter_changes(base: AuditSource, lora: Adapter) -> AdapterChanges:
    """Find what an adapter changes in a base.

    Parameters
    ----------
    base : AuditSource
        Dense tensors.
    lora : Adapter
        The adapter.

    Raises
    ------
    CheckpointError
        If none of the adapter's layers is in the base, or one does not fit.
    """
    if lora.moved_base:
        raise CheckpointError(
            f"{lora.path}: init_lora_weights changed the base before training, expected an "
            "adapter of the base as it is. Convert the adapter with PEFT "
            "(path_initial_model_for_weight_conversion), or merge it and use the result."
        )
    lora = lora.against(base.infos, base.config or {}, str(base.path))
    live = stacks(base.infos)
    shapes = {name: info.shape for name, info in base.infos.items()}
    shapes |= {name: stack.shape for name, stack in live.items()}
    matching = _matched(lora, shapes)
    if any(name in lora.layers or name in lora.rows for name in matching.tuned_only):
        # PEFT saves the names of the live model, which transformers may have renamed on loading.
        renamed = live_names(base.infos, base.config).names
        live |= {
            now: Stack(base.infos[name].shape, (Piece(name),))
            for name, now in renamed.items()
            if now not in shapes
        }
        shapes |= {now: live[now].shape for now in renamed.values()}
        matching = _matched(lora, shapes) if renamed else matching
    _check_matched(base, lora, matching)
    found = {pair.tuned: pair.base for pair in matching.pairs}
    tied = tied_heads(base)
    refuse_tied_heads(base, lora, found, tied)
    placed = lora.place(
        {mine: shapes[name] for mine, name in found.items()},
        None if base.config is None else base.config.get("model_type"),
    )
    others: dict[str, str] = {}
    changes: dict[str, Change] = {}
    for mine, name in found.items():
        for piece in _pieces(name, live):
            change = _change(lora, mine, piece, placed.get(mine), shapes[name])
            if change is not None:
                changes[piece.name] = change
            if change is not None or mine in lora.whole:
                others[piece.name] = mine
    _tie(tied, others, changes)
    misshapen = list(_misshapen(lora, others, base.infos))
    for name, _, _ in misshapen:
        del others[name]
    return AdapterChanges(
        others=others,
        changes=changes,
        base_only=tuple(_unread(name, two) for name, _, two in misshapen),
        tuned_only=(
            *(
                Unread(name, "not in the base")
                if name not in lora.whole or name in lora.listed
                else Unread(lora.whole[name], "part of no LoRA layer")
                for name in _strangers(lora, found)
            ),
            *(Unread(name, "not in the base") for name in lora.homeless),
            *(Unread(name, "part of no LoRA layer") for name in lora.unused),
            *(_unread(mine, two) for _, mine, two in misshapen),
        ),
        misshapen={name: mine for name, mine, _ in misshapen},
        total=_count(lora),
        notes=matching.notes,
        adapter=lora,
        tying=tying_of(base, lora, found),
    )


def _matched(lora: Adapter, names: Mapping[str, object]) -> Matching:
    return match_names(_shapeless(names), _shapeless(dict.fromkeys(_wanted(lora))))


def _wanted(lora: Adapter) -> Iterator[str]:
    yield from (*lora.layers, *lora.biases, *lora.rows, *lora.whole)
    for module in lora.wrapped:
        yield from module.parameters


def _check_matched(base: AuditSource, lora: Adapter, matching: Matching) -> None:
    """Refuse names that fit in two ways, and an adapter of which nothing is in the base."""
    parameters = [name for module in lora.wrapped for name in module.parameters]
    adapted = {*lora.layers, *lora.rows, *parameters}
    if matching.ties:
        raise CheckpointError(
            f"{lora.path}: of its names and those of {base.path}, {matching.say_tie()}. "
            "Name the adapter's layers as the base does."
        )
    if not any(pair.tuned in adapted for pair in matching.pairs):
        raise CheckpointError(
            f"{lora.path}: none of the adapter's {_count(lora)} layers is in {base.path} "
            f"({shortlist(sorted(adapted), 2)}), expected the adapter's base"
            + (f" {lora.base!r}." if lora.base else ".")
        )


def _shapeless(names: Mapping[str, object]) -> dict[str, TensorInfo]:
    return {name: replace(_ANY, name=name) for name in names}


def _pieces(name: str, live: Mapping[str, Stack]) -> tuple[Piece, ...]:
    return live[name].pieces if name in live else (Piece(name),)


def _change(
    lora: Adapter,
    mine: str,
    piece: Piece,
    parameter: AdaptedParameter | None,
    shape: tuple[int, ...],
) -> Change | None:
    """Return what forms the change of one tensor; None where the adapter has none of it."""
    if parameter is not None:
        return partial(_parameter_change, lora, parameter, piece, stacked=len(shape) == 3)
    if mine in lora.layers or mine in lora.biases:
        lora.check(mine, shape)
        return partial(_layer_change, lora, mine)
    if mine in lora.rows:
        lora.check(mine, shape)
        return partial(_token_rows, lora, mine)
    return None


def _tie(tied: Mapping[str, list[str]], others: dict[str, str], changes: dict[str, Change]) -> None:
    """Change an output head with its embedding where the model ties them; PEFT's merge does."""
    for head, tables in tied.items():
        table = next((name for name in tables if name in changes), None)
        if table is not None and head not in others:
            others[head], changes[head] = others[table], changes[table]


def _token_rows(lora: Adapter, name: str, base: Tensor) -> Tuned:
    return Tuned(weight=lora.tokens(name, base))


def _layer_change(lora: Adapter, name: str, base: Tensor) -> Tuned:
    return Tuned(change=lora.change(name, base))


def _parameter_change(
    lora: Adapter, parameter: AdaptedParameter, piece: Piece, base: Tensor, *, stacked: bool
) -> Tuned:
    if piece.expert is not None:
        return Tuned(change=lora.change_of(parameter, piece.expert)[piece.rows])
    if stacked:
        return Tuned(change=Changes(len(base), partial(lora.change_of, parameter)))
    return Tuned(change=lora.change_of(parameter))


def _misshapen(
    lora: Adapter, others: Mapping[str, str], infos: Mapping[str, TensorInfo]
) -> Iterator[tuple[str, str, tuple[Shape, Shape]]]:
    """Yield what is stored whole in another shape: its names and shapes on both sides."""
    for name, mine in others.items():
        if mine in lora.whole:
            before, after = infos[name].shape, lora.info(lora.whole[mine]).shape
            if before != after:
                yield name, mine, (before, after)


def _unread(name: str, shapes: tuple[Shape, Shape]) -> Unread:
    return Unread(name, say_shapes(*shapes), shapes=shapes)


def _strangers(lora: Adapter, found: Mapping[str, str]) -> Iterator[str]:
    """Yield what the base does not have."""
    for name in dict.fromkeys((*lora.layers, *lora.biases, *lora.rows, *lora.whole)):
        if name not in found and not is_tied_copy(lora, name, found):
            yield name
    for module in lora.wrapped:
        if not any(name in found for name in module.parameters):
            yield from module.parameters


def _count(lora: Adapter) -> int:
    wrapped = sum(len(module.pairs) for module in lora.wrapped)
    return (
        len({*lora.layers, *lora.biases, *lora.rows, *lora.whole})
        + wrapped
        + len(lora.unused)
        + len(lora.homeless)
    )
