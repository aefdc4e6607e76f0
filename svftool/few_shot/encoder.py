"""Features of pictures, computed once for everything below the first trained stage."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from svftool.few_shot.backbones import Features, State, frozen_stages, run_stages
from svftool.few_shot.network import FewShotNet
from svftool.few_shot.pictures import ByteCache, Pictures, tensor_bytes
from svftool.few_shot.pool import ImageMaskPair
from svftool.models import Preprocessing, normalise

# Outputs of stages that do not change: kept by picture, and shared by networks that agree in them.


KEPT_BYTES = 3 << 30
BATCH = 16

Picture = tuple[Path, bool]
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class View:
    """A picture as it goes into the network: itself or its mirror image, and the class shown."""

    pair: ImageMaskPair
    label: int
    flipped: bool = False

    @property
    def picture(self) -> Picture:
        """The picture alone, whatever class it shows."""
        return self.pair.image, self.flipped


class Cache(Protocol[_Value]):
    """Where values are kept."""

    def find(self, key: Hashable) -> _Value | None:
        """Return the value of a key, or None where it is not kept."""

    def put(self, key: Hashable, value: _Value) -> None:
        """Keep a value for a while."""


class Section(Generic[_Value]):
    """Part of a cache that others use too, under keys of its own."""

    def __init__(self, cache: ByteCache[_Value], name: Hashable) -> None:
        self._cache = cache
        self._name = name

    def find(self, key: Hashable) -> _Value | None:
        """Return the value of a key, or None where it is not kept."""
        return self._cache.find((self._name, key))

    def put(self, key: Hashable, value: _Value) -> None:
        """Keep a value for a while."""
        self._cache.put((self._name, key), value)


class SharedOutputs:
    """Outputs of the base's stages, for all networks that start from it.

    Parameters
    ----------
    capacity : int
        Bytes to keep; the least recently used outputs go first.
    """

    def __init__(self, capacity: int = KEPT_BYTES) -> None:
        self._outputs: ByteCache[State] = ByteCache(capacity, tensor_bytes)
        self._known: set[str] = set()

    def learn(self, net: FewShotNet) -> None:
        """Remember the stages of a network that nothing has been trained of."""
        self._known.update(fingerprints(net))

    def agreeing(self, net: FewShotNet) -> list[str]:
        """Return the fingerprints of a network's leading stages that are a base's."""
        found = []
        for fingerprint in fingerprints(net):
            if fingerprint not in self._known:
                break
            found.append(fingerprint)
        return found

    def section(self, name: Hashable) -> Section[State]:
        """Return the outputs of certain stages for certain inputs."""
        return Section(self._outputs, name)


def fingerprints(net: FewShotNet) -> Iterator[str]:
    """Yield a fingerprint of each leading stretch of a network's stages, the shortest one first.

    Equal ones stand for equal modules, weights and strides, so for equal outputs of one input.
    """
    plan, modules = net.plan, dict(net.backbone.named_modules())
    digest = hashlib.sha256(repr((type(net.backbone), plan)).encode())
    if len(plan.stages) == 1:
        _add(digest, net.backbone)
        yield digest.hexdigest()
        return
    for name in plan.stem:
        _add(digest, modules[name])
    yield digest.hexdigest()
    for name in plan.stages[1:]:
        _add(digest, modules[name])
        yield digest.hexdigest()


def _add(digest: hashlib._Hash, module: nn.Module) -> None:
    digest.update(repr(module).encode())
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.is_meta}".encode())
        if not tensor.is_meta:
            flat = tensor.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().data)


class Kept:
    """Pictures through the first stages of a network, each of them once.

    Parameters
    ----------
    net : FewShotNet
        The network.
    stages : int
        How many stages.
    images : callable
        Gives the network's input for views.
    cache : Cache
        Where the outputs are kept.
    below : Kept, optional
        The same for fewer stages, to go on from.
    """

    def __init__(
        self,
        net: FewShotNet,
        stages: int,
        images: Callable[[Sequence[View]], Tensor],
        cache: Cache[State],
        below: Kept | None = None,
    ) -> None:
        self.stages = stages
        self._net = net
        self._images = images
        self._cache = cache
        self._below = below

    def states(self, views: Sequence[View]) -> list[State]:
        """Return what the stages make of each picture, from what is kept or anew."""
        known, missing = recall(self._cache, views)
        for start in range(0, len(missing), BATCH):
            part = missing[start : start + BATCH]
            state = self._run(part)
            for place, view in enumerate(part):
                value = {name: tensor[place].clone() for name, tensor in state.items()}
                known[view.picture] = value
                self._cache.put(view.picture, value)
        return [known[view.picture] for view in views]

    @torch.no_grad()
    def _run(self, views: Sequence[View]) -> State:
        backbone, plan, below = self._net.backbone, self._net.plan, self._below
        if below is None:
            return run_stages(backbone, plan, self._images(views), last=self.stages)
        start = stacked(below.states(views))
        return run_stages(backbone, plan, start, first=below.stages, last=self.stages)


def stacked(states: Sequence[State]) -> State:
    """Put the states of single pictures together to that of a batch."""
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}


def recall(cache: Cache[_Value], views: Sequence[View]) -> tuple[dict[Picture, _Value], list[View]]:
    """Look the pictures of views up in a cache.

    Returns
    -------
    dict, list of View
        What is kept, by picture, and one view of every other picture.
    """
    known: dict[Picture, _Value] = {}
    missing: dict[Picture, View] = {}
    for view in views:
        found = cache.find(view.picture)
        if found is None:
            missing[view.picture] = view
        else:
            known[view.picture] = found
    return known, list(missing.values())


class Encoder:
    """Runs a network's backbone over pictures and keeps what will not change.

    Parameters
    ----------
    net : FewShotNet
        The network.
    pictures : Pictures
        The images and masks.
    preprocessing : Preprocessing
        Mean and deviation of the backbone's inputs.
    training : bool
        While training, outputs are kept up to the first stage with a trained parameter; otherwise
        all of them, since no weight changes.
    shared : SharedOutputs, optional
        Outputs of the base's stages, which other networks use and fill too.
    capacity : int
        Bytes to keep of outputs that are this network's own.
    """

    def __init__(
        self,
        net: FewShotNet,
        pictures: Pictures,
        preprocessing: Preprocessing,
        *,
        training: bool,
        shared: SharedOutputs | None = None,
        capacity: int = KEPT_BYTES,
    ) -> None:
        self.net = net
        self._pictures = pictures
        self._preprocessing = preprocessing
        everything = len(net.plan.stages)
        self.stages = frozen_stages(net.backbone, net.plan) if training else everything
        self._all_kept = self.stages == everything
        self.device = next(net.parameters()).device
        self._kept = self._keep(shared, capacity)
        self._shown: ByteCache[Tensor] = ByteCache(capacity // 2, tensor_bytes)

    def _keep(self, shared: SharedOutputs | None, capacity: int) -> Kept | None:
        """Share what the base's own stages give; keep the rest for this network."""
        common = [] if shared is None else shared.agreeing(self.net)[: self.stages]
        below = None
        if shared is not None and common:
            section = shared.section((common[-1], *self._circumstances()))
            below = Kept(self.net, len(common), self.images, section)
        if len(common) == self.stages:
            return below
        return Kept(self.net, self.stages, self.images, ByteCache(capacity, tensor_bytes), below)

    def _circumstances(self) -> tuple[object, ...]:
        """Say what else than weights decides what comes out for a picture."""
        device = self.device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        source = self._preprocessing
        shown = source.mean, source.std, source.flip_channels
        return self._pictures.canvas, *shown, self.device, autocast

    def features(self, views: Sequence[View]) -> Features:
        """Return the features of pictures, in order; gradients reach the trained stages."""
        if self._kept is None:
            return self._finish(self.images(views), 0)
        return self._finish(stacked(self._kept.states(views)), self.stages)

    def features_of(self, images: Tensor) -> Features:
        """Return the features of (N, 3, H, W) uint8 canvases that are not worth keeping."""
        images = self._normalised(images)
        if self.stages == 0:
            return self._finish(images, 0)
        with torch.no_grad():
            state = run_stages(self.net.backbone, self.net.plan, images, last=self.stages)
        return self._finish(state, self.stages)

    def shown(self, views: Sequence[View], features: Features, masks: Tensor) -> Tensor | None:
        """Return the supports' high features seen through their masks, where they can be kept.

        Parameters
        ----------
        views : sequence of View
            The supports.
        features : Features
            Theirs.
        masks : (N, H, W) Tensor
            Theirs, on the canvas.

        Returns
        -------
        (N, D, h, w) Tensor or None
            None where a trained stage has to be run for them.
        """
        net = self.net
        if not (self._all_kept and net.plan.repeats_high):
            return None
        known = {view: self._shown.find(view) for view in views}
        missing = [i for i, view in enumerate(views) if known[view] is None]
        if missing:
            with torch.no_grad():
                small = net.small_masks(masks, features)[missing]
                made = net.shown_through(features.deep[missing], small)
            for i, value in zip(missing, made, strict=True):
                known[views[i]] = value.clone()
                self._shown.put(views[i], value.clone())
        return torch.stack([value for view in views if (value := known[view]) is not None])

    def images(self, views: Sequence[View]) -> Tensor:
        """Load and normalise pictures: (N, 3, H, W) float32 on the network's device."""
        loaded = self._pictures.images([v.pair for v in views], [v.flipped for v in views])
        return self._normalised(loaded)

    def _normalised(self, canvases: Tensor) -> Tensor:
        source = self._preprocessing
        return normalise(
            canvases.to(self.device), source.mean, source.std, flip_channels=source.flip_channels
        )

    def _finish(self, start: Tensor | State, first: int) -> Features:
        net = self.net
        last = len(net.plan.stages)
        return net.features(run_stages(net.backbone, net.plan, start, first=first, last=last))
