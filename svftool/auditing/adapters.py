"""What a LoRA adapter changes in a base: which tensors, and how each change is formed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from svftool.auditing.compare import Changes, Tuned
from svftool.auditing.matching import Matching, match_names, say_shapes
from svftool.auditing.results import Unread
from svftool.auditing.sources import Source
from svftool.auditing.stacks import Piece, Stack, stacks
from svftool.checkpoints import TensorInfo
from svftool.checkpoints.lora import LoraFolder
from svftool.checkpoints.lora_parameters import AdaptedParameter
from svftool.errors import CheckpointError, shortlist

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
    total : int
        Tensors that the adapter speaks of.
    notes : tuple of str
        How names were matched.
    """

    others: Mapping[str, str]
    changes: Mapping[str, Change]
    base_only: tuple[Unread, ...]
    tuned_only: tuple[Unread, ...]
    total: int
    notes: tuple[str, ...]


def adapter_changes(base: Source, lora: LoraFolder) -> AdapterChanges:
    """Find what an adapter changes in a base.

    Parameters
    ----------
    base : Source
        Dense tensors.
    lora : LoraFolder
        The adapter.

    Raises
    ------
    CheckpointError
        If none of the adapter's layers is in the base, or one does not fit.
    """
    live = stacks(base.infos)
    shapes = {name: info.shape for name, info in base.infos.items()}
    shapes |= {name: stack.shape for name, stack in live.items()}
    matching = _matched(base, lora, shapes)
    found = {pair.tuned: pair.base for pair in matching.pairs}
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
    misshapen = list(_misshapen(lora, others, base.infos))
    for name, _, _ in misshapen:
        del others[name]
    return AdapterChanges(
        others=others,
        changes=changes,
        base_only=tuple(Unread(name, why) for name, _, why in misshapen),
        tuned_only=(
            *(Unread(name, "not in the base") for name in _strangers(lora, found)),
            *(Unread(name, "part of no LoRA layer") for name in lora.unused),
            *(Unread(mine, why) for _, mine, why in misshapen),
        ),
        total=_count(lora),
        notes=matching.notes,
    )


def _matched(base: Source, lora: LoraFolder, names: Mapping[str, object]) -> Matching:
    parameters = [name for module in lora.wrapped for name in module.parameters]
    wanted = dict.fromkeys((*lora.layers, *lora.biases, *lora.whole, *parameters))
    matching = match_names(_shapeless(names), _shapeless(wanted))
    adapted = {*lora.layers, *parameters}
    if not any(pair.tuned in adapted for pair in matching.pairs):
        raise CheckpointError(
            f"{lora.path}: none of the adapter's {_count(lora)} layers is in {base.path} "
            f"({shortlist(sorted(adapted), 2)}), expected the adapter's base"
            + (f" {lora.base!r}." if lora.base else ".")
        )
    return matching


def _shapeless(names: Mapping[str, object]) -> dict[str, TensorInfo]:
    return {name: replace(_ANY, name=name) for name in names}


def _pieces(name: str, live: Mapping[str, Stack]) -> tuple[Piece, ...]:
    return live[name].pieces if name in live else (Piece(name),)


def _change(
    lora: LoraFolder,
    mine: str,
    piece: Piece,
    parameter: AdaptedParameter | None,
    shape: tuple[int, ...],
) -> Change | None:
    """Return what forms the change of one tensor; None where the adapter has none of it."""
    if parameter is not None:
        return partial(_parameter_change, lora, parameter, piece, stacked=len(shape) == 3)
    if mine in lora.layers or mine in lora.biases:
        return partial(_layer_change, lora, mine)
    return None


def _layer_change(lora: LoraFolder, name: str, base: Tensor) -> Tuned:
    return Tuned(change=lora.change(name, base))


def _parameter_change(
    lora: LoraFolder, parameter: AdaptedParameter, piece: Piece, base: Tensor, *, stacked: bool
) -> Tuned:
    if piece.expert is not None:
        return Tuned(change=lora.change_of(parameter, piece.expert)[piece.rows])
    if stacked:
        return Tuned(change=Changes(len(base), partial(lora.change_of, parameter)))
    return Tuned(change=lora.change_of(parameter))


def _misshapen(
    lora: LoraFolder, others: Mapping[str, str], infos: Mapping[str, TensorInfo]
) -> Iterator[tuple[str, str, str]]:
    """Yield what is stored whole in another shape: its names on both sides, and the reason."""
    for name, mine in others.items():
        if mine in lora.whole:
            before, after = infos[name].shape, lora.info(lora.whole[mine]).shape
            if before != after:
                yield name, mine, say_shapes(before, after)


def _strangers(lora: LoraFolder, found: Mapping[str, str]) -> Iterator[str]:
    """Yield what the base does not have."""
    for name in (*lora.layers, *lora.biases, *lora.whole):
        if name not in found:
            yield name
    for module in lora.wrapped:
        if not any(name in found for name in module.parameters):
            yield from module.parameters


def _count(lora: LoraFolder) -> int:
    wrapped = sum(len(module.pairs) for module in lora.wrapped)
    return len({*lora.layers, *lora.biases, *lora.whole}) + wrapped + len(lora.unused)
