"""What a base and weighted tuned files give, tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from svftool.checkpoints import Checkpoint, TensorInfo, dtype_named
from svftool.errors import FactorsError, UsageError
from svftool.factors import FactorStore, Merged, TunedFile, add_delta, read_tuned, rebuild


@dataclass(frozen=True)
class Expert:
    """A tuned file and its weight in the mixture."""

    tuned: TunedFile
    weight: float = 1.0

    @classmethod
    def parse(cls, given: str | os.PathLike[str] | tuple[str | os.PathLike[str], float]) -> Expert:
        """Read a tuned file given as a path, ``PATH@WEIGHT``, or a pair of both."""
        if isinstance(given, tuple):
            path, weight = given
            return cls(read_tuned(path), float(weight))
        text = os.fspath(given)
        before, separator, after = text.rpartition("@")
        if not separator or os.path.exists(text):  # noqa: PTH110
            return cls(read_tuned(text))
        try:
            return cls(read_tuned(before), float(after))
        except ValueError:
            raise UsageError(
                f"{text}: weight {after!r}, expected a number such as in {before}@0.5"
            ) from None


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


class Mixture:
    """The merged checkpoint, computed one tensor at a time.

    Parameters
    ----------
    store : FactorStore
        Factors of the base.
    base : Checkpoint or None
        The base; None rebuilds weights from their factors alone.
    experts : sequence of Expert
        Checked tuned files.

    Attributes
    ----------
    infos : mapping of str to TensorInfo
        Every tensor of the result: the base's in its order, then added ones.
    added, replaced : tuple of str
        Tensors trained whole that the base does not have, and that it has.

    Raises
    ------
    FactorsError
        If tensors trained whole cannot be mixed, or there is no base and the factors hold layers
        alone.
    """

    def __init__(
        self, store: FactorStore, base: Checkpoint | None, experts: Sequence[Expert]
    ) -> None:
        if base is None and store.config.layers_only:
            raise FactorsError(
                f"{store.path}: holds the decomposed layers only, expected the other tensors too. "
                "Merge without --without-base."
            )
        self.store = store
        self.base = base
        self.experts = tuple(experts)
        self._base_infos = _stored_infos(store) if base is None else base.infos
        trained = dict.fromkeys(name for one in experts for name in one.tuned.whole)
        self.added = tuple(name for name in trained if name not in self._base_infos)
        self.replaced = tuple(name for name in trained if name in self._base_infos)
        self.infos: Mapping[str, TensorInfo] = {
            **self._base_infos,
            **{name: self._whole_info(name) for name in trained},
        }

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names of the head, where exactly one is new."""
        known = {one.tuned.classes for one in self.experts if one.tuned.classes and one.tuned.whole}
        return known.pop() if len(known) == 1 else None

    @property
    def reshaped(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """Shapes in the base and in the result, of the tensors where they differ."""
        pairs = {
            name: (self._base_infos[name].shape, self.infos[name].shape) for name in self.replaced
        }
        return {name: (old, new) for name, (old, new) in pairs.items() if old != new}

    @property
    def rebuilt_error(self) -> float | None:
        """Largest reconstruction error of a layer; None where the base is used."""
        if self.base is not None:
            return None
        return max((one.reconstruction_error for one in self.store.layers.values()), default=0.0)

    def tensor(self, name: str) -> tuple[Tensor, LayerChange | None]:
        """Compute one tensor of the result, and what became of it if it is a layer."""
        if name in self.added or name in self.replaced:
            return self._mix_whole(name), None
        if name not in self.store.layers:
            return self._read(name), None
        merged = self._merge_layer(name)
        changed = merged.relative_change > 0.0
        return merged.weight, LayerChange(
            name, changed, merged.relative_change, merged.rounding_loss
        )

    def _read(self, name: str) -> Tensor:
        return self.store.read_whole(name) if self.base is None else self.base.read(name)

    def _merge_layer(self, name: str) -> Merged:
        layer = self.store.layers[name]
        deltas = [one.weight * one.tuned.delta(name) for one in self.experts if name in one.tuned.S]
        if self.base is not None and not any(map(torch.any, deltas)):
            return Merged(self.base.read(name), 0.0, 0.0)
        factors = self.store.read(name)
        delta = sum(deltas, start=torch.zeros_like(factors.S, dtype=torch.float64))
        if self.base is not None:
            return add_delta(self.base.read(name), factors, delta, view=layer.view)
        weight = rebuild(
            factors,
            factors.S.double() + delta,
            shape=layer.shape,
            dtype=dtype_named(layer.dtype),
            view=layer.view,
        )
        change = delta.norm() / factors.S.double().norm().clamp_min(torch.finfo(torch.float64).tiny)
        return Merged(weight, float(change), 0.0)

    def _whole_info(self, name: str) -> TensorInfo:
        tensors = [one.tuned.whole[name] for one in self.experts if name in one.tuned.whole]
        shapes = {tuple(tensor.shape) for tensor in tensors}
        known = self._base_infos.get(name)
        if len(shapes) > 1 or (known and len(self.experts) > 1 and shapes != {known.shape}):
            found = " and ".join(str(shape) for shape in sorted(shapes))
            expected = f"{known.shape} as in the base" if known else "one shape"
            raise FactorsError(
                f"tensor {name!r}: trained with shape {found}, expected {expected} in every tuned "
                "file of a mixture. Merge them one at a time."
            )
        if known is None:
            return TensorInfo(name, tensors[0].dtype, shapes.pop(), "")
        return replace(known, shape=shapes.pop())

    def _mix_whole(self, name: str) -> Tensor:
        info = self.infos[name]
        trained = [one for one in self.experts if name in one.tuned.whole]
        known = self._base_infos.get(name)
        if len(trained) == 1 and trained[0].weight == 1.0:
            return trained[0].tuned.whole[name].to(info.dtype)
        if known is not None and known.shape == info.shape:
            start = self._read(name).double()
        elif known is None:
            start = torch.zeros(info.shape, dtype=torch.float64)
        else:
            raise FactorsError(
                f"tensor {name!r}: trained with shape {info.shape}, expected {known.shape} as in "
                "the base to be weighted. Merge it with weight 1."
            )
        total = start.clone()
        for one in trained:
            total += one.weight * (one.tuned.whole[name].double() - start)
        return total.to(info.dtype)


def _stored_infos(store: FactorStore) -> dict[str, TensorInfo]:
    return {name: store.info(name) for name in (*store.layers, *store.whole)}
