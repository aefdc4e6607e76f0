"""Where a stage loses resolution: its innermost modules that give a smaller map than they get."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from svftool.tasks.few_shot_segmentation.backbones.trace import Trace


def strided_modules(model: nn.Module, stage: str, trace: Trace) -> list[str]:
    """Find the modules that take a stage to its stride.

    A module that pools and is upsampled again inside a block, or the global pool of a channel
    attention, is none of them: its map is smaller than the stage's own.

    Parameters
    ----------
    model : nn.Module
        The backbone.
    stage : str
        A module of it with a larger stride at its output than at its input.
    trace : Trace
        Of an image that went through the model.

    Returns
    -------
    list of str
        Names, in the order of their definition; a module without such parts stands for itself.
    """
    end = trace.stride(stage)
    found = []
    for part in _parts(model.get_submodule(stage), stage, trace):
        came, left = trace.stride_before(part), trace.stride_after(part)
        if came is not None and left is not None and came < left <= end:
            found += strided_modules(model, part, trace)
    return found or [stage]


def _parts(module: nn.Module, name: str, trace: Trace) -> Iterator[str]:
    """Give the next modules inside one that ran themselves; a list of modules does not."""
    for child, inner in module.named_children():
        part = f"{name}.{child}"
        if part in trace.outputs:
            yield part
        else:
            yield from _parts(inner, part, trace)
