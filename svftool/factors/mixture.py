"""What a base and weighted tuned files give, tensor by tensor."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from svftool.checkpoints import Checkpoint, TensorInfo, class_labels, is_code
from svftool.choices.merging import check_weight, parse_weighted
from svftool.errors import FactorsError, ModelError, NumericalError, shortlist
from svftool.factors import (
    FactorStore,
    Merged,
    SpectralChange,
    Terms,
    TunedFile,
    add_change,
    read_tuned,
    rebuild,
)
from svftool.factors.delta import norm
from svftool.factors.overflow import Rounding
from svftool.factors.spectral import gathered
from svftool.factors.stated import stated_by
from svftool.numerics import ThreadPool
from svftool.numerics.rounding import FLOATS

ChangeOf = Callable[[Tensor], Tensor]
"""Forms the change of a tensor, float64 and of its shape, from the base's values."""

# A layer at full rank: both factors in float32 and float64, and the weight before and after.
_BYTES_AN_ENTRY = 32


@dataclass(frozen=True)
class Expert:
    """A tuned file or an adapter, and its weight in the mixture.

    Attributes
    ----------
    tuned : TunedFile
        Of an adapter: what it stores whole.
    weight : float
    changes : mapping of str to callable
        Of an adapter: what forms the change of each tensor that it changes.
    untied : bool
        Of an adapter: whether an output head that was tied to the embedding no longer is.

    Raises
    ------
    UsageError
        If the weight is NaN or infinite.
    """

    tuned: TunedFile
    weight: float = 1.0
    changes: Mapping[str, ChangeOf] = field(default_factory=dict)
    untied: bool = False

    def __post_init__(self) -> None:
        check_weight(self.tuned.path, self.weight)

    @classmethod
    def parse(cls, given: str | os.PathLike[str] | tuple[str | os.PathLike[str], float]) -> Expert:
        """Read a tuned file given as a path, ``PATH@WEIGHT``, or a pair of both."""
        path, weight = parse_weighted(given)
        return cls(read_tuned(path), weight)


@dataclass(frozen=True)
class LayerChange:
    """What merging did to one decomposed layer.

    Attributes
    ----------
    name : str
        Tensor name.
    changed : bool
        Whether its singular values changed.
    relative_change : float
        ``||delta W||_F / ||W||_F``.
    rounding_loss : float
        Share of the delta that rounding to the dtype swallowed.
    """

    name: str
    changed: bool
    relative_change: float
    rounding_loss: float


class BaseValues(Protocol):
    """What a mixture changes: the tensors of a base, in a file or on a live model."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Dtype and shape of every tensor."""

    @property
    def config(self) -> Mapping[str, Any] | None:
        """The base's ``config.json``."""

    def read(self, name: str) -> Tensor:
        """Read one tensor."""


class Mixture:
    """The merged checkpoint, computed one tensor at a time.

    Parameters
    ----------
    store : FactorStore or None
        Factors of the base; None where only adapters are merged.
    base : Checkpoint, BaseValues or None
        The base; None rebuilds weights from their factors alone.
    experts : sequence of Expert
        Checked tuned files.
    allow_overflow : bool
        Clip values that the dtype of their tensor cannot hold, instead of refusing them.
    dtype : torch.dtype, optional
        What all floating numbers are rounded to; codes and what counts stay as they are.

    Attributes
    ----------
    base : Checkpoint or None
        The base, where it is a checkpoint.
    infos : mapping of str to TensorInfo
        Every tensor of the result: the base's in its order, then added ones.
    added, replaced : tuple of str
        Tensors trained whole that the base does not have, and that it has.
    clipped : mapping of str to int
        How many values were clipped, by tensor; of the tensors computed so far.

    Raises
    ------
    FactorsError
        If tensors trained whole cannot be mixed, or there is no base and the factors hold layers
        alone.
    """

    def __init__(
        self,
        store: FactorStore | None,
        base: Checkpoint | BaseValues | None,
        experts: Sequence[Expert],
        *,
        allow_overflow: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._factors = store
        if base is None and self.store.config.layers_only:
            raise FactorsError(
                f"{self.store.path}: holds the decomposed layers only, expected the other tensors "
                "too. Merge without --without-base."
            )
        self._layers = {} if store is None else store.layers
        self.base = base if isinstance(base, Checkpoint) else None
        self._values = base
        self.experts = tuple(experts)
        self.allow_overflow = allow_overflow
        self._rounding = Rounding(allow_overflow=allow_overflow)
        self.clipped: Mapping[str, int] = self._rounding.clipped
        self._base_infos = _stored_infos(self.store) if base is None else base.infos
        trained = dict.fromkeys(name for one in experts for name in one.tuned.whole)
        self._adapted = {name for one in experts for name in one.changes}
        self.added = tuple(name for name in trained if name not in self._base_infos)
        self.replaced = tuple(name for name in trained if name in self._base_infos)
        self.infos: Mapping[str, TensorInfo] = {
            **self._base_infos,
            **{name: self._whole_info(name) for name in trained},
        }
        self.dtype = dtype
        if dtype is not None:
            self.infos = {
                name: replace(info, dtype=dtype) if _is_number(info) else info
                for name, info in self.infos.items()
            }
        self._check_heads()

    @property
    def store(self) -> FactorStore:
        """The factors."""
        if self._factors is None:
            raise FactorsError("no factors, expected those of the base")
        return self._factors

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names of the head, where exactly one is new."""
        known = {one.tuned.classes for one in self.experts if one.tuned.classes and one.tuned.whole}
        return known.pop() if len(known) == 1 else None

    @property
    def untied(self) -> bool:
        """Whether the output head is no longer the embedding."""
        return any(one.untied for one in self.experts)

    @property
    def reshaped(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """Shapes in the base and in the result, of the tensors where they differ."""
        pairs = {
            name: (self._base_infos[name].shape, self.infos[name].shape) for name in self.replaced
        }
        return {name: (old, new) for name, (old, new) in pairs.items() if old != new}

    @property
    def rounded(self) -> set[str]:
        """Tensors of the base that are written in another dtype."""
        kept = self._base_infos.keys() - set(self.replaced)
        return {one for one in kept if self.infos[one].dtype != self._base_infos[one].dtype}

    @property
    def rebuilt_error(self) -> float | None:
        """Largest reconstruction error of a layer; None where the base is used."""
        if self._values is not None:
            return None
        return max((one.reconstruction_error for one in self.store.layers.values()), default=0.0)

    def tensor(
        self, name: str, pool: ThreadPool | None = None
    ) -> tuple[Tensor, LayerChange | None]:
        """Compute one tensor of the result, and what became of it if it is a layer.

        Safe to call from several threads. The threads of `pool` help with a large layer.

        Raises
        ------
        NumericalError
            If a value becomes NaN or infinite, or the tensor's dtype cannot hold it.
        """
        if name in self._adapted:
            return self._adapt(name)
        if name in self.added or name in self.replaced:
            return self._mix_whole(name), None
        if name not in self._layers:
            return self._in_dtype(name, self._read(name)), None
        terms = self.terms(name)
        merged = self._merge_layer(name, terms, pool)
        # The terms decide: their norm may be too small for a number, or be lost in rounding.
        changed = any(one.moves() for _, one in terms)
        return merged.weight, LayerChange(
            name, changed, merged.relative_change, merged.rounding_loss
        )

    def bytes_of(self, name: str) -> int:
        """Bound the bytes that `tensor` takes: factors and sums of a layer are in float64 too."""
        info = self.infos[name]
        if name in self._layers or name in self._adapted:
            return _BYTES_AN_ENTRY * math.prod(info.shape)
        return 2 * info.nbytes

    def mixed(self) -> TunedFile:
        """Return the tuned file that gives the same as these do; its path is the first one's.

        Numbers are float64 where float32 would not keep them.

        Raises
        ------
        FactorsError
            If scales of rows or columns would have to be summed.
        """
        S_base, S, parts = {}, {}, {}
        for name in dict.fromkeys(name for one in self.experts for name in one.tuned.S):
            if name not in self.added and name not in self.replaced:
                change = self._only_change(name)
                S_base[name] = self.store.read_S(name).float()
                S[name] = _narrow(S_base[name].double() + change.delta)
                parts[name] = {
                    part: value if part == "index" else _narrow(value)
                    for part, value in change.parts().items()
                }
        stated = stated_by([(one.tuned, one.weight) for one in self.experts])
        return TunedFile(
            path=self.experts[0].tuned.path,
            S=S,
            S_base=S_base,
            whole={name: self.tensor(name)[0] for name in (*self.replaced, *self.added)},
            base_fingerprint=self.store.base_fingerprint,
            factors_fingerprint=self.store.fingerprint,
            probes={},
            task=stated.task,
            classes=stated.classes,
            training=stated.training,
            parts={name: held for name, held in parts.items() if held},
        )

    def _only_change(self, name: str) -> SpectralChange:
        """Return what changes in a layer as one change, as a tuned file holds it."""
        terms = self.terms(name)
        if len(terms) != 1 or terms[0][0] != 1.0:
            raise FactorsError(
                f"tensor {name!r}: scales of rows and columns do not add up in a tuned file, "
                "expected one file that scales, with weight 1, and no other for this layer. Merge "
                "them to a dense output."
            )
        return terms[0][1]

    def _read(self, name: str) -> Tensor:
        return self.store.read_whole(name) if self._values is None else self._values.read(name)

    def _in_dtype(self, name: str, values: Tensor) -> Tensor:
        """Round a tensor of the base, where it is written in another dtype."""
        dtype = self.infos[name].dtype
        if dtype == values.dtype:
            return values
        wide = values.double()
        # What is not finite in the base may stay so; what overflows is refused or clipped.
        return self._rounded(name, wide, dtype, torch.where(wide.isfinite(), math.inf, wide))

    def terms(self, name: str) -> Terms:
        """Return what changes in one layer, in float64: what adds up as one, scales each by itself.

        Raises
        ------
        NumericalError
            If a sum is not finite.
        """
        held = [(one.weight, one.tuned.change(name)) for one in self.experts if name in one.tuned.S]
        k = self.store.layers[name].rank
        nothing = SpectralChange(torch.zeros(k, dtype=torch.float64))
        terms = gathered(held) if held else [(1.0, nothing)]
        if not all(one.finite() for _, one in terms):
            raise NumericalError(
                f"tensor {name!r}: the weighted change of its singular values is not finite, "
                "expected finite numbers. Give smaller weights."
            )
        return terms

    def _adapt(self, name: str) -> tuple[Tensor, LayerChange]:
        """Add what adapters change in a tensor, and whatever else changes it, rounded once."""
        info, known = self.infos[name], self._base_infos[name]
        if info.shape != known.shape:
            raise FactorsError(
                f"tensor {name!r}: trained with shape {info.shape} and adapted in {known.shape}, "
                "expected one shape. Merge them one at a time."
            )
        weight = self._read(name)
        start = weight.double()
        change = torch.zeros_like(start)
        for one in self.experts:
            if name in one.changes:
                change += one.weight * one.changes[name](weight)
            elif name in one.tuned.whole:
                value = one.tuned.whole[name].double()
                change += one.weight * torch.where(value == start, 0.0, value - start)
        if name in self._layers and any(name in one.tuned.S for one in self.experts):
            change += self._formed(name, self.terms(name))
        if not bool(torch.any(change)):
            return self._in_dtype(name, weight), LayerChange(name, False, 0.0, 0.0)
        total = start + change
        merged = self._rounded(name, total, info.dtype, start)
        size, drift = norm(change), norm(start)
        return merged, LayerChange(
            name,
            True,
            size / drift if drift > 0.0 else math.inf,
            norm(torch.nan_to_num(merged.double() - total)) / size if size > 0.0 else 0.0,
        )

    def _merge_layer(self, name: str, terms: Terms, pool: ThreadPool | None) -> Merged:
        layer = self.store.layers[name]
        if self._values is not None and not any(one.moves() for _, one in terms):
            return Merged(self._in_dtype(name, self._values.read(name)), 0.0, 0.0)
        if self._values is not None:
            merged = add_change(
                self._values.read(name),
                self.store.read(name),
                terms,
                view=layer.view,
                clip=self.allow_overflow,
                dtype=self.infos[name].dtype,
                pool=pool,
            )
            self._rounding.judge(name, merged.undefined, merged.overflow, self.infos[name].dtype)
            return merged
        S = self.store.read_S(name).double()
        if all(one.plain for _, one in terms):
            change = norm(terms[0][1].delta) / max(norm(S), torch.finfo(torch.float64).tiny)
            total = self._rebuilt(name, S + terms[0][1].delta)
        else:
            formed, total = self._formed(name, terms), self._rebuilt(name, S)
            change = norm(formed) / max(norm(S), torch.finfo(torch.float64).tiny)
            total = total + formed
        return Merged(self._rounded(name, total, self.infos[name].dtype), change, 0.0)

    def _formed(self, name: str, terms: Terms) -> Tensor:
        """Form the change of a layer, float64 and of its shape."""
        layer = self.store.layers[name]
        zero = torch.zeros(layer.shape, dtype=torch.float64)
        return add_change(zero, self.store.read(name), terms, view=layer.view).weight

    def _rebuilt(self, name: str, S: Tensor) -> Tensor:
        """Build a layer from its factors, in float64."""
        layer = self.store.layers[name]
        return rebuild(
            self.store.read(name), S, shape=layer.shape, dtype=torch.float64, view=layer.view
        )

    def _rounded(
        self, name: str, values: Tensor, dtype: torch.dtype, start: Tensor | None = None
    ) -> Tensor:
        return self._rounding.round(self.infos[name], values, dtype, start)

    def _whole_info(self, name: str) -> TensorInfo:
        tensors = [one.tuned.whole[name] for one in self.experts if name in one.tuned.whole]
        shapes = {tuple(tensor.shape) for tensor in tensors}
        known = self._base_infos.get(name)
        if len(shapes) > 1:
            found = " and ".join(str(shape) for shape in sorted(shapes))
            raise FactorsError(
                f"tensor {name!r}: trained with shape {found}, expected one shape in every tuned "
                "file of a mixture. Merge them one at a time."
            )
        if known is None:
            return TensorInfo(name, tensors[0].dtype, shapes.pop(), "")
        return replace(known, shape=shapes.pop())

    def _mix_whole(self, name: str) -> Tensor:
        info = self.infos[name]
        trained = [one for one in self.experts if name in one.tuned.whole]
        in_factors = name in self._layers and any(name in one.tuned.S for one in self.experts)
        based = self._is_based(name, info)
        # A mean of one is that one, whatever its weight.
        alone = len(trained) == 1 and (trained[0].weight == 1.0 or not based)
        only = trained[0].tuned.whole[name] if alone else None
        if only is not None and not in_factors and _is_storable(only, info.dtype):
            return only
        if info.dtype.is_complex or any(one.tuned.whole[name].is_complex() for one in trained):
            raise FactorsError(
                f"tensor {name!r}: complex numbers, expected real ones to be weighted or stored in "
                "another dtype. Merge its tuned file alone, with weight 1."
            )
        start = self._start(name) if based else None
        if only is not None:
            total = only.double()
        else:
            total = _mean(name, trained) if start is None else _summed(name, start, trained)
        if in_factors:
            total = total + self._formed(name, self.terms(name))
        return self._rounded(name, total, info.dtype, start)

    def _is_based(self, name: str, info: TensorInfo) -> bool:
        """Whether the base has a tensor of this shape, from which changes are measured."""
        known = self._base_infos.get(name)
        return known is not None and known.shape == info.shape

    def _start(self, name: str) -> Tensor:
        """Return the base's values of a whole tensor, in float64."""
        if self._values is None and name in self._layers:
            return self._rebuilt(name, self.store.read_S(name).double())
        return self._read(name).double()

    def _check_heads(self) -> None:
        """Refuse to sum heads whose rows stand for different classes."""
        for name, info in self.infos.items():
            heads = [one for one in self.experts if _is_head(one.tuned, name)]
            known = {one.tuned.classes for one in heads}
            base = self._base_classes(name, info)
            total = sum(one.weight for one in heads)
            if heads and base is not None and abs(total - 1.0) > _WEIGHT_SLACK:
                known.add(base)
            if len(known) > 1:
                named = " and ".join(
                    f"({shortlist(one or (), 3)})" for one in sorted(known, key=str)
                )
                raise FactorsError(
                    f"tensor {name!r}: heads of different classes {named}, expected the same "
                    "classes in the same order to be summed. Merge one tuned file, with weight 1."
                )
            if not self._is_based(name, info):
                _check_kinds(name, heads)

    def _base_classes(self, name: str, info: TensorInfo) -> tuple[str, ...] | None:
        """Return the classes that the base's own head names, where it has one of this shape."""
        known = self._base_infos.get(name)
        config = None if self._values is None else self._values.config
        try:
            classes = class_labels(config or {})
        except ModelError:  # names that nothing can read are none
            return None
        if known is None or known.shape != info.shape or classes is None:
            return None
        unnamed = all(re.fullmatch(r"LABEL_\d+", one) for one in classes)
        return None if unnamed or len(classes) != known.shape[0] else classes


_WEIGHT_SLACK = 1e-9


def _check_kinds(name: str, heads: Sequence[Expert]) -> None:
    """Refuse to average heads of different kinds: a cosine head's weights are directions."""
    module = name.rpartition(".")[0]
    kinds = {
        frozenset(one for one in expert.tuned.whole if one.rpartition(".")[0] == module)
        for expert in heads
    }
    if len(kinds) > 1:
        found = " and ".join(
            f"({shortlist(sorted(kind), 3)})" for kind in sorted(kinds, key=sorted)
        )
        raise FactorsError(
            f"tensor {name!r}: heads of different kinds {found}, expected the same tensors in "
            "every tuned file of a mixture. Merge them one at a time."
        )


def _is_head(tuned: TunedFile, name: str) -> bool:
    """Whether a tensor has one row for each class that a tuned file names."""
    value = tuned.whole.get(name)
    classes = tuned.classes
    return bool(classes) and value is not None and value.shape[:1] == (len(classes or ()),)


def _narrow(values: Tensor) -> Tensor:
    """Return float64 values as float32 where that changes none of them."""
    narrow = values.float()
    return narrow if torch.equal(narrow.double(), values) else values


def _is_storable(value: Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor is finite and has the dtype that it is stored in."""
    if value.dtype != dtype:
        return False
    return not dtype.is_floating_point or bool(value.float().isfinite().all())


def _is_number(info: TensorInfo) -> bool:
    return info.layout == "dense" and info.dtype in FLOATS and not is_code(info)


def _summed(name: str, start: Tensor, trained: Sequence[Expert]) -> Tensor:
    """Add weighted changes to the base's values, in float64."""
    total = start.clone()
    for one in trained:
        value = one.tuned.whole[name].double()
        # Infinity minus itself is no change.
        total += one.weight * torch.where(value == start, 0.0, value - start)
    return total


def _mean(name: str, trained: Sequence[Expert]) -> Tensor:
    """Average what the base has no counterpart of, such as a head for other classes."""
    weight = sum(one.weight for one in trained)
    if not weight > 0.0:
        raise FactorsError(
            f"tensor {name!r}: its weights sum to {weight:g}, expected more than 0: the base has "
            "no such tensor of this shape, so that the mean over the tuned files is taken. Give "
            "other weights."
        )
    total = torch.zeros(trained[0].tuned.whole[name].shape, dtype=torch.float64)
    for one in trained:
        total += (one.weight / weight) * one.tuned.whole[name].double()
    return total


def _stored_infos(store: FactorStore) -> dict[str, TensorInfo]:
    return {name: store.info(name) for name in (*store.layers, *store.whole)}
