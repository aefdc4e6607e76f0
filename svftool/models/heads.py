"""Find the module of a model that turns features into class scores."""

from __future__ import annotations

from torch import nn

from svftool.checkpoints import TensorInfo, output_heads


def find_head(model: nn.Module) -> str | None:
    """Return the name of a model's head: a linear layer or a pointwise convolution.

    timm's models say which it is; in others it goes by the names of their layers, as the default
    selection of ``decompose`` does.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    str or None
        Name of the module; None where the model has no head.
    """
    told = _told_by_timm(model)
    if told is not None:
        return told
    infos = [
        TensorInfo(name, parameter.dtype, tuple(parameter.shape), "")
        for name, parameter in model.named_parameters(remove_duplicate=False)
    ]
    heads = output_heads(infos)
    modules = [info.name.removesuffix(".weight") for info in infos if info.name in heads]
    kept = [name for name in modules if _is_classifier(model.get_submodule(name))]
    return kept[-1] if kept else None


def _told_by_timm(model: nn.Module) -> str | None:
    told = getattr(model, "get_classifier", None)
    if not callable(told):
        return None
    head = told()
    found = [name for name, module in model.named_modules() if module is head]
    return found[0] if found and isinstance(head, nn.Module) and _is_classifier(head) else None


def _is_classifier(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1)
    return isinstance(module, nn.Linear)
