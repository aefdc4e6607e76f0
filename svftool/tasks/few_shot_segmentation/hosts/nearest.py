"""A host without weights: each position goes to the nearer of two prototypes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from svftool.tasks.few_shot_segmentation.hosts.parts import (
    EpisodeFeatures,
    HostOutput,
    masked_mean,
)


class Nearest(nn.Module):
    """What a backbone can do before anything is trained.

    The supports' mean features inside and outside of the mask are compared with every position of
    the query by their cosine.
    """

    def forward(self, episodes: EpisodeFeatures) -> HostOutput:
        """Predict the masks of the queries."""
        inside = masked_mean(episodes.middle, episodes.masks).mean(1)
        outside = masked_mean(episodes.middle, 1 - episodes.masks).mean(1)
        query = episodes.query.middle
        cosines = [
            F.cosine_similarity(query, prototype[..., None, None], dim=1)
            for prototype in (outside, inside)
        ]
        return HostOutput(torch.stack(cosines, dim=1))
