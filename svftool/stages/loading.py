"""A model with the weights of a source in it: its head, other names, what was tuned."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from glob import escape
from pathlib import Path

from torch import nn

from svftool.attaching import attach, detach, load_tuned, map_names
from svftool.checkpoints import Checkpoint
from svftool.errors import ModelError, counted, shortlist
from svftool.factors import FactorStore, TunedFile
from svftool.models import is_read_whole
from svftool.progress import Progress
from svftool.stages.adapt import load_adapters
from svftool.stages.measured import Source
from svftool.tasks.base import Draw, Prepared


def fit(
    source: Source,
    classes: Sequence[str] | None,
    draw: Draw,
    model: nn.Module,
    progress: Progress,
) -> nn.Module:
    """Give a freshly built model its head, and what was tuned.

    Raises
    ------
    ModelError
        If there is no head for the classes, or something has no place in the model.
    """
    known = set(model.state_dict())
    prepared = draw.prepare(model, start=False)
    for message in prepared.said:
        progress.warn(message)
    if source.store is None:
        whole = is_read_whole(source.model, source.checkpoint)
        names = _load_rest(prepared, classes, source.checkpoint, known, whole=whole)
    else:
        names = [] if source.tuned is None else _tune(prepared, source.tuned, source.store)
    if source.adapter is not None:
        names = [*names, *_adapt(prepared, source.adapter, source.checkpoint, progress)]
    inside = prepared.head is not None and any(n.startswith(f"{prepared.head}.") for n in names)
    # A host for few-shot segmentation has no classes, and a stand-in until it is trained.
    if prepared.new_head and classes is not None and not inside:
        if prepared.begin is not None:
            prepared.begin()
            return prepared.model.eval()
        raise ModelError(
            f"{source.paths[-1]}: no head for the data's {counted(len(classes), 'classes')} "
            f"({shortlist(classes, 4)}), expected one trained for them. Give the classes of "
            "the checkpoint's head with --classes, or the file from 'svftool finetune' with --tuned"
        )
    return prepared.model.eval()


def _load_rest(
    prepared: Prepared,
    classes: Sequence[str] | None,
    checkpoint: Checkpoint,
    known: Collection[str],
    *,
    whole: bool = False,
) -> list[str]:
    """Load what a checkpoint holds beside the tensors `known` to its bare model: a head, a host.

    A `whole` one was read by a library that has placed every tensor; only a new head is left.
    Returns the live names of what was loaded.
    """
    state = prepared.model.state_dict()
    head = f"{prepared.head}." if prepared.new_head else None
    elsewhere = set[str]() if whole else _renamed(prepared.model, checkpoint, known)
    loaded, homeless, of_head = [], [], {}
    for name, info in checkpoint.infos.items():
        live = checkpoint.live_name(name, state)
        inside = head is not None and live.startswith(head)
        if ((whole or live in known) and not inside) or name in elsewhere:
            continue
        if inside:
            of_head[live] = tuple(info.shape)
        if live in state and state[live].shape == info.shape:
            state[live].copy_(checkpoint.read(name))
            loaded.append(live)
        elif not inside:
            homeless.append(name)
    if homeless:
        raise ModelError(
            f"{checkpoint.path}: {counted(len(homeless), 'tensors', 'have')} no place in the "
            f"model: {shortlist(homeless)}. Name the model that the checkpoint was made for with "
            "--model"
        )
    # Of a head for other classes nothing fits, and the classes are what is wrong.
    if of_head and (classes is None or any(name.startswith(str(head)) for name in loaded)):
        _require_whole_head(checkpoint.path, prepared, of_head)
    return loaded


def _renamed(model: nn.Module, checkpoint: Checkpoint, known: Collection[str]) -> set[str]:
    """Find tensors that the model has loaded under another name, or leaves out on purpose.

    transformers adds a prefix, stacks tensors, and ignores what older files hold besides, such as
    the causal masks of GPT-2.
    """
    own = [name for name in checkpoint.infos if name.removeprefix(checkpoint.prefix) not in known]
    if not own:
        return set()
    placements = map_names(model, checkpoint.infos).placements
    found = {name for name in own if name in placements and placements[name].live in known}
    patterns = [
        pattern
        for module in model.modules()
        for pattern in getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    ]
    return found | {name for name in own if any(re.search(p, name) for p in patterns)}


def _require_whole_head(
    path: Path, prepared: Prepared, found: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse a head of another kind: a part of its weights would fit and give nonsense."""
    module = prepared.model.get_submodule(str(prepared.head))
    expected = {f"{prepared.head}.{n}": tuple(p.shape) for n, p in module.named_parameters()}
    buffers = {f"{prepared.head}.{name}" for name, _ in module.named_buffers()}
    wrong = [
        name
        for name in {**expected, **found}
        if name not in buffers and found.get(name) != expected.get(name)
    ]
    if wrong:
        first = wrong[0]
        raise ModelError(
            f"{path}: {first} is {found.get(first, 'missing')}, expected "
            f"{expected.get(first, 'no such tensor')}, and so on for "
            f"{counted(len(wrong), 'tensors')} of the head. Give the options that it was trained "
            "with (few-shot segmentation: --host, --start, --width, --shots)"
        )


def _adapt(
    prepared: Prepared, adapter: Path, checkpoint: Checkpoint, progress: Progress
) -> list[str]:
    """Put an adapter on a model; return the live names of what it changed."""
    loaded = load_adapters(prepared.model, [(adapter, 1.0)], checkpoint.config, progress)
    return list(loaded.training["changed"])


def _tune(prepared: Prepared, tuned: TunedFile, store: FactorStore) -> list[str]:
    """Put a tuned file on a model; return the live names of what it holds beside singular values.

    Layers that were not trained run as they did in training, without factors.
    """
    model = prepared.model
    names = map_names(model, [*store.layers, *store.config.left_whole])
    if prepared.new_head and prepared.head is not None:
        whole = {live: value for n, value in tuned.whole.items() for live in names.live_names(n)}
        inside = {n: tuple(v.shape) for n, v in whole.items() if n.startswith(f"{prepared.head}.")}
        if inside:
            _require_whole_head(tuned.path, prepared, inside)
    if tuned.S:
        attach(model, store, include=[escape(name) for name in tuned.S])
        load_tuned(model, tuned.path)
    else:
        attach(model, store, skip=[] if prepared.head is None else names.inside(prepared.head))
        load_tuned(model, tuned.path)
        detach(model, merge=False)
    return [live for name in tuned.whole for live in names.live_names(name)]
