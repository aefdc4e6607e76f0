"""Load a checkpoint into a model, strictly: what is missing, unexpected or misshapen is listed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

from svftool.checkpoints import Checkpoint, TensorInfo
from svftool.errors import ModelError, counted, shortlist

_SHOWN = 3
"""Tensors of each kind that an error names."""

logger = logging.getLogger(__name__)


def load_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None = torch.float32,
    strict: bool = True,
) -> nn.Module:
    """Load every tensor of a checkpoint into a model.

    Parameters
    ----------
    model : nn.Module
        Changed in place. Parts of wrappers (``module``) are left out of the checkpoint's names.
    checkpoint : Checkpoint
        The weights.
    dtype : torch.dtype or None
        Of the model's floating tensors; None takes the one most of the checkpoint has.
    strict : bool
        Whether a tensor without a place in the model is an error.

    Returns
    -------
    nn.Module
        The model.

    Raises
    ------
    ModelError
        If a tensor is missing, unexpected or has another shape; nothing is loaded then.
    """
    expected = dict(model.state_dict(keep_vars=True))
    names = {checkpoint.live_name(name, expected): name for name in checkpoint.infos}
    if not strict:
        names = {short: name for short, name in names.items() if short in expected}
    refuse_differences(checkpoint, type(model).__name__, **_compare(checkpoint, expected, names))
    model.to(dtype or _main_dtype(checkpoint))
    state = {short: checkpoint.read(name) for short, name in names.items() if short in expected}
    model.load_state_dict(state, strict=False)
    return model


@torch.no_grad()
def keep_vectors(model: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """Give a model's vectors float32 again: biases, norms, running statistics, scales.

    They are few, and rounding them costs more than it saves. Where the checkpoint has a tensor by
    the same name, its own values are read, as they were before any rounding.

    Parameters
    ----------
    model : nn.Module
        Loaded in a lower precision; changed in place.
    checkpoint : Checkpoint
        The weights.
    """
    expected = dict(model.state_dict(keep_vars=True))
    names = {checkpoint.live_name(name, expected): name for name in checkpoint.infos}
    for short, tensor in expected.items():
        if tensor.ndim > 1 or not tensor.is_floating_point() or tensor.dtype.itemsize >= 4:
            continue
        tensor.data = tensor.data.float()
        found = names.get(short)
        if found is not None and checkpoint.infos[found].shape == tuple(tensor.shape):
            tensor.data.copy_(checkpoint.read(found))
    return model


def differences(model: nn.Module, checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Return what `refuse_differences` takes: the tensors that the two do not share."""
    expected = dict(model.state_dict(keep_vars=True))
    names = {checkpoint.live_name(name, expected): name for name in checkpoint.infos}
    return _compare(checkpoint, expected, names)


def _compare(
    checkpoint: Checkpoint, expected: Mapping[str, Tensor], names: Mapping[str, str]
) -> dict[str, list[str]]:
    shapes = {short: checkpoint.infos[name].shape for short, name in names.items()}
    loaded = {id(tensor) for name, tensor in expected.items() if name in shapes}
    return {
        # A tied tensor arrives under another name; old checkpoints have no batch counters.
        "missing": [
            name
            for name, tensor in expected.items()
            if name not in shapes
            and id(tensor) not in loaded
            and not name.endswith("num_batches_tracked")
        ],
        # Counters last: they say least about what the model is.
        "unexpected": sorted(
            (name for name in shapes if name not in expected),
            key=lambda name: name.endswith("num_batches_tracked"),
        ),
        "misshapen": [
            f"{name} {shape} (the model has {tuple(expected[name].shape)})"
            for name, shape in shapes.items()
            if name in expected and tuple(expected[name].shape) != shape
        ],
    }


class MisfitError(ModelError):
    """A model that takes other tensors than the checkpoint has."""


def refuse_differences(
    checkpoint: Checkpoint,
    model: str,
    *,
    missing: Sequence[str],
    unexpected: Sequence[str],
    misshapen: Sequence[str],
) -> None:
    """Raise an error that counts the tensors that model and checkpoint do not share.

    Raises
    ------
    MisfitError
        If there is one; names three of each kind.
    """
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    faults = [
        f"{len(names)} {kind}: {shortlist(names, _SHOWN)}" for kind, names in kinds.items() if names
    ]
    if faults:
        raise MisfitError(
            f"{checkpoint.path}: does not fit {model}; tensors {'; '.join(faults)}. "
            "Name the model that the checkpoint was made for with --model."
        )


# Refuse a network that is too large to be a checkpoint's, before memory is given to it.

_TIMES = 4
"""Values that a network may have for each of its file: tied tensors are made twice, and loaded."""
_MORE_VALUES = 1 << 25
_MORE_BUFFERS = 1 << 27
_MORE_MODULES = 2_000


@contextmanager
def no_larger_than(checkpoint: Checkpoint) -> Iterator[None]:
    """Stop the building of a network that is far larger than the checkpoint meant for it.

    Counted while it grows: parameters, buffers and modules. A parameter is counted before its
    memory is filled, and on the device ``meta`` before it has any.

    Raises
    ------
    ModelError
        Once it has more than a few times the values or modules that the checkpoint can fill.
    """
    held = sum(_values(info) for info in checkpoint.infos.values())
    room = {
        "parameters": _TIMES * held + _MORE_VALUES,
        "buffers": _TIMES * held + _MORE_BUFFERS,
        "modules": 10 * len(checkpoint.infos) + _MORE_MODULES,
    }

    def count(kind: str, amount: int) -> None:
        room[kind] -= amount
        if room[kind] < 0:
            raise ModelError(
                f"{checkpoint.path}: holds {held:,} values in "
                f"{counted(len(checkpoint.infos), 'tensors')}, and the model that is named for it "
                f"has many more {kind}, expected one that it fills. Name the model that the "
                "checkpoint was made for with --model, or repair config.json."
            )

    def register_value(kind: str) -> Callable[..., None]:
        return lambda module, name, value: count(kind, 1 if value is None else value.numel())

    handles = [
        modules.register_module_parameter_registration_hook(register_value("parameters")),
        modules.register_module_buffer_registration_hook(register_value("buffers")),
        modules.register_module_module_registration_hook(lambda *_: count("modules", 1)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _values(info: TensorInfo) -> int:
    """Return how many values a tensor may stand for: a byte of codes may hold two."""
    plain = info.dtype.is_floating_point and info.dtype.itemsize > 1
    return info.numel if plain else 2 * info.nbytes


def build_within(create: Callable[[], nn.Module], checkpoint: Checkpoint) -> nn.Module:
    """Build a network that may not be larger than a checkpoint: first without memory.

    Raises
    ------
    ModelError
        If it is.
    """
    with no_larger_than(checkpoint):
        try:
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                create()
        except ModelError:
            raise
        except Exception:  # many networks need values while they are built
            logger.debug("no network without memory", exc_info=True)
    with no_larger_than(checkpoint):
        return create()


def _main_dtype(checkpoint: Checkpoint) -> torch.dtype:
    sizes: dict[torch.dtype, int] = {}
    for info in checkpoint.infos.values():
        if info.dtype.is_floating_point:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.numel
    return max(sizes, key=lambda key: sizes[key], default=torch.float32)
