"""PEFT's LoRA on the layers that were decomposed, as the baseline to compare with."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn

from svftool.attaching.names import NameMap
from svftool.errors import MissingDependencyError, ModelError


def add_lora(
    model: nn.Module,
    names: NameMap,
    layers: Sequence[str],
    *,
    rank: int,
    head: str | None,
) -> tuple[nn.Module, list[nn.Parameter], list[nn.Parameter]]:
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

    Raises
    ------
    MissingDependencyError
        If PEFT is not installed.
    ModelError
        If no layer is of a kind that PEFT adapts.
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
    with warnings.catch_warnings():
        # PEFT asks transformers' models about gradient checkpointing by a name of the past.
        warnings.simplefilter("ignore", FutureWarning)
        wrapped: nn.Module = peft.get_peft_model(model, config)
    _dilate_adapters(wrapped)
    trained = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    adapters = [p for n, p in trained.items() if ".lora_" in n]
    rest = [p for n, p in trained.items() if ".lora_" not in n]
    return wrapped, adapters, rest


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
