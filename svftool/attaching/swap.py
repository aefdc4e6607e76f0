"""Save what was trained on a live model as a tuned file, and swap tuned files on it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svftool.attaching.attachment import Attachment, require_attachment
from svftool.checkpoints import replace_output
from svftool.errors import FactorsError, shortlist
from svftool.factors import (
    FactorStore,
    TunedFile,
    check_tuned,
    open_factors,
    read_tuned,
    write_tuned,
)


def save_tuned(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    task: str | None = None,
    classes: Sequence[str] | None = None,
    training: Mapping[str, Any] | None = None,
    force: bool = False,
) -> None:
    """Write the singular values, and every other tensor that was trained, as a tuned file.

    Parameters
    ----------
    model : nn.Module
        A model that was attached to, or a wrapper around one.
    path : path-like
        The file, by convention ``NAME.svf.safetensors``.
    task, classes, training
        Facts to keep with it, see `svftool.factors.write_tuned`.
    force : bool
        Replace an existing file.

    Raises
    ------
    ModelError
        If nothing is attached.
    UsageError
        If the file exists and `force` is not given.
    """
    attachment = require_attachment(model)
    with (
        replace_output(Path(path), force=force, inputs=[attachment.factors]) as partial,
        open_factors(attachment.factors) as store,
    ):
        write_tuned(
            partial,
            store=store,
            S=attachment.singular_values(),
            whole=attachment.whole_tensors(),
            task=task,
            classes=classes,
            training=training,
        )


def load_tuned(model: nn.Module, path: str | os.PathLike[str]) -> TunedFile:
    """Put a tuned file on a live model in place of whatever was trained or loaded before.

    Layers that the file does not hold go back to the base, and so do whole tensors (heads, norms)
    of the tuned file before.

    Parameters
    ----------
    model : nn.Module
        A model that was attached to, or a wrapper around one; changed in place.
    path : path-like
        The tuned file.

    Returns
    -------
    TunedFile
        What was loaded: its classes, task and training summary.

    Raises
    ------
    FactorsError
        If the file belongs to another base or does not fit; the model is not changed then.
    ModelError
        If nothing is attached.
    """
    attachment = require_attachment(model)
    tuned = read_tuned(path)
    with open_factors(attachment.factors) as store:
        check_tuned(tuned, store)
        whole = _plan_whole(attachment, tuned, store)
    deltas = {name: torch.zeros_like(layer.S_base) for name, layer in attachment.layers.items()}
    attachment.set_deltas(deltas | {name: tuned.delta(name) for name in tuned.S})
    for live, value in whole.items():
        _assign(attachment, live, value)
    return tuned


def _plan_whole(attachment: Attachment, tuned: TunedFile, store: FactorStore) -> dict[str, Tensor]:
    """Return every live tensor to write: the base's where a former one goes, then the file's."""
    former = set(attachment.whole_tensors()) | set(attachment.replaced)
    wanted: dict[str, Tensor] = {}
    for name in sorted(former - set(tuned.whole)):
        before = store.read_whole(name) if name in store.whole else attachment.replaced.get(name)
        if before is not None:
            wanted[name] = before.clone()
    wanted |= tuned.whole
    planned, homeless = {}, []
    for name, value in wanted.items():
        live = [n for n in attachment.names.live_names(name) if _find(attachment.model, n)]
        if live:
            planned[live[0]] = value
        else:
            homeless.append(name)
    if homeless:
        raise FactorsError(
            f"{tuned.path}: {len(homeless)} tensors have no place in the model: "
            f"{shortlist(homeless)}. Build the model with the head that the file was trained with."
        )
    return planned


def _find(model: nn.Module, live: str) -> tuple[nn.Module, str, Tensor] | None:
    path, _, attribute = live.rpartition(".")
    try:
        owner = model.get_submodule(path)
    except AttributeError:
        return None
    value = owner._parameters.get(attribute, owner._buffers.get(attribute))
    return None if value is None else (owner, attribute, value)


@torch.no_grad()
def _assign(attachment: Attachment, live: str, value: Tensor) -> None:
    found = _find(attachment.model, live)
    if found is None:
        return
    owner, attribute, present = found
    attachment.replaced.setdefault(attachment.names.file_name(live), present.detach().clone())
    if present.shape == value.shape:
        present.copy_(value)
        return
    fresh = value.to(present).clone()
    if isinstance(present, nn.Parameter):
        setattr(owner, attribute, nn.Parameter(fresh, requires_grad=present.requires_grad))
    else:
        setattr(owner, attribute, fresh)
    for size in ("out_features", "out_channels"):
        if hasattr(owner, size):
            setattr(owner, size, fresh.shape[0])
