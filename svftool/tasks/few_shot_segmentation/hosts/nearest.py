"""What two prototypes say alone: a host without weights, and where a host may start from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svftool.tasks.few_shot_segmentation.hosts.parts import (
    EpisodeFeatures,
    HostOutput,
    masked_mean,
)


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
