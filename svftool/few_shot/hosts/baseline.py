"""The plain host: a prototype and a prior, compared with the query by a pyramid of convolutions."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svftool.few_shot.hosts.parts import (
    Classify,
    EpisodeFeatures,
    HostOutput,
    Merge,
    Pyramid,
    Reduce,
    Residual,
    masked_mean,
    prior_of,
)

# What two prototypes say alone: a host without weights, and where a host may start from.


class Nearest(nn.Module):
    """What a backbone can do before anything is trained.

    Each position goes to the nearer of two prototypes, by the cosine.
    """

    def forward(self, episodes: EpisodeFeatures) -> HostOutput:
        """Predict the masks of the queries."""
        return HostOutput(prototype_cosines(episodes))


def prototype_cosines(episodes: EpisodeFeatures) -> Tensor:
    """Compare every position of the queries with two prototypes.

    Returns
    -------
    (B, 2, h, w) Tensor
        Cosines with the supports' mean features outside and inside of the mask.
    """
    inside = masked_mean(episodes.middle, episodes.masks).mean(1)
    outside = masked_mean(episodes.middle, 1 - episodes.masks).mean(1)
    cosines = [
        F.cosine_similarity(episodes.query.middle, prototype[..., None, None], dim=1)
        for prototype in (outside, inside)
    ]
    return torch.stack(cosines, dim=1)


Start = Literal["nearest", "blank"]

LIKENESS_GAIN = 10.0
"""Brings the difference of two cosines, some tenths, to the size of the other maps."""
SHARPNESS = 0.6
"""Weight of the amplified difference before training; 2 was worse with a single support."""


class Baseline(nn.Module):
    """BAM's meta learner alone, which is the baseline of the SVF paper's tables.

    The supports' mean feature under the mask (the prototype) is put beside every position of the
    query's features, together with the prior mask; several supports are averaged.

    As published a new host knows nothing, and where a query mostly shows one thing, marking
    whatever stands out is learned long before looking at the supports. So it may start as the
    nearest prototype (`Nearest`): the difference of the two cosines is one more map beside the
    prior, and is added to the logits with a weight that is trained.

    Parameters
    ----------
    channels : int
        Of the middle features.
    width : int
        Of the host.
    start : {"nearest", "blank"}
        ``blank`` is the published host.
    """

    def __init__(self, channels: int, width: int = 256, *, start: Start = "blank") -> None:
        super().__init__()
        nearest = start == "nearest"
        self.down_query = Reduce(channels, width)
        self.down_support = Reduce(channels, width)
        self.merge = Merge(2 * width + 1 + nearest, width)
        self.pyramid = Pyramid(width)
        self.refine = Residual(width)
        self.classify = Classify(width)
        self.share = nn.Parameter(torch.tensor([SHARPNESS])) if nearest else None

    def forward(self, episodes: EpisodeFeatures) -> HostOutput:
        """Predict the masks of the queries."""
        prototypes = self.prototypes(episodes)
        return HostOutput(
            self.compare(episodes, prototypes.mean(1), prior_of(episodes).mean(1, keepdim=True))
        )

    def prototypes(self, episodes: EpisodeFeatures) -> Tensor:
        """Return one prototype a support: (B, K, width)."""
        return masked_mean(self.down_support(episodes.middle), episodes.masks)

    def compare(self, episodes: EpisodeFeatures, prototype: Tensor, prior: Tensor) -> Tensor:
        """Compare the queries with (B, width) prototypes and (B, 1, h, w) priors: (B, 2, h, w)."""
        query = self.down_query(episodes.query.middle)
        maps = [query, prototype[..., None, None].expand_as(query), prior]
        if self.share is None:
            return self._logits(maps)
        outside, inside = prototype_cosines(episodes).chunk(2, dim=1)
        likeness = LIKENESS_GAIN * (inside - outside)
        added = self.share * likeness / 2
        return self._logits([*maps, likeness]) + torch.cat([-added, added], dim=1)

    def _logits(self, maps: list[Tensor]) -> Tensor:
        logits: Tensor = self.classify(self.refine(self.pyramid(self.merge(*maps))))
        return logits
