"""LoRA on parameters that are no layer's weight: PEFT's ``target_parameters``.

PEFT wraps the module that holds such a parameter, once for each of them, so the adapter names the
module and how deep in the wrapping a pair lies, not the parameter. Which pair is whose follows from
the parameters that the configuration names and from the base's shapes. The pairs of a stack of E
experts lie side by side: ``lora_A`` is (r E, in) with the experts outermost, ``lora_B`` (out, r E)
with them innermost.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from svftool.checkpoints.base import TensorInfo
from svftool.errors import CheckpointError

_IN_OUT = frozenset({"gpt_oss", "aria", "aria_text", "openai_privacy_filter"})
"""Model types whose stacks PEFT takes as (experts, in, out); others are (experts, out, in)."""


@dataclass(frozen=True)
class WrappedModule:
    """A module whose parameters are adapted.

    Attributes
    ----------
    name : str
        The module, without PEFT's prefix and wrappers.
    pairs : tuple of (TensorInfo, TensorInfo)
        ``lora_A`` and ``lora_B`` of each wrapper.
    parameters : tuple of str
        Those that the configuration allows, by their full names.
    """

    name: str
    pairs: tuple[tuple[TensorInfo, TensorInfo], ...]
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class AdaptedParameter:
    """The pair of one parameter.

    Attributes
    ----------
    name : str
    down, up : str
        Tensors of the adapter.
    rank : int
        r of one expert.
    experts : int
        E; 1 for a parameter of two dimensions.
    in_out : bool or None
        Whether the matrix of an expert is (in, out); None where it is square.
    """

    name: str
    down: str
    up: str
    rank: int
    experts: int
    in_out: bool | None


def parameters_of(module: str, targets: Sequence[str]) -> tuple[str, ...]:
    """Return the parameters of a module that ``target_parameters`` names.

    Examples
    --------
    >>> parameters_of("layers.0.experts", ["experts.down_proj", "mlp.gate.weight"])
    ('layers.0.experts.down_proj',)
    """
    names = [f"{module}.{target.rpartition('.')[2]}" for target in sorted(targets)]
    wanted = zip(names, sorted(targets), strict=True)
    return tuple(
        dict.fromkeys(name for name, one in wanted if name == one or name.endswith(f".{one}"))
    )


def place(
    module: WrappedModule,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    model_type: str | None,
    where: str,
) -> list[AdaptedParameter]:
    """Find the parameter of each pair by its shape.

    Parameters
    ----------
    module : WrappedModule
    shapes : mapping of str to tuple of int
        Of the module's parameters, in the base.
    model_type : str or None
        As in the base's ``config.json``: it decides where matrices are square.
    where : str
        What errors name.

    Raises
    ------
    CheckpointError
        If a pair fits none of the parameters, or more than one.
    """
    found = list(_assignments(module, shapes))
    # One class holds them all, so they are all the same way round.
    alike = [one for one in found if len({fit.in_out for fit in one} - {None}) < 2]
    found = alike or found
    if len(found) != 1:
        raise CheckpointError(_unplaced(module, shapes, len(found), where))
    (placed,) = found
    known = {fit.in_out for fit in placed} - {None}
    if not known and any(fit.in_out is None for fit in placed):
        known = _by_model_type(model_type, f"{where}: {placed[0].name!r}")
    way = next(iter(known), False)
    return [replace(fit, in_out=way) if fit.in_out is None else fit for fit in placed]


def change_of_expert(fit: AdaptedParameter, down: Tensor, up: Tensor, expert: int) -> Tensor:
    """Multiply the pair of one expert out, before it is scaled.

    Parameters
    ----------
    down : (r E, in) Tensor
    up : (out, r E) Tensor

    Returns
    -------
    (out, in) or (in, out) Tensor
        float64, the way round that the base holds it.
    """
    A = down.reshape(fit.experts, -1, down.shape[1])[expert].double()
    B = up.reshape(up.shape[0], -1, fit.experts)[:, :, expert].double()
    product: Tensor = B @ A
    return product.mT if fit.in_out else product


def _assignments(
    module: WrappedModule, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[list[AdaptedParameter]]:
    names = [name for name in module.parameters if name in shapes]
    for chosen in itertools.permutations(names, len(module.pairs)):
        fits = [
            _fit(name, shapes[name], pair) for name, pair in zip(chosen, module.pairs, strict=True)
        ]
        placed = [fit for fit in fits if fit is not None]
        if len(placed) == len(fits):
            yield placed


def _fit(
    name: str, shape: tuple[int, ...], pair: tuple[TensorInfo, TensorInfo]
) -> AdaptedParameter | None:
    (rows, into), (out, columns) = pair[0].shape, pair[1].shape
    experts = shape[0] if len(shape) == 3 else 1
    if len(shape) not in (2, 3) or rows != columns or rows % experts:
        return None
    straight, turned = shape[-2:] == (out, into), len(shape) == 3 and shape[-2:] == (into, out)
    if not (straight or turned):
        return None
    in_out = None if straight and turned else turned
    return AdaptedParameter(name, pair[0].name, pair[1].name, rows // experts, experts, in_out)


def _by_model_type(model_type: str | None, where: str) -> set[bool | None]:
    if model_type is None:
        raise CheckpointError(
            f"{where}: the experts' matrices are square, and which way round PEFT takes them "
            "depends on the model; no model type found, expected one in the base's config.json. "
            "Keep config.json beside the base's weights."
        )
    return {model_type in _IN_OUT}


def _unplaced(
    module: WrappedModule, shapes: Mapping[str, tuple[int, ...]], ways: int, where: str
) -> str:
    have = ", ".join(f"{a.shape} and {b.shape}" for a, b in module.pairs)
    want = ", ".join(f"{name.rpartition('.')[2]} {shapes[name]}" for name in shapes)
    if ways:
        return (
            f"{where}: module {module.name!r}: the adapter's matrices {have} fit its parameters "
            f"({want}) in {ways} ways, expected one. Merge the adapter with PEFT and inspect the "
            "merged checkpoint."
        )
    return (
        f"{where}: module {module.name!r}: the adapter's matrices {have} make no change of its "
        f"parameters ({want}), expected lora_A (r E, in) and lora_B (out, r E) of each. "
        "The adapter belongs to another base."
    )


def wrapped_modules(
    pairs: Sequence[tuple[str, tuple[TensorInfo, TensorInfo]]], targets: Sequence[str]
) -> tuple[WrappedModule, ...]:
    """Tell which modules are wrapped for their parameters.

    Parameters
    ----------
    pairs : sequence of (str, (TensorInfo, TensorInfo))
        Module, ``lora_A`` and ``lora_B``; a module that is wrapped twice has two.
    targets : sequence of str
        ``target_parameters`` of ``adapter_config.json``.
    """
    found: dict[str, list[tuple[TensorInfo, TensorInfo]]] = {}
    for module, pair in pairs:
        found.setdefault(module, []).append(pair)
    return tuple(
        WrappedModule(module, tuple(own), names)
        for module, own in found.items()
        if (names := parameters_of(module, targets))
    )
