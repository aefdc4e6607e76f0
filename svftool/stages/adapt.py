"""Adapters where tuned files go: into a merge, or onto a live model.

Every use takes the same thing from an adapter: what it changes in a base, a tensor at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svftool import attaching
from svftool.adapters.adapter import Adapter
from svftool.adapters.layout_file import is_adapter, open_adapter
from svftool.auditing.adapters import Change, adapter_changes
from svftool.auditing.sources import AuditSource
from svftool.checkpoints import Checkpoint, TensorInfo
from svftool.errors import (
    CheckpointError,
    FactorsError,
    ModelError,
    NumericalError,
    UsageError,
    counted,
    shortlist,
)
from svftool.factors import FactorStore, TunedFile
from svftool.factors.mixture import Expert
from svftool.numerics.rounding import beyond, round_once
from svftool.progress import SILENT, Progress

_BEFORE = "_svf_before_adapter"
"""Where a live model keeps what an adapter replaced."""

Weighted = str | os.PathLike[str] | tuple[str | os.PathLike[str], float]


@dataclass(frozen=True)
class Fitted:
    """An adapter as a part of a mixture over one base.

    Attributes
    ----------
    expert : Expert
    dropped : mapping of str to int
        What of the adapter has no place in the base, with its bytes.
    warnings : tuple of str
        What the user must know of a head that is tied to the embedding.
    notes : tuple of str
    """

    expert: Expert
    dropped: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class _Stored(Mapping[str, Tensor]):
    """Tensors that a merge stores whole, read when they are asked for."""

    def __init__(self, reads: Mapping[str, Callable[[], Tensor]]) -> None:
        self._reads = reads

    def __getitem__(self, name: str) -> Tensor:
        return self._reads[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._reads)

    def __len__(self) -> int:
        return len(self._reads)


def base_of(source: Checkpoint | FactorStore) -> AuditSource:
    """Return a base as adapters look at it."""
    if isinstance(source, Checkpoint):
        infos, config = source.infos, source.config
        return _seen(source.path, infos, source.read, config)
    infos = {name: source.info(name) for name in (*source.layers, *source.whole)}

    def read(name: str) -> Tensor:
        raise FactorsError(
            f"{source.path}: an adapter changes weights, expected those of the base ({name!r}). "
            "Merge without --without-base."
        )

    return _seen(source.path, infos, read, None)


def _seen(
    path: Path,
    infos: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    config: Mapping[str, Any] | None,
) -> AuditSource:
    def fingerprint(progress: Progress) -> str:
        return ""

    return AuditSource(path, "checkpoint", infos, read, fingerprint, config=config)


def fit_adapter(base: AuditSource, adapter: Adapter, weight: float = 1.0) -> Fitted:
    """Find what an adapter changes in a base.

    Parameters
    ----------
    base : AuditSource
    adapter : Adapter
        Open for as long as the result is used.
    weight : float

    Raises
    ------
    CheckpointError
        If it does not fit the base, or is not understood as a whole.
    """
    if adapter.unused:
        raise CheckpointError(
            f"{adapter.path}: {counted(len(adapter.unused), 'tensors', 'are')} understood in no "
            f"way ({shortlist(adapter.unused, 3)}), expected an adapter of layers. Merge it with "
            "the program that made it."
        )
    found = adapter_changes(base, adapter)
    bound = found.adapter
    changes = {name: partial(_formed, change) for name, change in found.changes.items()}
    stored = {
        name: bound.whole[mine]
        for name, mine in {**found.others, **found.misshapen}.items()
        if name not in changes
    }
    gone = {one.name: bound.bytes_of(one.name) for one in found.tuned_only}
    for mine in found.misshapen.values():
        gone.pop(mine, None)
    for mine in bound.listed & gone.keys():
        # A head that the base does not have comes along.
        stored[mine] = bound.whole[mine]
        del gone[mine]
    reads = {name: partial(bound.read, key) for name, key in stored.items()}
    untied = found.tying.untied
    reads |= {
        head: partial(base.read, table) for head, table in untied.items() if head not in base.infos
    }
    tuned = TunedFile(
        path=adapter.path,
        S={},
        S_base={},
        whole=_Stored(reads),
        base_fingerprint="",
        factors_fingerprint="",
        probes={},
    )
    notes = tuple(
        f"{adapter.path}: {table} is replaced, and {head}, which was tied to it, is not: it keeps "
        "the old values, as in PEFT, and config.json must say that it is not tied"
        for head, table in untied.items()
    )
    expert = Expert(tuned, weight, changes, untied=bool(untied))
    return Fitted(expert, gone, found.tying.warnings, notes)


def _formed(change: Change, weight: Tensor) -> Tensor:
    """Return a change in float64, whether it is one or a weight of its own."""
    made = change(weight)
    formed = made.whole_change
    if formed is not None:
        return formed
    assert made.weight is not None
    return torch.sub(made.weight.double(), weight.double())


def load_tuned(model: nn.Module, path: str | os.PathLike[str] | Mapping[Any, float]) -> TunedFile:
    """Put a tuned file, an adapter, or a mixture on a live model in place of what was there before.

    Tuned files need a model that `svftool.attach` was called on. Adapters need a plain one: the
    weights that they change become the merged ones, and those of the base are kept beside them,
    so that the next call starts from them.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    path : path-like, or mapping of path-like to float
        What to load, or several with their weights: ``{"a.safetensors": 0.7, ...}``.

    Returns
    -------
    TunedFile
        What was loaded; of adapters the tensors that are stored whole.

    Raises
    ------
    CheckpointError, FactorsError
        If a file does not fit; the model is not changed then.
    ModelError
        If the model is attached for an adapter, or not for a tuned file.
    NumericalError
        If a weight would not be finite.
    UsageError
        If a weight is not finite, there is no file, or adapters and tuned files are mixed.
    """
    parts = dict(path) if isinstance(path, Mapping) else {path: 1.0}
    adapters = [one for one in parts if is_adapter(one)]
    if not adapters:
        return attaching.load_tuned(model, path)
    if len(adapters) < len(parts):
        raise UsageError(
            f"{adapters[0]}: an adapter among tuned files, expected one kind. Turn it into a tuned "
            "file with svftool convert."
        )
    return load_adapters(model, [(Path(one), float(parts[one])) for one in adapters])


def load_adapters(
    model: nn.Module,
    parts: list[tuple[Path, float]],
    config: Mapping[str, Any] | None = None,
    progress: Progress = SILENT,
) -> TunedFile:
    """Put adapters on a plain live model; see `load_tuned`.

    Parameters
    ----------
    model : nn.Module
    parts : list of (Path, float)
    config : mapping, optional
        ``config.json`` of the base; the model's own by default.
    progress : Progress
        Told what differs from the adapter that PEFT runs unmerged.
    """
    if attaching.find_attachment(model) is not None:
        raise ModelError(
            f"{parts[0][0]}: the model has attached singular values, expected a plain one for an "
            "adapter. Call detach first."
        )
    before: dict[str, Tensor] = model.__dict__.get(_BEFORE, {})
    state = model.state_dict(keep_vars=True)
    base = _live(parts[0][0], model, {**state, **before}, config)
    opened: list[Adapter] = []
    try:
        experts = []
        for path, weight in parts:
            opened.append(open_adapter(path))
            fitted = fit_adapter(base, opened[-1], weight)
            if fitted.dropped:
                raise CheckpointError(
                    f"{path}: {shortlist(fitted.dropped, 3)} have no place in the model, expected "
                    "all of the adapter to have one. Name the model that it was trained on."
                )
            for warning in fitted.warnings:
                progress.warn(warning)
            experts.append(fitted.expert)
        new = _merged(base, experts)
    finally:
        for one in opened:
            one.close()
    whole = {name for one in experts for name in one.tuned.whole}
    _untie(model, state, whole, new)
    _put(model, model.state_dict(keep_vars=True), before, new)
    first = experts[0].tuned
    facts = {"adapters": [path.name for path, _ in parts], "changed": sorted(new)}
    return TunedFile(first.path, {}, {}, {}, "", "", {}, training=facts)


def _live(
    path: Path, model: nn.Module, state: Mapping[str, Tensor], config: Mapping[str, Any] | None
) -> AuditSource:
    infos = {
        name: TensorInfo(name, value.dtype, tuple(value.shape), "") for name, value in state.items()
    }
    if config is None:
        own: Any = getattr(model, "config", None)
        config = own.to_dict() if hasattr(own, "to_dict") else None
    # The class that wrote the file may have a head that this one has not.
    config = config and {**config, "architectures": [type(model).__name__]}
    return _seen(Path("the model"), infos, lambda name: state[name].detach().cpu(), config)


def _merged(base: AuditSource, experts: list[Expert]) -> dict[str, Tensor]:
    """Return the new values of every tensor that changes, each rounded once."""
    names = dict.fromkeys(name for one in experts for name in (*one.changes, *one.tuned.whole))
    new = {}
    for name in names:
        if name not in base.infos or base.infos[name].shape != _shape(name, base, experts):
            raise ModelError(
                f"{experts[0].tuned.path}: {name!r} is {_shape(name, base, experts)} in the "
                f"adapter, expected a tensor of the model of this shape. Build the model with the "
                "adapter's head."
            )
        weight = base.read(name)
        total = weight.double().clone()
        for one in experts:
            if name in one.changes:
                total += one.weight * one.changes[name](weight)
            elif name in one.tuned.whole:
                total += one.weight * (one.tuned.whole[name].double() - weight.double())
        bad = ~total.isfinite() | beyond(total, weight.dtype)
        if bool((bad & weight.isfinite()).any()):
            raise NumericalError(
                f"tensor {name!r}: values that {weight.dtype} cannot hold, expected finite ones. "
                "Give a smaller weight."
            )
        new[name] = round_once(total, weight.dtype)
    return new


def _shape(name: str, base: AuditSource, experts: list[Expert]) -> tuple[int, ...]:
    for one in experts:
        if name in one.tuned.whole:
            return tuple(one.tuned.whole[name].shape)
    return base.infos[name].shape


def _untie(
    model: nn.Module, state: Mapping[str, Tensor], whole: set[str], new: Collection[str]
) -> None:
    """Give a parameter of its own to what is tied to a tensor that is replaced, and is not itself.

    PEFT replaces a module, and what was tied to it keeps the old values.
    """
    replaced = {id(state[name]) for name in whole & set(new)}
    for name, value in state.items():
        if id(value) in replaced and name not in new and isinstance(value, nn.Parameter):
            path, _, leaf = name.rpartition(".")
            own = nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)
            setattr(model.get_submodule(path), leaf, own)


@torch.no_grad()
def _put(
    model: nn.Module,
    state: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
) -> None:
    """Write new values, and those of the base where the last adapter changed something else."""
    kept = {name: before[name] if name in before else state[name].detach().clone() for name in new}
    for name, value in before.items():
        if name not in new:
            state[name].copy_(value)
    for name, value in new.items():
        state[name].copy_(value)
    model.__dict__[_BEFORE] = kept
