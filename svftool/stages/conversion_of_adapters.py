"""What converting an adapter writes, in its own place, by names alone or over a base."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from svftool.adapters.adapter import Adapter
from svftool.adapters.layout_file import STATED_KEY, AdapterFile
from svftool.adapters.low_rank import LowRank
from svftool.adapters.parts import BaseModel
from svftool.adapters.peft import LoraFolder
from svftool.adapters.rewriting import Ranks, pattern, rewriter
from svftool.adapters.writers import COMMENT_KEY, MADE_KEY, Entries, LayoutWriter, layout_writer
from svftool.auditing import AuditSource, open_source
from svftool.auditing.adapters import AdapterChanges, adapter_changes
from svftool.checkpoints import TensorInfo, dtype_name, to_matrix
from svftool.checkpoints.dtypes import dtype_named
from svftool.choices.adapters import AdapterRank
from svftool.choices.dtypes import DTYPES
from svftool.errors import CheckpointError, UsageError, counted, shortlist
from svftool.progress import Progress
from svftool.stages.adapter_names import names_for
from svftool.stages.conversion import ConvertOptions, Layer, Work, plain_ranks, sides_of
from svftool.stages.extract_lora import LeftOut

_STALE = ("sshs_",)
"""Metadata that are hashes of the tensors."""

_NEEDS_BASE = "Give the model that the adapter belongs to with --base."


def of_adapter(
    adapter: Adapter,
    options: ConvertOptions,
    rank: AdapterRank | None,
    stack: ExitStack,
    progress: Progress,
) -> Work:
    """Say what another adapter holds of one; a base stays open until a stack ends.

    Raises
    ------
    UsageError
        If the base or the rank is missing.
    CheckpointError
        If the layout cannot hold it.
    """
    layout = options.layout or adapter.layout
    layout_writer(layout)
    dora = [name for name, one in adapter.layers.items() if _magnitude(one) is not None]
    if layout == adapter.layout and not (dora and rank is not None):
        return _in_place(adapter, options, rank)
    if options.base is not None:
        base = stack.enter_context(open_source(options.base))
        return _over_base(adapter, base, layout, options, rank, progress)
    if dora:
        raise UsageError(
            f"{adapter.path}: {len(dora)} DoRA layers ({shortlist(dora, 2)}), whose change depends "
            f"on the weights, expected --base. {_NEEDS_BASE}"
        )
    return _by_names(adapter, layout, options, rank)


def _magnitude(layer: Any) -> str | None:
    """Return the tensor of a DoRA layer's norms."""
    keys = getattr(layer, "keys", None)
    if keys is not None:
        found: str | None = keys.get("magnitude")
        return found
    named: str | None = getattr(layer, "magnitude", None)
    return named


def refuse_unused(adapter: Adapter) -> None:
    """Refuse an adapter that is not understood as a whole."""
    if adapter.unused:
        raise CheckpointError(
            f"{adapter.path}: {counted(len(adapter.unused), 'tensors', 'are')} understood in no "
            f"way ({shortlist(adapter.unused, 3)}), expected pairs, alphas, differences and DoRA "
            "scales alone. Remove them, or convert with the program that made them."
        )


def _in_place(adapter: Adapter, options: ConvertOptions, rank: AdapterRank | None) -> Work:
    """Write the same layout again, under the same keys."""
    if rank is not None and (adapter.wrapped or adapter.rows):
        what = "parameters" if adapter.wrapped else "token rows"
        raise CheckpointError(
            f"{adapter.path}: an adapter of {what}, whose rank is not changed here, expected one "
            "of layers alone. Leave --rank out."
        )
    layers = []
    for name in adapter.layers:
        made = _layer_in_place(adapter, name, rank)
        if made is not None:
            layers.append(made)
    names = {one.name for one in layers}
    if not names and rank is not None:
        raise CheckpointError(
            f"{adapter.path}: no layer has a rank, expected pairs of matrices. Leave --rank out."
        )
    writer = rewriter(adapter, [one.name for one in layers])
    cast = None if options.dtype is None else dtype_named(options.dtype)
    held = tuple(adapter.keys)
    taken = {key for name in names for key in writer.keys(name)}
    return Work(
        kind=adapter.layout,
        layout=adapter.layout,
        is_folder=writer.weights_file is not None,
        layers=[replace(one, shown=writer.shown(one.name)) for one in layers],
        scaled=writer.has_scale,
        entries=writer.entries,
        rest=lambda: writer.rest(held, cast),
        metadata=lambda made, about: _handed_on(adapter, writer.metadata(made, about), made, None),
        config=writer.config,
        weights_file=writer.weights_file,
        dtype=_dtype(adapter, options),
        whole=tuple(key for key in held if key not in taken),
    )


def _layer_in_place(adapter: Adapter, name: str, rank: AdapterRank | None) -> Layer | None:
    """Return a layer that is written anew; None where it is copied as it is."""
    layer = adapter.layers[name]
    if _magnitude(layer) is not None or getattr(layer, "kind", "") == "diff":
        return None
    shape = adapter.shape(name)
    matrix = sides_of(shape)
    if isinstance(adapter, AdapterFile) and adapter.layers[name].kind != "lora":
        if rank is None:
            return None
        change = partial(_over_nothing, adapter, name, shape)
        return Layer(name, matrix, None, partial(_as_matrix, change), name)
    thin = partial(_thin, adapter, name, None)
    return Layer(name, matrix, _rank(adapter, name), thin, name)


def _over_nothing(adapter: Adapter, name: str, shape: tuple[int, ...]) -> Tensor:
    """Form a change that does not depend on the weight."""
    return adapter.change(name, torch.zeros(shape))


def _as_matrix(change: Callable[[], Tensor]) -> Tensor:
    return to_matrix(change())


def _rank(adapter: Adapter, name: str) -> int:
    layer = adapter.layers[name]
    key = layer.down if isinstance(adapter, LoraFolder) else layer.keys["down"]
    return adapter.info(key).shape[0]


def _thin(adapter: Adapter, name: str, shape: tuple[int, ...] | None) -> LowRank:
    found = adapter.low_rank(name, shape)
    assert found is not None
    return found


def _by_names(
    adapter: Adapter, layout: str, options: ConvertOptions, rank: AdapterRank | None
) -> Work:
    """Write another layout by the names that the adapter itself has."""
    _refuse_words(adapter, layout)
    model = _own_model(adapter, layout)
    if adapter.whole or adapter.rows or adapter.wrapped:
        some = (*adapter.whole, *adapter.rows, *(one.name for one in adapter.wrapped))
        raise UsageError(
            f"{adapter.path}: {shortlist(some, 3)}: stored whole, of which another layout holds "
            f"the difference from the base, expected --base. {_NEEDS_BASE}"
        )
    writer = layout_writer(layout)(model, [*adapter.layers, *adapter.biases])
    changes: dict[str, Callable[[], Tensor]] = {
        name: partial(_over_nothing, adapter, name, model.infos[name].shape)
        for name in (*adapter.layers, *adapter.biases)
    }
    whole = [name for name, fate in writer.fates.items() if fate.kind == "whole"]
    if layout == "peft" and (whole or writer.companions):
        raise UsageError(
            f"{adapter.path}: {shortlist(whole, 3)}: differences, of which PEFT stores the tensor "
            f"itself, expected --base. {_NEEDS_BASE}"
        )

    def values(name: str) -> tuple[Tensor, Tensor]:
        change = changes[name]()
        return torch.zeros_like(change), change

    thin = {name: name for name in adapter.layers if _is_thin(adapter, name)}
    return _written(adapter, writer, thin, changes, values, options, rank, ())


def _is_thin(adapter: Adapter, name: str) -> bool:
    """Tell whether a layer's change is a product of two thin matrices."""
    layer = adapter.layers[name]
    return _magnitude(layer) is None and getattr(layer, "kind", "lora") == "lora"


def _refuse_words(adapter: Adapter, layout: str) -> None:
    if adapter.layout == "kohya" and layout != "kohya":
        raise UsageError(
            f"{adapter.path}: kohya's keys name modules by one word "
            f"({shortlist(adapter.layers, 1)}), and the {layout} layout needs their names with "
            f"dots, expected --base. {_NEEDS_BASE}"
        )


def _own_model(adapter: Adapter, layout: str) -> BaseModel:
    """Return the base as far as the adapter tells of it."""
    shapes = {name: adapter.shape(name) for name in adapter.layers}
    shapes |= {name: adapter.info(key).shape for name, (key, _) in adapter.biases.items()}
    infos = {name: TensorInfo(name, torch.float32, shape, "") for name, shape in shapes.items()}
    parts: dict[str, tuple[str, str]] = {}
    if isinstance(adapter, AdapterFile):
        parts = {name: _part(name, adapter) for name in infos}
        roles = {part for part, _ in parts.values()}
        if layout == "peft" and len(roles) > 1:
            raise CheckpointError(
                f"{adapter.path}: changes of {shortlist(sorted(roles))}, expected one model for "
                "PEFT's layout. Choose another --layout."
            )
    if layout == "peft":
        bare = {parts[name][1]: replace(info, name=parts[name][1]) for name, info in infos.items()}
        if len(bare) == len(infos) and list(bare) != list(infos):
            infos, parts = {**infos, **bare}, {}
    return BaseModel(infos, {}, adapter.base or "", parts)


def _part(name: str, adapter: AdapterFile) -> tuple[str, str]:
    part, _, inner = name.partition(".")
    if part == "diffusion_model":
        others = [one.inner for one in adapter.layers.values()]
        part = BaseModel({one: TensorInfo(one, torch.float32, (), "") for one in others}).part(
            inner
        )[0]
    return part, inner


@dataclass(frozen=True)
class _Seen:
    """An adapter seen from its base.

    Attributes
    ----------
    base : AuditSource
    found : AdapterChanges
    others : mapping of str to str
        What the adapter calls a tensor, by its name in the base.
    """

    base: AuditSource
    found: AdapterChanges
    others: Mapping[str, str]

    def change(self, name: str) -> Tensor:
        """Form the change of a tensor, in float64."""
        weight = self.base.read(name)
        if name not in self.found.changes:
            return torch.sub(self._stored(name).double(), weight.double())
        made = self.found.changes[name](weight)
        formed = made.whole_change
        if formed is not None:
            return formed
        assert made.weight is not None
        return torch.sub(made.weight.double(), weight.double())

    def values(self, name: str) -> tuple[Tensor, Tensor]:
        """Return a tensor before and after the change."""
        weight = self.base.read(name)
        if name not in self.others:
            return weight, weight
        if name not in self.found.changes:
            return weight, self._stored(name)
        return weight, (weight.double() + self.change(name)).to(weight.dtype)

    def _stored(self, name: str) -> Tensor:
        adapter = self.found.adapter
        return adapter.read(adapter.whole[self.others[name]])


def _seen_from(base: AuditSource, adapter: Adapter) -> _Seen:
    found = adapter_changes(base, adapter)
    bound, seen, others = found.adapter, set[str](), {}
    for name, mine in found.others.items():
        # A head that is tied to the embedding changes with it.
        if mine not in seen or not (mine in bound.layers or mine in bound.rows):
            others[name] = mine
        seen.add(mine)
    return _Seen(base, found, others)


def _over_base(
    adapter: Adapter,
    base: AuditSource,
    layout: str,
    options: ConvertOptions,
    rank: AdapterRank | None,
    progress: Progress,
) -> Work:
    """Write another layout by the names of a base."""
    side = _seen_from(base, adapter)
    bound, others = side.found.adapter, side.others
    renamed = names_for(layout, base.infos, base.config, base.path, others, progress)
    model = BaseModel(base.infos, base.config or {}, str(options.base), renamed=renamed)
    writer = layout_writer(layout)(model, list(others))
    dropped = [
        LeftOut(one.name, one.reason, bound.bytes_of(one.name)) for one in side.found.tuned_only
    ]
    thin = {
        name: mine
        for name, mine in others.items()
        if mine in bound.layers and name in side.found.changes and _is_thin(bound, mine)
    }
    changes = {name: partial(side.change, name) for name in others}
    return _written(bound, writer, thin, changes, side.values, options, rank, dropped)


def _written(
    adapter: Adapter,
    writer: LayoutWriter,
    thin: Mapping[str, str],
    changes: Mapping[str, Callable[[], Tensor]],
    values: Callable[[str], tuple[Tensor, Tensor]],
    options: ConvertOptions,
    rank: AdapterRank | None,
    dropped: Sequence[LeftOut],
) -> Work:
    """Hand the changes of named tensors to the writer of a layout."""
    infos = writer.base.infos
    by_kind = {
        kind: [name for name, fate in writer.fates.items() if fate.kind == kind]
        for kind in ("low rank", "whole", "dropped")
    }
    layers = []
    for name in by_kind["low rank"]:
        shape = infos[name].shape
        if name in thin and _is_product(adapter, thin[name], shape):
            mine = thin[name]
            form = _former(adapter, mine, name, shape)
            layers.append(Layer(name, sides_of(shape), _rank(adapter, mine), form, name))
        else:
            layers.append(
                Layer(name, sides_of(shape), None, partial(_as_matrix, changes[name]), name)
            )
    dense = [one.name for one in layers if one.rank is None]
    if dense and rank is None:
        raise UsageError(
            f"{adapter.path}: {counted(len(dense), 'layers', 'are')} no product of two matrices "
            f"({shortlist(dense, 2)}), expected --rank. Say which rank they get."
        )
    lost = 0.0
    out = list(dropped)
    for name in by_kind["dropped"]:
        lost += float(changes[name]().norm()) ** 2
        out.append(LeftOut(name, writer.fates[name].reason, infos[name].nbytes))
    if not layers and not by_kind["whole"]:
        reasons = sorted({one.reason for one in out})
        raise CheckpointError(
            f"{adapter.path}: the {writer.name} layout can hold nothing of it "
            f"({shortlist(reasons, 2)}). Choose another --layout."
        )

    def rest() -> Iterator[Entries]:
        for name in (*by_kind["whole"], *writer.companions):
            yield writer.whole(name, *values(name), dtype)

    dtype = _dtype(adapter, options)
    return Work(
        kind=adapter.layout,
        layout=writer.name,
        is_folder=writer.is_folder,
        layers=layers,
        scaled=lambda name: writer.has_scale,
        entries=writer.entries,
        rest=rest,
        metadata=lambda made, about: _handed_on(
            adapter, writer.metadata(plain_ranks(made), about), made, writer
        ),
        config=lambda made: _config(adapter, writer, made),
        weights_file=writer.weights_file if writer.is_folder else None,
        dtype=dtype,
        whole=tuple(by_kind["whole"]),
        dropped=out,
        lost=lost,
    )


def _is_product(adapter: Adapter, mine: str, shape: tuple[int, ...]) -> bool:
    """Whether a change is a product of two matrices of the weight's own matrix."""
    return mine not in adapter.whole and len(shape) > 1


def _former(
    adapter: Adapter, mine: str, name: str, shape: tuple[int, ...]
) -> Callable[[], LowRank]:
    return lambda: replace(_thin(adapter, mine, shape), name=name)


def _config(adapter: Adapter, writer: LayoutWriter, made: Ranks) -> dict[str, Any] | None:
    found = writer.config(plain_ranks(made))
    if found is not None:
        known = adapter.base or adapter.metadata.get("base_model_name_or_path")
        found["base_model_name_or_path"] = known or found["base_model_name_or_path"] or None
        if isinstance(adapter, LoraFolder):
            kept = ("task_type", "revision", "auto_mapping")
            found |= {key: adapter.config[key] for key in kept if key in adapter.config}
    return found


def _dtype(adapter: Adapter, options: ConvertOptions) -> torch.dtype:
    """Return the dtype asked for; else that of the adapter's largest tensors."""
    if options.dtype is not None:
        return dtype_named(options.dtype)
    sizes: dict[torch.dtype, int] = {}
    for key in adapter.keys:
        info = adapter.info(key)
        if info.dtype.is_floating_point and len(info.shape) > 1:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.numel
    most = max(sizes, key=lambda one: sizes[one], default=torch.float32)
    return most if dtype_name(most) in DTYPES else torch.float32


def _handed_on(
    adapter: Adapter, new: Mapping[str, str], made: Ranks, writer: LayoutWriter | None
) -> dict[str, str]:
    """Return the metadata of an adapter with what was done added to it."""
    old = {key: value for key, value in adapter.metadata.items() if not key.startswith(_STALE)}
    found = {**old, **new}
    for key in (COMMENT_KEY, MADE_KEY):
        if key in old and key in new and old[key] != "None":
            found[key] = f"{old[key]}; {new[key]}"
    if writer is None and "ss_network_module" in old:
        found["ss_network_module"] = old["ss_network_module"]
    if isinstance(adapter, LoraFolder) and adapter.base and writer is not None:
        found.setdefault("base_model_name_or_path", adapter.base)
    if STATED_KEY in found and (writer is None or writer.name == "diffusers"):
        found[STATED_KEY] = json.dumps(_restated(adapter, made))
    return found


def _restated(adapter: Adapter, made: Ranks) -> dict[str, Any]:
    """Return what diffusers says of an adapter, with the ranks that were written."""
    assert isinstance(adapter, AdapterFile)
    found = dict(adapter.stated)
    parts: dict[str, dict[str, LowRank]] = {}
    for name, layer in made.items():
        one = adapter.layers[name]
        parts.setdefault(one.part, {})[one.inner] = layer
    for part, layers in parts.items():
        ranks = {inner: layer.rank for inner, layer in layers.items()}
        found[f"{part}.r"], found[f"{part}.rank_pattern"] = pattern(ranks)
        # Alpha is the rank: each layer has scale 1.
        found[f"{part}.lora_alpha"] = found[f"{part}.r"]
        found[f"{part}.alpha_pattern"] = dict(found[f"{part}.rank_pattern"])
        found[f"{part}.use_rslora"] = False
    return found
