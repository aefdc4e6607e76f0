"""BAM's first stage: a head that segments the base classes, and what it says of any picture."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from svftool.errors import ModelError
from svftool.few_shot.encoder import Encoder, View, recall
from svftool.few_shot.hosts import BaseLearner
from svftool.few_shot.hosts.parts import mask_loss
from svftool.few_shot.masks import IGNORE, Mask, paste_mask
from svftool.few_shot.pictures import ByteCache, Pictures, tensor_bytes
from svftool.few_shot.pool import ImageMaskPair, ImagePool
from svftool.progress import SILENT, Progress

MAP_BYTES = 1 << 30


@dataclass(frozen=True)
class BaseTraining:
    """How the base learner is trained.

    Attributes
    ----------
    steps : int
        Optimiser steps.
    batch_size : int
        Pictures a step.
    lr : float
        Peak rate of AdamW, falling to 0 by a cosine.
    seed : int
        Chooses pictures, mirror images and the first weights.
    """

    steps: int = 400
    batch_size: int = 12
    lr: float = 1e-3
    seed: int = 0


class BaseMaps:
    """Maps of the base classes, numbered from 1 in the pool's order.

    Parameters
    ----------
    pool : ImagePool
        Training pairs.
    pictures : Pictures
        Reads their masks.
    """

    def __init__(self, pool: ImagePool, pictures: Pictures) -> None:
        self._pictures = pictures
        self._pairs: dict[str, list[ImageMaskPair]] = defaultdict(list)
        for pair in pool.pairs:
            self._pairs[pair.identity].append(pair)
        self._places = {label: place for place, label in enumerate(pool.classes, start=1)}

    def map(self, pair: ImageMaskPair) -> Mask:
        """Return the map of a picture, from all the masks that the pool has of it.

        Returns
        -------
        (height, width) uint8 array
            0 where no base class is marked, 255 where pixels are ignored.
        """
        numbers = np.zeros(IGNORE + 1, dtype=np.uint8)
        numbers[IGNORE] = IGNORE
        for label, place in self._places.items():
            numbers[label] = place
        if pair.label is None:
            return numbers[self._pictures.labels(pair)]
        result = np.zeros_like(self._pictures.labels(pair))
        for same in self._pairs[pair.identity]:
            result[self._pictures.labels(same) == 1] = numbers[same.label]
        return result

    def target(self, view: View) -> Tensor:
        """Return the map on its canvas: (canvas, canvas) uint8."""
        mask = self.map(view.pair)
        turned = np.ascontiguousarray(mask[:, ::-1]) if view.flipped else mask
        return torch.from_numpy(paste_mask(turned, self._pictures.canvas))


def train_base_learner(
    encoder: Encoder,
    channels: int,
    pool: ImagePool,
    pictures: Pictures,
    settings: BaseTraining,
    *,
    progress: Progress = SILENT,
) -> BaseLearner:
    """Train the base learner's head on the frozen backbone's high features.

    Parameters
    ----------
    encoder : Encoder
        Gives features that will not change.
    channels : int
        Of the high features.
    pool : ImagePool
        Training pairs.
    pictures : Pictures
        Their images and masks.
    settings : BaseTraining
        Budget and rate.
    progress : Progress
        Told of each step.

    Returns
    -------
    BaseLearner
        Frozen, in evaluation mode.

    Notes
    -----
    BAM trains the backbone along; here it stays as the checkpoint has it, so that one checkpoint
    serves every fold. To use a backbone trained on base classes, decompose that checkpoint.
    """
    maps = BaseMaps(pool, pictures)
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        learner = BaseLearner(channels, len(pool.classes)).to(encoder.device)
        optimiser = torch.optim.AdamW(learner.parameters(), lr=settings.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.steps)
        with progress.task("base learner", total=settings.steps, unit="steps") as bar:
            for _ in range(settings.steps):
                views = _draw(pool, settings.batch_size, generator)
                target = torch.stack([maps.target(view) for view in views])
                loss = mask_loss(
                    learner(encoder.features(views).high.detach()), target.to(encoder.device)
                )
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                schedule.step()
                bar.advance(detail=f"loss {float(loss.detach()):.3f}")
    return learner.requires_grad_(False).eval()


def published_learner(learner: BaseLearner, pool: ImagePool) -> BaseLearner:
    """Return a frozen copy of a checkpoint's own base learner.

    Raises
    ------
    ModelError
        If it knows another number of classes than the fold's training data.
    """
    known = learner.cls[-1].out_channels
    if known != len(pool.classes) + 1:
        raise ModelError(
            f"the base network knows {known} classes with background, expected "
            f"{len(pool.classes) + 1} for this fold"
        )
    return copy.deepcopy(learner).requires_grad_(False).eval()


class BaseProbabilities:
    """The base learner's probabilities for pictures, each computed once.

    Parameters
    ----------
    encoder : Encoder
        Over the backbone as it was before training.
    learner : BaseLearner
        Frozen.
    """

    def __init__(self, encoder: Encoder, learner: BaseLearner) -> None:
        self._encoder = encoder
        self._learner = learner
        self._maps: ByteCache[Tensor] = ByteCache(MAP_BYTES, tensor_bytes)

    @torch.no_grad()
    def __call__(self, views: Sequence[View]) -> Tensor:
        """Return (N, classes + 1, h, w) probabilities."""
        known, missing = recall(self._maps, views)
        if missing:
            maps = self._learner(self._encoder.features(missing).high).softmax(1)
            for view, value in zip(missing, maps, strict=True):
                known[view.picture] = value.clone()
                self._maps.put(view.picture, known[view.picture])
        return torch.stack([known[view.picture] for view in views])

    @torch.no_grad()
    def of(self, images: Tensor) -> Tensor:
        """Return the probabilities of (N, 3, H, W) uint8 canvases that are not worth keeping."""
        maps: Tensor = self._learner(self._encoder.features_of(images).high).softmax(1)
        return maps


def _draw(pool: ImagePool, count: int, generator: torch.Generator) -> list[View]:
    places = torch.randint(len(pool.pairs), (count,), generator=generator).tolist()
    turned = torch.rand(count, generator=generator) < 0.5
    pairs = [pool.pairs[place] for place in places]
    return [View(pair, pair.query[0], bool(t)) for pair, t in zip(pairs, turned, strict=True)]
