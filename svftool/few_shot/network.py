"""A backbone and a host as one module: from images of query and supports to the query's mask."""

from __future__ import annotations

from torch import Tensor, nn

from svftool.few_shot.backbones import (
    FeaturePlan,
    Features,
    State,
    features_of,
    high_of,
    resized,
    run_stages,
)
from svftool.few_shot.hosts import EpisodeFeatures, HostOutput


class FewShotNet(nn.Module):
    """Segments a query by the supports that show the class.

    Parameters
    ----------
    backbone : nn.Module
        The pretrained network.
    plan : FeaturePlan
        Where its features come from.
    host : nn.Module
        Maps `EpisodeFeatures` to a `HostOutput`.
    """

    def __init__(self, backbone: nn.Module, plan: FeaturePlan, host: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.host = host
        self.plan = plan

    def forward(
        self, query: Tensor, supports: Tensor, masks: Tensor, own: Tensor | None = None
    ) -> HostOutput:
        """Segment a batch of queries.

        Parameters
        ----------
        query : (B, 3, H, W) Tensor
            Normalised images.
        supports : (B, K, 3, H, W) Tensor
            Normalised images that show the class.
        masks : (B, K, H, W) Tensor
            Where the class is 1; other values are not the class.
        own : (B,) Tensor of int64, optional
            Place of the class among the base classes; -1, or none given, for a novel class.
        """
        last = len(self.plan.stages)
        seen = run_stages(self.backbone, self.plan, query, last=last)
        shown = run_stages(self.backbone, self.plan, supports.flatten(0, 1), last=last)
        episodes = self.episodes(self.features(seen), self.features(shown), masks, own=own)
        output: HostOutput = self.host(episodes)
        return output

    def features(self, state: State) -> Features:
        """Assemble the features of a state that has run through all stages."""
        return features_of(state, self.plan)

    def shown_through(self, deep: Tensor, masks: Tensor) -> Tensor:
        """Return the high features of supports with everything but the class blacked out.

        Parameters
        ----------
        deep : (N, C, h, w) Tensor
            The deepest middle features.
        masks : (N, h, w) Tensor
            Between 0 and 1.
        """
        return high_of(self.backbone, self.plan, deep * masks[:, None])

    def small_masks(self, masks: Tensor, features: Features) -> Tensor:
        """Bring (N, H, W) masks, 1 for the class, to the size of the middle features."""
        size = features.middle.shape[-2:]
        return resized((masks == 1).float()[:, None], size)[:, 0]

    def episodes(
        self,
        query: Features,
        shown: Features,
        masks: Tensor,
        *,
        high: Tensor | None = None,
        base: Tensor | None = None,
        own: Tensor | None = None,
    ) -> EpisodeFeatures:
        """Put features of queries and supports together as a host takes them.

        Parameters
        ----------
        query : Features
            Of B queries.
        shown : Features
            Of B x K supports, in one batch.
        masks : (B, K, H, W) Tensor
            The supports' masks; 1 is the class.
        high : (B x K, D, h', w') Tensor, optional
            `shown_through` of the supports, where it is known already.
        base, own
            As in `EpisodeFeatures`.
        """
        shots = masks.shape[1]
        small = self.small_masks(masks.flatten(0, 1), shown)
        if high is None:
            through = self.plan.repeats_high
            high = self.shown_through(shown.deep, small) if through else shown.high
        return EpisodeFeatures(
            query,
            by_query(shown.middle, shots),
            by_query(shown.low, shots),
            by_query(high, shots),
            by_query(small, shots),
            base,
            own,
        )


def by_query(supports: Tensor, shots: int) -> Tensor:
    """Turn (B x K, ...) supports into (B, K, ...)."""
    return supports.view(-1, shots, *supports.shape[1:])
