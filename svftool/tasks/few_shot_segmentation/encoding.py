"""Features of pictures, computed once for everything below the first trained stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from svftool.models import Preprocessing
from svftool.tasks.few_shot_segmentation.backbones import Features, State, frozen_stages, run_stages
from svftool.tasks.few_shot_segmentation.canvas import normalise
from svftool.tasks.few_shot_segmentation.network import FewShotNet
from svftool.tasks.few_shot_segmentation.pictures import ByteCache, Pictures, tensor_bytes
from svftool.tasks.few_shot_segmentation.pool import Pair

FEATURE_BYTES = 3 << 30
BATCH = 16

Picture = tuple[Path, bool]
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class View:
    """A picture as it goes into the network: itself or its mirror image, and the class shown."""

    pair: Pair
    label: int
    flipped: bool = False

    @property
    def picture(self) -> Picture:
        """The picture alone, whatever class it shows."""
        return self.pair.image, self.flipped


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
    trunk : Encoder, optional
        The same network's encoder in training, whose outputs of frozen stages are taken over.
    capacity : int
        Bytes of outputs to keep.
    """

    def __init__(
        self,
        net: FewShotNet,
        pictures: Pictures,
        preprocessing: Preprocessing,
        *,
        training: bool,
        trunk: Encoder | None = None,
        capacity: int = FEATURE_BYTES,
    ) -> None:
        self.net = net
        self._pictures = pictures
        self._preprocessing = preprocessing
        everything = len(net.plan.stages)
        self.stages = frozen_stages(net.backbone, net.plan) if training else everything
        self._all_kept = self.stages == everything
        self._trunk = trunk if trunk is not None and trunk.stages else None
        self.device = next(net.parameters()).device
        self._states: ByteCache[State] = ByteCache(capacity, tensor_bytes)
        self._shown: ByteCache[Tensor] = ByteCache(capacity // 2, tensor_bytes)

    def features(self, views: Sequence[View]) -> Features:
        """Give the features of pictures, in order; gradients reach the trained stages."""
        if self.stages == 0:
            return self._finish(self.images(views), 0)
        return self._finish(stacked(self.states(views)), self.stages)

    def features_of(self, images: Tensor) -> Features:
        """Give the features of (N, 3, H, W) uint8 canvases that are not worth keeping."""
        images = self._normalised(images)
        if self.stages == 0:
            return self._finish(images, 0)
        with torch.no_grad():
            state = run_stages(self.net.backbone, self.net.plan, images, last=self.stages)
        return self._finish(state, self.stages)

    def shown(self, views: Sequence[View], features: Features, masks: Tensor) -> Tensor | None:
        """Give the supports' high features seen through their masks, where they can be kept.

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
        return normalise(canvases.to(self.device), source.mean, source.std)

    def _finish(self, start: Tensor | State, first: int) -> Features:
        net = self.net
        last = len(net.plan.stages)
        return net.features(run_stages(net.backbone, net.plan, start, first=first, last=last))

    def states(self, views: Sequence[View]) -> list[State]:
        """Give what the first `stages` stages make of each picture, from what is kept or anew."""
        known, missing = recall(self._states, views)
        for start in range(0, len(missing), BATCH):
            part = missing[start : start + BATCH]
            state = self._run(part)
            for place, view in enumerate(part):
                value = {name: tensor[place].clone() for name, tensor in state.items()}
                known[view.picture] = value
                self._states.put(view.picture, value)
        return [known[view.picture] for view in views]

    @torch.no_grad()
    def _run(self, views: Sequence[View]) -> State:
        net, trunk = self.net, self._trunk
        if trunk is None:
            return run_stages(net.backbone, net.plan, self.images(views), last=self.stages)
        start = stacked(trunk.states(views))
        return run_stages(net.backbone, net.plan, start, first=trunk.stages, last=self.stages)


def stacked(states: Sequence[State]) -> State:
    """Put the states of single pictures together to that of a batch."""
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}


def recall(
    cache: ByteCache[_Value], views: Sequence[View]
) -> tuple[dict[Picture, _Value], list[View]]:
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
