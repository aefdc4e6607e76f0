"""PFENet: prior-guided feature enrichment over four scales.

Z. Tian, H. Zhao, M. Shu, Z. Yang, R. Li, J. Jia, Prior Guided Feature Enrichment Network for
Few-Shot Segmentation, TPAMI 2020 (arXiv 2008.01449).
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from svftool.few_shot.backbones import resized
from svftool.few_shot.hosts.parts import (
    Classify,
    EpisodeFeatures,
    HostOutput,
    Merge,
    Reduce,
    Residual,
    masked_mean,
    prior_of,
)

SCALES = (1.0, 0.5, 0.25, 0.125)
"""Of the query's features: 60, 30, 15 and 8 positions at a canvas of 473 and stride 8."""


class Enrichment(nn.Module):
    """The query's features at one scale, merged with prototype, prior and the scale above.

    Parameters
    ----------
    width : int
        Channels throughout.
    first : bool
        Whether there is no scale above.
    """

    def __init__(self, width: int, *, first: bool) -> None:
        super().__init__()
        self.merge = Merge(2 * width + 1, width)
        self.above = None if first else Merge(2 * width, width)
        self.refine = Residual(width)

    def forward(
        self, query: Tensor, prototype: Tensor, prior: Tensor, above: Tensor | None
    ) -> Tensor:
        """Map features of one scale to enriched ones: (B, width, h, w)."""
        merged = self.merge(query, prototype.expand_as(query), prior)
        if self.above is not None and above is not None:
            merged = merged + self.above(merged, resized(above, merged.shape[-2:]))
        enriched: Tensor = self.refine(merged)
        return enriched


class PFENet(nn.Module):
    """PFENet's head; several supports are averaged, prototypes and priors alike.

    Parameters
    ----------
    channels : int
        Of the middle features.
    width : int
        Of the host.
    """

    def __init__(self, channels: int, width: int = 256) -> None:
        super().__init__()
        self.down_query = Reduce(channels, width)
        self.down_support = Reduce(channels, width)
        self.scales = nn.ModuleList(Enrichment(width, first=i == 0) for i in range(len(SCALES)))
        self.classifiers = nn.ModuleList(Classify(width) for _ in SCALES)
        self.join = Merge(len(SCALES) * width, width)
        self.refine = Residual(width)
        self.classify = Classify(width)

    def forward(self, episodes: EpisodeFeatures) -> HostOutput:
        """Predict the masks of the queries, and once more at every scale for the loss."""
        query = self.down_query(episodes.query.middle)
        supports = masked_mean(self.down_support(episodes.middle), episodes.masks)
        prototype = supports.mean(1)[..., None, None]
        prior = prior_of(episodes).mean(1, keepdim=True)
        enriched: list[Tensor] = []
        sides: list[tuple[float, Tensor]] = []
        above: Tensor | None = None
        for share, scale, classify in zip(SCALES, self.scales, self.classifiers, strict=True):
            size = (math.ceil(query.shape[-2] * share), math.ceil(query.shape[-1] * share))
            pooled = F.adaptive_avg_pool2d(query, size)
            here = scale(pooled, prototype, resized(prior, size), above)
            sides.append((1 / len(SCALES), classify(here)))
            above = resized(here, query.shape[-2:])
            enriched.append(above)
        joined = self.refine(self.join(*enriched))
        return HostOutput(self.classify(joined), sides)
