"""What is attached to a live model: its layers, their singular values, what else was trained."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from svftool.attaching.extras import KINDS
from svftool.attaching.layer import AttachedLayer, is_own
from svftool.attaching.names import NameMap
from svftool.attaching.weight import AttachedWeight
from svftool.checkpoints import TensorInfo, replace_output
from svftool.errors import FactorsError, ModelError, UsageError, counted, shortlist
from svftool.factors import (
    FactorStore,
    SpectralChange,
    TunedFile,
    check_tuned,
    open_factors,
    read_tuned,
    write_tuned,
)
from svftool.factors.mixture import Expert, Mixture
from svftool.files.folder import read_config

KEY = "_svf_attachment"
"""Attribute under which a model keeps its attachment."""

LIVE: weakref.WeakSet[Attachment] = weakref.WeakSet()
"""Every attachment that there is, copies too."""


class Attachment:
    """Trainable singular values of a live model; made by `attach`.

    Attributes
    ----------
    model : nn.Module
        The model that was attached to.
    layers : mapping of str to AttachedLayer
        By tensor name of the file. Names of one tied parameter share a layer.
    weights : mapping of str to AttachedWeight
        By name of the live parameter.
    names : NameMap
        Names of the file to live parameters, and back.
    factors : Path
        The factor checkpoint.
    replaced : mapping of str to Tensor
        What a tuned file's whole tensors replaced, by name in the file; kept for the next swap.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Make an attachment that others find, also as a copy or out of a pickle."""
        made = super().__new__(cls)
        LIVE.add(made)
        return made

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Mapping[str, AttachedLayer],
        weights: Mapping[str, AttachedWeight],
        names: NameMap,
        factors: Path,
    ) -> None:
        self.model = model
        self.layers = dict(layers)
        self.weights = dict(weights)
        self.names = names
        self.factors = factors
        self._required = {name: p.requires_grad for name, p in model.named_parameters()}
        self._buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        self.replaced: dict[str, Tensor] = {}

    def was_trainable(self, name: str, default: bool) -> bool:
        """Whether a parameter required a gradient before the model was attached to."""
        return self._required.get(name, default)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the trainable numbers; of singular values alone, one parameter for each layer."""
        for _, parameter in self.named_parameters():
            yield parameter

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the trainable numbers by kind: ``singular_values``, ``entries`` ..."""
        found: dict[str, list[nn.Parameter]] = {}
        for layer in dict.fromkeys(self.layers.values()):
            for part, parameter in layer.trainable().items():
                found.setdefault(KINDS[part], []).append(parameter)
        return found

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the trainable numbers with the file's tensor names.

        Whatever is beside the singular values has its part's name behind it: ``NAME.entry``.
        """
        seen: set[nn.Parameter] = set()
        for name, layer in self.layers.items():
            for part, parameter in layer.trainable().items():
                if parameter not in seen:
                    seen.add(parameter)
                    yield name if part == "S" else f"{name}.{part}", parameter

    @torch.no_grad()
    def singular_values(self) -> dict[str, Tensor]:
        """Return the present singular values by tensor name, on the CPU."""
        for live, weight in self.weights.items():
            weight.take_back(self.model.get_parameter(live))
        return {name: layer.values().cpu() for name, layer in self.layers.items()}

    @torch.no_grad()
    def parts(self) -> dict[str, dict[str, Tensor]]:
        """Return what layers have beside singular values, on the CPU; see `TunedFile.parts`."""
        found = {name: layer.parts() for name, layer in self.layers.items()}
        return {
            name: {part: value.cpu() for part, value in parts.items()}
            for name, parts in found.items()
            if parts
        }

    def set_singular_values(self, values: Mapping[str, Tensor]) -> None:
        """Set the singular values of some layers; the others keep theirs.

        Parameters
        ----------
        values : mapping of str to (..., k) Tensor
            By tensor name.

        Raises
        ------
        FactorsError
            If a name is not attached or a shape does not fit; nothing is set then.
        """
        self.set_deltas(
            {
                name: S - self.layers[name].S_base.detach().to(S)
                if name in self.layers and S.shape == self.layers[name].S_base.shape
                else S
                for name, S in values.items()
            }
        )

    def set_deltas(self, deltas: Mapping[str, Tensor]) -> None:
        """Set ``S - S_base`` of some layers, and nothing else; as `set_singular_values`."""
        self.set_changes({name: SpectralChange(delta) for name, delta in deltas.items()})

    def set_changes(self, changes: Mapping[str, SpectralChange]) -> None:
        """Set everything that changes in some layers; as `set_singular_values`."""
        wrong = []
        for name, change in changes.items():
            layer = self.layers.get(name)
            if layer is None:
                wrong.append(f"{name} (not attached)")
            elif change.delta.shape != layer.S_base.shape:
                shapes = tuple(change.delta.shape), tuple(layer.S_base.shape)
                wrong.append(f"{name} ({shapes[0]}, expected {shapes[1]})")
            elif reason := layer.extras.misfit(change):
                wrong.append(f"{name} ({reason})")
        if wrong:
            raise FactorsError(
                f"{self.factors}: singular values for {counted(len(wrong), 'layers', 'do')} not "
                f"fit the attached model: {shortlist(wrong)}. Attach the factors that they were "
                "trained on."
            )
        for name, change in changes.items():
            self.layers[name].set_change(
                change.with_tensors([one.detach() for one in change.tensors()])
            )

    def whole_tensors(self) -> dict[str, Tensor]:
        """Return every other tensor that training changes, by its name in the file.

        These are the parameters that require a gradient, and buffers (running statistics) that no
        longer are what they were when the model was attached to.
        """
        attached = {self.model.get_parameter(live) for live in self.weights}
        parameters = (
            (name, one)
            for name, one in self.model.named_parameters(remove_duplicate=False)
            if one.requires_grad and is_own(name) and one not in attached
        )
        buffers = (
            (name, one)
            for name, one in self.model.named_buffers()
            if name in self._buffers and not same(self._buffers[name], one)
        )
        return self.names.in_file((*parameters, *buffers))


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in shape and every value, wherever they are."""
    return a.shape == b.shape and torch.equal(a.to(b.device), b)


def find_attachment(model: nn.Module) -> Attachment | None:
    """Return the attachment of a model, or of the model inside a wrapper; None if there is none."""
    for module in model.modules():
        found = module.__dict__.get(KEY)
        if isinstance(found, Attachment):
            return found
    return None


def require_attachment(model: nn.Module) -> Attachment:
    """Return the attachment of a model.

    Raises
    ------
    ModelError
        If the model has none, or holds several.
    """
    found = find_attachment(model)
    if found is None:
        raise ModelError("the model has no attached singular values. Call svftool.attach first.")
    paths = [path for path, part in model.named_modules() if KEY in part.__dict__]
    if len(paths) > 1:
        raise ModelError(
            f"{len(paths)} parts have singular values of their own ({shortlist(paths)}), expected "
            "one. Call this on each of them."
        )
    return found


# Save what was trained on a live model as a tuned file, and swap tuned files on it.


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
            parts=attachment.parts(),
            whole=attachment.whole_tensors(),
            task=task,
            classes=classes,
            training=training,
        )


def load_tuned(model: nn.Module, path: str | os.PathLike[str] | Mapping[Any, float]) -> TunedFile:
    """Put a tuned file, or a mixture of some, on a live model in place of what was there before.

    Layers that the file does not hold go back to the base, and so do whole tensors (heads, norms)
    of the tuned file before. A mixture gives the weights that `svftool.merge` makes of it.

    Parameters
    ----------
    model : nn.Module
        A model that was attached to, or a wrapper around one; changed in place.
    path : path-like, or mapping of path-like to float
        The tuned file, or several with their weights: ``{"a.svf.safetensors": 0.7, ...}``.

    Returns
    -------
    TunedFile
        What was loaded: its classes, task and training summary.

    Raises
    ------
    FactorsError
        If a file belongs to another base or does not fit, or heads are of different classes; the
        model is not changed then.
    ModelError
        If nothing is attached.
    NumericalError
        If a weight of a mixture would not be finite; the model is not changed then.
    UsageError
        If a weight is not finite, or there is no file.
    """
    attachment = require_attachment(model)
    with open_factors(attachment.factors) as store:
        if isinstance(path, Mapping):
            tuned, changes = _mix(attachment, store, path)
        else:
            tuned = check_tuned(read_tuned(path), store)
            changes = {name: tuned.change(name) for name in tuned.S}
        whole = _plan_whole(attachment, tuned, store)
    nothing = {
        name: SpectralChange(torch.zeros_like(layer.S_base))
        for name, layer in attachment.layers.items()
    }
    attachment.set_changes(nothing | changes)
    for live, value in whole.items():
        _assign(attachment, live, value)
    return tuned


def _mix(
    attachment: Attachment, store: FactorStore, weights: Mapping[Any, float]
) -> tuple[TunedFile, dict[str, SpectralChange]]:
    """Return what tuned files give together, and the changes of layers, in float64."""
    if not weights:
        raise UsageError("an empty mixture, expected tuned files with their weights")
    experts = [
        Expert(check_tuned(read_tuned(path), store), float(weight))
        for path, weight in weights.items()
    ]
    base = _LiveBase(attachment, store)
    mixture = Mixture(store, base, experts)
    mixed = mixture.mixed()
    changes = {name: mixture.terms(name)[0][1] for name in mixed.S if name in attachment.layers}
    for name, change in changes.items():
        if not _surely_finite(base.read(name), change):
            mixture.tensor(name)  # refuses what a merge refuses
    return mixed, {name: changes.get(name) or mixed.change(name) for name in mixed.S}


def _surely_finite(weight: Tensor, change: SpectralChange) -> bool:
    """Whether no entry can overflow: none changes by more than the largest singular value does."""
    largest = float(weight.abs().max()) + float(change.delta.abs().max())
    return change.plain and largest < torch.finfo(weight.dtype).max / 2


class _LiveBase:
    """The base's tensors, as far as a live model and its factors still hold them."""

    def __init__(self, attachment: Attachment, store: FactorStore) -> None:
        self._attachment = attachment
        self._store = store
        self.config = read_config(store.path)
        names = (*store.layers, *store.config.left_whole)
        self.infos = {name: info for name in names if (info := self._info(name)) is not None}

    def _info(self, name: str) -> TensorInfo | None:
        if name in self._store.layers or name in self._store.whole:
            return self._store.info(name)
        value = self._live(name)
        return None if value is None else TensorInfo(name, value.dtype, tuple(value.shape), "")

    def _live(self, name: str) -> Tensor | None:
        """Find a tensor that the factors do not hold, as it was before a tuned file came."""
        if name in self._attachment.replaced:
            return self._attachment.replaced[name]
        placement = self._attachment.names.placements.get(name)
        found = None if placement is None else _find(self._attachment.model, placement.live)
        if placement is None or found is None:
            return None
        return placement.region.of(found[2].detach())

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        if name in self._store.whole:
            return self._store.read_whole(name)
        value = self._live(name)
        if value is None:
            raise FactorsError(
                f"{self._store.path}: tensor {name!r} has no place in the model, expected the "
                "model that was decomposed. Check the model."
            )
        return value.cpu()


def _plan_whole(attachment: Attachment, tuned: TunedFile, store: FactorStore) -> dict[str, Tensor]:
    """Return every live tensor to write: the base's where a former one goes, then the file's."""
    former = set(attachment.whole_tensors()) | set(attachment.replaced)
    wanted: dict[str, Tensor] = {}
    for name in sorted(former - set(tuned.whole)):
        before = store.read_whole(name) if name in store.whole else attachment.replaced.get(name)
        if before is not None:
            wanted[name] = before.clone()
    wanted |= tuned.whole
    planned: dict[str, Tensor] = {}
    homeless = []
    for name, value in wanted.items():
        live = [n for n in attachment.names.live_names(name) if _find(attachment.model, n)]
        if live:
            planned[live[0]] = _whole_live(attachment, name, live[0], value, planned)
        else:
            homeless.append(name)
    if homeless:
        raise FactorsError(
            f"{tuned.path}: {counted(len(homeless), 'tensors', 'have')} no place in the model: "
            f"{shortlist(homeless)}. Build the model with the head that the file was trained with."
        )
    _check_fits(attachment.model, planned, tuned.path)
    return planned


def _whole_live(
    attachment: Attachment, name: str, live: str, value: Tensor, planned: Mapping[str, Tensor]
) -> Tensor:
    """Return a tensor of the file as the live one is to be: with the rest of it, if it is packed.

    Raises
    ------
    FactorsError
        If the file's tensor does not fit its place.
    """
    placement, found = attachment.names.placements.get(name), _find(attachment.model, live)
    if placement is None or placement.region.whole or found is None:
        return value
    packed = planned.get(live)
    if packed is None:
        packed = found[2].detach().clone(memory_format=torch.contiguous_format)
    part = placement.region.of(packed)
    if part.shape != value.shape:
        raise FactorsError(
            f"{name} has shape {tuple(value.shape)}, expected {tuple(part.shape)} as the model has "
            "it. Give the model that the file was trained with."
        )
    part.copy_(value)
    return packed


_ROWS = ("out_features", "out_channels", "num_embeddings")
"""Sizes of a module whose rows may be more or fewer in a tuned file: a head has one a class."""


def _check_fits(model: nn.Module, planned: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors of another shape than the model's, but for the rows of a head."""
    for live, value in planned.items():
        found = _find(model, live)
        if found is None or value.shape == found[2].shape:
            continue
        owner, attribute, present = found
        want = list(present.shape)
        if value.ndim and want and any(hasattr(owner, size) for size in _ROWS):
            other = "bias" if attribute == "weight" else "weight"
            beside = planned.get(f"{live.removesuffix(attribute)}{other}")
            beside = getattr(owner, other, None) if beside is None else beside
            want[0] = len(value) if beside is None else len(beside)
        if list(value.shape) != want:
            raise FactorsError(
                f"{path}: {live} has shape {tuple(value.shape)}, expected {tuple(want)} as the "
                "model has it. Give the model that the file was trained with."
            )


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
    for name, before in attachment.names.in_file([(live, present)]).items():
        attachment.replaced.setdefault(name, before.clone())
    if present.shape == value.shape:
        present.copy_(value)
        return
    fresh = value.to(present).clone()
    if isinstance(present, nn.Parameter):
        setattr(owner, attribute, nn.Parameter(fresh, requires_grad=present.requires_grad))
    else:
        setattr(owner, attribute, fresh)
    for size in _ROWS:
        if hasattr(owner, size):
            setattr(owner, size, fresh.shape[0])
