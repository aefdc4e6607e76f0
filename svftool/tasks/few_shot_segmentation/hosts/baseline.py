"""The plain host: a prototype and a prior, compared with the query by a pyramid of convolutions."""

from __future__ import annotations

from torch import Tensor, nn

from svftool.tasks.few_shot_segmentation.hosts.parts import (
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


class Baseline(nn.Module):
    """BAM's meta learner alone, which is the baseline of the SVF paper's tables.

    The supports' mean feature under the mask (the prototype) is put beside every position of the
    query's features, together with the prior mask; several supports are averaged.

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
        self.merge = Merge(2 * width + 1, width)
        self.pyramid = Pyramid(width)
        self.refine = Residual(width)
        self.classify = Classify(width)

    def forward(self, episodes: EpisodeFeatures) -> HostOutput:
        """Predict the masks of the queries."""
        prototypes = self.prototypes(episodes)
        return HostOutput(
            self.compare(episodes, prototypes.mean(1), prior_of(episodes).mean(1, keepdim=True))
        )

    def prototypes(self, episodes: EpisodeFeatures) -> Tensor:
        """Give one prototype a support: (B, K, width)."""
        return masked_mean(self.down_support(episodes.middle), episodes.masks)

    def compare(self, episodes: EpisodeFeatures, prototype: Tensor, prior: Tensor) -> Tensor:
        """Compare the queries with (B, width) prototypes and (B, 1, h, w) priors: (B, 2, h, w)."""
        query = self.down_query(episodes.query.middle)
        merged = self.merge(query, prototype[..., None, None].expand_as(query), prior)
        logits: Tensor = self.classify(self.refine(self.pyramid(merged)))
        return logits
