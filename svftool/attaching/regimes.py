"""What is trained: one name a regime, and the model with exactly that set free."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from svftool.attaching.attachment import Attachment
from svftool.attaching.layer import is_own
from svftool.attaching.lifecycle import attach, choose_layers, matrices_of
from svftool.attaching.names import NameMap, map_names
from svftool.attaching.peft_warnings import peft_warnings
from svftool.choices.regimes import Regime, check_sizes, lora_rank, parse_regime, say_size
from svftool.choices.singular_values import say_band
from svftool.errors import MissingDependencyError, ModelError, brief
from svftool.factors import FactorStore

# PEFT's LoRA on the layers that were decomposed, as the baseline to compare with.


def add_lora(
    model: nn.Module,
    names: NameMap,
    layers: Sequence[str],
    *,
    rank: int,
    head: str | None,
) -> tuple[nn.Module, list[nn.Parameter], list[nn.Parameter], list[str]]:
    """Wrap a model in PEFT's LoRA with PEFT's defaults, scaled by 1 at any rank.

    Parameters
    ----------
    model : nn.Module
        Changed in place, and wrapped.
    names : NameMap
        Names of the checkpoint to live parameters.
    layers : sequence of str
        Tensor names that may get adapters.
    rank : int
        Of the adapters.
    head : str or None
        Module that is trained whole and saved with the adapters.

    Returns
    -------
    nn.Module
        PEFT's model; ``save_pretrained`` writes the adapter folder.
    list of Parameter
        The adapters'.
    list of Parameter
        The head's.
    list of str
        What PEFT warns of, a sentence each.

    Raises
    ------
    MissingDependencyError
        If PEFT is not installed.
    ModelError
        If no layer is of a kind that PEFT adapts, or it refuses one of them in this model.
    """
    try:
        import peft
    except ImportError:
        raise MissingDependencyError("peft", extra="train", purpose="regime lora") from None
    places = [names.placements[name] for name in layers if name in names.placements]
    owners = [
        place.live.removesuffix(".weight") for place in places if place.live.endswith(".weight")
    ]
    paths = [owner for owner in owners if _adaptable(model.get_submodule(owner))]
    if not paths:
        raise ModelError(
            "LoRA adapts none of the layers: no plain linear or convolution among them."
        )
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=paths,
        modules_to_save=None if head is None else [head],
    )
    with peft_warnings() as said:
        try:
            wrapped: nn.Module = peft.get_peft_model(model, config)
        except ValueError as error:  # such as a module of Mamba, whose kernels read the weight
            raise ModelError(
                f"LoRA: PEFT refuses a layer ({brief(str(error), 200)}). Leave it out with "
                "--exclude, or choose another regime."
            ) from error
    _dilate_adapters(wrapped)
    trained = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    adapters = [p for n, p in trained.items() if ".lora_" in n]
    rest = [p for n, p in trained.items() if ".lora_" not in n]
    return wrapped, adapters, rest, said


def _dilate_adapters(wrapped: nn.Module) -> None:
    """Give adapters their convolution's dilation, which PEFT leaves out."""
    for module in wrapped.modules():
        base, adapters = getattr(module, "base_layer", None), getattr(module, "lora_A", None)
        if isinstance(base, nn.Conv2d) and isinstance(adapters, nn.ModuleDict):
            for adapter in adapters.values():
                if isinstance(adapter, nn.Conv2d):
                    adapter.dilation = base.dilation


def _adaptable(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.groups == 1
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


@dataclass(frozen=True)
class Trainable:
    """A model in which exactly what a regime trains requires a gradient.

    Attributes
    ----------
    model : nn.Module
        The model to call: the one given, or PEFT's wrapper around it.
    regime : Regime
    groups : mapping of str to list of Parameter
        Some of ``singular_values``, ``entries``, ``scales``, ``remainder``, ``head``, ``bias``,
        ``norm``, ``lora``, ``backbone``; no parameter is in two of them and none is empty.
    names : NameMap
        Names of the checkpoint to live parameters.
    attachment : Attachment or None
        What is trained in the singular basis, where the regime does that.
    said : str
        What a size or a band came to, where that is not what was asked for, and what PEFT warns
        of.
    """

    model: nn.Module
    regime: Regime
    groups: dict[str, list[nn.Parameter]]
    names: NameMap
    attachment: Attachment | None = None
    said: str = ""

    @property
    def trainable_parameters(self) -> int:
        """Number of values that are trained."""
        return sum(p.numel() for group in self.groups.values() for p in group)

    @property
    def absent(self) -> tuple[str, ...]:
        """Parts that the regime names and the model has none of, such as ``norm``."""
        return tuple(sorted(self.regime.parts & {"bias", "norm"} - self.groups.keys()))

    def singular_values(self) -> dict[str, Tensor]:
        """Return the singular values by tensor name; empty without `attachment`."""
        return {} if self.attachment is None else self.attachment.singular_values()

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """Return what layers have beside singular values, see `svftool.factors.TunedFile`."""
        return {} if self.attachment is None else self.attachment.parts()

    def whole_tensors(self) -> dict[str, Tensor]:
        """Return every other trained tensor by its name in the checkpoint; not those of LoRA."""
        if self.attachment is not None:
            return self.attachment.whole_tensors()
        if self.regime.lora is not None:
            return {}
        named = self.model.named_parameters(remove_duplicate=False)
        return self.names.in_file((name, one) for name, one in named if one.requires_grad)


def apply_regime(
    model: nn.Module,
    regime: Regime | str,
    factors: FactorStore,
    *,
    head: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    **options: Any,
) -> Trainable:
    """Set free what a regime trains, and freeze the rest.

    Parameters
    ----------
    model : nn.Module
        A plain model; changed in place.
    regime : Regime or str
        See `parse_regime`.
    factors : FactorStore
        Which layers there are, and their factors.
    head : str or None
        Module that every regime trains whole; its weights get no singular values.
    include, exclude : sequence of str
        Globs of tensor names that limit spectral regimes and ``lora`` to some layers.
    options
        Further arguments of `svftool.attach`, where `offload_base` is on unless turned off:
        ``gradients`` where entries are chosen by it, ``seed``.

    Returns
    -------
    Trainable

    Raises
    ------
    UsageError
        If there is no such regime, or it asks for more numbers than any layer has.
    ModelError
        If the regime would train nothing.
    MissingDependencyError
        If ``lora`` is asked for and PEFT is not installed.
    """
    chosen = parse_regime(regime) if isinstance(regime, str) else regime
    names = map_names(model, [*factors.layers, *factors.config.left_whole])
    inside = [] if head is None else names.inside(head)
    groups = {"head": [] if head is None else _own_parameters(model.get_submodule(head))}
    live, attachment = model, None
    layers: list[str] = []
    if chosen.spectral is not None or chosen.lora is not None:
        layers = choose_layers(factors, include, exclude, inside)
    said = say_size(chosen, matrices_of(factors, layers))
    if chosen.spectral is not None:
        ranks = [factors.layers[name].rank for name in layers]
        said = "; ".join(filter(None, [said, say_band(options.get("train_rank"), ranks)]))
        options = {"offload_base": True, **options}
        alone = replace(chosen, parts=chosen.parts - {"bias", "norm"})
        attachment = attach(
            model, factors, include=include, exclude=exclude, skip=inside, regime=alone, **options
        )
        groups |= attachment.groups()
    elif chosen.lora is not None:
        check_sizes(chosen, matrices_of(factors, layers))
        rank = lora_rank(chosen.lora, matrices_of(factors, layers))
        live, *found, warned = add_lora(model, names, layers, rank=rank, head=head)
        groups["lora"], groups["head"] = found
        said = "; ".join(filter(None, [said, *warned]))
    _add_plain_groups(model, chosen, groups)
    live.requires_grad_(False)
    groups = {name: group for name, group in groups.items() if group}
    if not groups:
        raise _trains_nothing(chosen, head)
    for parameter in chain(*groups.values()):
        parameter.requires_grad_(True)
    return Trainable(live, chosen, groups, names, attachment, said)


def _trains_nothing(regime: Regime, head: str | None) -> ModelError:
    """Say what the model lacks of what a regime names."""
    parts = [f"{part} parameters" for part in sorted(regime.parts)]
    lacks = f"the model has no {' and no '.join(parts)}, and " if parts else ""
    found = "no head is named" if head is None else f"its head {head!r} has no parameters"
    return ModelError(
        f"regime {regime.name!r} trains nothing: {lacks}{found}. Name a head with --head-name, or "
        "choose another regime."
    )


def weight_gradients(
    model: nn.Module,
    factors: FactorStore,
    losses: Iterable[Callable[[], Tensor]],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    head: str | None = None,
) -> dict[str, Tensor]:
    """Return the gradient of a sum of losses in the weights that would be attached to.

    Parameters
    ----------
    model : nn.Module
        A plain model; what requires a gradient is as before afterwards.
    factors : FactorStore
        Which layers there are.
    losses : iterable of callable
        Each computes a loss by the model, of a batch of the support set.
    include, exclude, head
        See `apply_regime`.

    Returns
    -------
    mapping of str to Tensor
        By the model's parameter names, for `svftool.attach`; as large as the weights.
    """
    names = map_names(model, [*factors.layers, *factors.config.left_whole])
    inside = [] if head is None else names.inside(head)
    layers = choose_layers(factors, include, exclude, inside)
    places = {names.placements[name].live for name in layers if name in names.placements}
    mine = {name: p for name, p in model.named_parameters() if name in places}
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(False)
    for parameter in mine.values():
        parameter.requires_grad_(True)
    found: dict[str, Tensor] = {}
    for compute in losses:
        with torch.enable_grad():
            slopes = torch.autograd.grad(compute(), list(mine.values()), allow_unused=True)
        for name, slope in zip(mine, slopes, strict=True):
            if slope is not None:
                found[name] = found[name].add_(slope) if name in found else slope.clone()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(before[name])
    nothing = {name: torch.zeros_like(one) for name, one in mine.items() if name not in found}
    return found | {name: one.detach() for name, one in nothing.items()}


def _add_plain_groups(
    model: nn.Module, regime: Regime, groups: dict[str, list[nn.Parameter]]
) -> None:
    """Add the model's own parameters that a regime trains, each to the first group it is for."""
    taken = set(groups["head"])
    candidates = {
        "norm": _norm_parameters(model) if "norm" in regime.parts else (),
        "bias": _biases(model) if "bias" in regime.parts else (),
        "backbone": _own_parameters(model) if regime.full else (),
    }
    for name, parameters in candidates.items():
        groups[name] = [p for p in dict.fromkeys(parameters) if p not in taken]
        taken.update(groups[name])


def _own_parameters(module: nn.Module) -> list[nn.Parameter]:
    return [
        parameter
        for name, parameter in module.named_parameters()
        if is_own(name) and parameter.dtype.is_floating_point
    ]


def _norm_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            yield from (p for p in module.parameters(recurse=False) if p.ndim == 1)


def _biases(model: nn.Module) -> Iterator[nn.Parameter]:
    for name, parameter in model.named_parameters():
        if is_own(name) and name.rpartition(".")[2].endswith("bias") and parameter.ndim == 1:
            yield parameter
