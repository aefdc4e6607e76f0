"""BAM: a base learner that knows the training classes says where a novel object is not.

C. Lang, G. Cheng, B. Tu, J. Han, Learning What Not to Segment: A New Perspective on Few-Shot
Segmentation, CVPR 2022 (arXiv 2203.07615).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from svftool.few_shot.backbones import resized
from svftool.few_shot.hosts.baseline import Baseline
from svftool.few_shot.hosts.parts import (
    EpisodeFeatures,
    HostOutput,
    gram,
    prior_of,
)

REWEIGHT_WIDTH = 2


class BAM(nn.Module):
    """BAM's meta learner and ensemble; the base learner's probabilities come with the episodes.

    Parameters
    ----------
    channels : int
        Of the middle features.
    width : int
        Of the host.
    shots : int
        Supports of the episodes; for more than one a small network weighs them.
    """

    def __init__(self, channels: int, width: int = 256, *, shots: int = 1) -> None:
        super().__init__()
        self.meta = Baseline(channels, width)
        self.adjust = _first_of_two()
        self.ensemble = _first_of_two()
        self.shots = shots
        self.reweight = None
        if shots > 1:
            self.reweight = nn.Sequential(
                nn.Linear(shots, REWEIGHT_WIDTH), nn.ReLU(), nn.Linear(REWEIGHT_WIDTH, shots)
            )

    def forward(self, episodes: EpisodeFeatures) -> HostOutput:
        """Predict the masks of the queries, and the meta learner's own for the loss."""
        distances = scene_distances(episodes.query.low, episodes.low)
        weights = self.weigh(distances)
        prototypes = self.meta.prototypes(episodes)
        meta = self.meta.compare(
            episodes,
            torch.einsum("bk,bkc->bc", weights, prototypes),
            torch.einsum("bk,bkhw->bhw", weights, prior_of(episodes))[:, None],
        )
        distance = (weights * distances).sum(1)
        return HostOutput(self.combine(meta, distance, episodes), [(1.0, meta)])

    def weigh(self, distances: Tensor) -> Tensor:
        """Weigh the supports of each query by their ordered (B, K) distances: (B, K), sum 1.

        All alike where the host was trained with another number of them.
        """
        if self.reweight is None or distances.shape[1] != self.shots:
            return torch.full_like(distances, 1 / distances.shape[1])
        ordered, order = distances.sort(1)
        weights: Tensor = self.reweight(ordered).gather(1, order.argsort(1))
        return weights.softmax(1)

    def combine(self, meta: Tensor, distance: Tensor, episodes: EpisodeFeatures) -> Tensor:
        """Mix distance and base classes into the meta learner's probabilities: (B, 2, h, w)."""
        probabilities = meta.softmax(1)
        constant = distance[:, None, None, None].expand_as(probabilities[:, :1])
        background, foreground = (
            self.adjust(torch.cat([part, constant], dim=1)) for part in probabilities.chunk(2, 1)
        )
        if episodes.base is not None:
            others = other_classes(episodes.base, episodes.own)
            others = resized(others, background.shape[-2:])
            background = self.ensemble(torch.cat([background, others], dim=1))
        return torch.cat([background, foreground], dim=1)


def scene_distances(query: Tensor, supports: Tensor) -> Tensor:
    """Distance of the channels' Gram matrices of queries and supports.

    Parameters
    ----------
    query : (B, C, h, w) Tensor
    supports : (B, K, C, h, w) Tensor

    Returns
    -------
    (B, K) Tensor
        Frobenius norm of the difference, over that of a matrix of ones.
    """
    difference = gram(query)[:, None] - gram(supports)
    distances: Tensor = difference.norm(dim=(-2, -1)) / query.shape[1]
    return distances


def other_classes(base: Tensor, own: Tensor | None) -> Tensor:
    """Probability that a position belongs to a base class other than the one asked for.

    Parameters
    ----------
    base : (B, N + 1, h, w) Tensor
        Probabilities, background first.
    own : (B,) Tensor of int64 or None
        Place of the asked class among the base classes, -1 for none.

    Returns
    -------
    (B, 1, h, w) Tensor
    """
    total = base[:, 1:].sum(1, keepdim=True)
    if own is None:
        return total
    place = (own + 1).view(-1, 1, 1, 1).expand_as(total)
    return total - base.gather(1, place) * (place > 0)


class BaseLearner(nn.Module):
    """PSPNet's head: base classes from high features, pooled over four grids.

    Parameters
    ----------
    channels : int
        Of the high features.
    classes : int
        Base classes, background not counted.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.ppm = PooledGrids(channels)
        self.cls = nn.Sequential(
            nn.Conv2d(2 * channels, 512, 3, padding=1, bias=False),
            nn.BatchNorm2d(512),
            nn.ReLU(),
            nn.Dropout2d(0.1),
            nn.Conv2d(512, classes + 1, 1),
        )

    def forward(self, high: Tensor) -> Tensor:
        """Map (B, channels, h, w) to logits (B, classes + 1, h, w)."""
        logits: Tensor = self.cls(self.ppm(high))
        return logits


class PooledGrids(nn.Module):
    """Pyramid pooling over grids of 1, 2, 3 and 6 cells; the names are those of BAM's weights.

    References
    ----------
    H. Zhao et al., Pyramid Scene Parsing Network, CVPR 2017 (arXiv 1612.01105).
    """

    def __init__(self, channels: int, grids: tuple[int, ...] = (1, 2, 3, 6)) -> None:
        super().__init__()
        self.features = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveAvgPool2d(grid),
                nn.Conv2d(channels, channels // len(grids), 1, bias=False),
                nn.BatchNorm2d(channels // len(grids)),
                nn.ReLU(),
            )
            for grid in grids
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels, h, w) to (B, 2 channels, h, w)."""
        pooled = [resized(branch(x), x.shape[-2:]) for branch in self.features]
        return torch.cat([x, *pooled], dim=1)


def _first_of_two() -> nn.Conv2d:
    """Make a 1 x 1 convolution over two maps that starts as the first of them."""
    layer = nn.Conv2d(2, 1, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 0.0]).view(1, 2, 1, 1))
    return layer
