"""Features of pictures, computed once for everything below the first trained stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from svftool.models import Preprocessing
from svftool.tasks.few_shot_segmentation.backbones import Features, State, frozen_stages, run_stages
from svftool.tasks.few_shot_segmentation.canvas import normalise
from svftool.tasks.few_shot_segmentation.kept import (
    KEPT_BYTES,
    Kept,
    SharedOutputs,
    View,
    stacked,
)
from svftool.tasks.few_shot_segmentation.network import FewShotNet
from svftool.tasks.few_shot_segmentation.pictures import ByteCache, Pictures, tensor_bytes


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
        return self._pictures.canvas, source.mean, source.std, self.device, autocast

    def features(self, views: Sequence[View]) -> Features:
        """Give the features of pictures, in order; gradients reach the trained stages."""
        if self._kept is None:
            return self._finish(self.images(views), 0)
        return self._finish(stacked(self._kept.states(views)), self.stages)

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
