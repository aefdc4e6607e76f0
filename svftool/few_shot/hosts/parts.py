"""What the hosts share: prototypes, the prior, Gram matrices, and blocks of convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svftool.few_shot.backbones import Features, resized
from svftool.few_shot.masks import IGNORE

AREA_FLOOR = 5e-4
"""Added to the area of a mask, in positions, so that an empty one gives a zero prototype."""
COSINE_FLOOR = 1e-7
UNDECIDED = 0.01
"""Deviation of a new classifier's weights: small, so that it starts with even chances."""


@dataclass(frozen=True)
class EpisodeFeatures:
    """Features of a batch of episodes: B queries with K supports each.

    Attributes
    ----------
    query : Features
        Of the queries, B in a batch.
    middle : (B, K, C, h, w) Tensor
        Middle features of the supports.
    low : (B, K, C', h'', w'') Tensor
        The first of their middle features alone.
    high : (B, K, D, h', w') Tensor
        Their high features, seen through the mask.
    masks : (B, K, h, w) Tensor
        Their masks at the resolution of the middle features, between 0 and 1.
    base : (B, N + 1, h', w') Tensor or None
        Probabilities of background and the N base classes over the queries, from the base learner.
    own : (B,) Tensor of int64 or None
        Place of the asked class among the base classes, from 0; -1 for a novel class.
    """

    query: Features
    middle: Tensor
    low: Tensor
    high: Tensor
    masks: Tensor
    base: Tensor | None = None
    own: Tensor | None = None


@dataclass(frozen=True)
class HostOutput:
    """What a host says about the queries.

    Attributes
    ----------
    logits : (B, 2, h, w) Tensor
        Background and foreground.
    auxiliary : sequence of (float, (B, 2, h, w) Tensor)
        Further predictions that the loss weighs in.
    """

    logits: Tensor
    auxiliary: Sequence[tuple[float, Tensor]] = field(default=())

    def loss(self, target: Tensor) -> Tensor:
        """Sum the cross-entropies of all predictions against (B, H, W) masks of 0, 1 and 255."""
        terms = [(1.0, self.logits), *self.auxiliary]
        losses = [weight * mask_loss(logits, target) for weight, logits in terms]
        return torch.stack(losses).sum()


def mask_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of (B, N, h, w) logits, enlarged to (B, H, W) labels; 255 is left out."""
    enlarged = resized(logits.float(), target.shape[-2:])
    losses = F.cross_entropy(enlarged, target.long(), ignore_index=IGNORE, reduction="sum")
    return losses / (target != IGNORE).sum().clamp(min=1)


def masked_mean(features: Tensor, masks: Tensor) -> Tensor:
    """Average features over masks.

    Parameters
    ----------
    features : (..., C, h, w) Tensor
    masks : (..., h, w) Tensor

    Returns
    -------
    (..., C) Tensor
        Weighted sum over positions, by the masks' sum and a little.
    """
    total = torch.einsum("...chw,...hw->...c", features, masks)
    mean: Tensor = total / (masks.sum((-2, -1)) + AREA_FLOOR)[..., None]
    return mean


def prior_masks(query: Tensor, supports: Tensor, masks: Tensor) -> Tensor:
    """Likeness of every query position to the nearest position of each support.

    Parameters
    ----------
    query : (B, D, h, w) Tensor
        High features of the queries.
    supports : (B, K, D, h', w') Tensor
        High features of the supports.
    masks : (B, K, h', w') Tensor
        Where the class is in the supports; their features are weighted by it.

    Returns
    -------
    (B, K, h, w) Tensor
        Largest cosine over the support's positions, stretched to [0, 1] over each query.
    """
    batch, shots = supports.shape[:2]
    q = query.flatten(2)
    s = (supports * masks[:, :, None]).flatten(3)
    products = torch.einsum("bcq,bkcs->bksq", q, s)
    norms = q.norm(dim=1)[:, None, None, :] * s.norm(dim=2)[..., None]
    likeness = (products / (norms + COSINE_FLOOR)).amax(dim=2)
    low, high = likeness.amin(dim=2, keepdim=True), likeness.amax(dim=2, keepdim=True)
    stretched: Tensor = (likeness - low) / (high - low + COSINE_FLOOR)
    return stretched.view(batch, shots, *query.shape[-2:])


def prior_of(episodes: EpisodeFeatures) -> Tensor:
    """Return the prior of each support at the resolution of the middle features: (B, K, h, w)."""
    masks = resized(episodes.masks, episodes.high.shape[-2:])
    prior = prior_masks(episodes.query.high, episodes.high, masks)
    return resized(prior, episodes.query.middle.shape[-2:])


def gram(features: Tensor) -> Tensor:
    """Cosines between channels: (..., C, h, w) to (..., C, C)."""
    flat = features.flatten(-2)
    norms = flat.norm(dim=-1)
    outer = norms[..., :, None] * norms[..., None, :]
    cosines: Tensor = flat @ flat.transpose(-2, -1) / (outer + COSINE_FLOOR)
    return cosines


def convolution(inputs: int, outputs: int, kernel: int) -> nn.Conv2d:
    """Make a convolution without bias for a ReLU to follow.

    Its weights keep the size of what goes through (He et al., arXiv 1502.01852). PyTorch's own
    start shrinks it with every layer, and a host then predicts background alone for its first
    hundreds of steps.
    """
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return layer


class Reduce(nn.Module):
    """Reduce middle features to the host's width: 1 x 1 convolution, ReLU, channel dropout."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.conv = convolution(inputs, width, 1)
        self.drop = nn.Dropout2d(0.5)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, inputs, h, w) to (B, width, h, w), or (B, K, ...) alike."""
        flat = features.flatten(0, -4)
        reduced: Tensor = self.drop(F.relu(self.conv(flat)))
        return reduced.view(*features.shape[:-3], -1, *flat.shape[-2:])


class Residual(nn.Module):
    """Two 3 x 3 convolutions with ReLU, added to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = convolution(width, width, 3)
        self.second = convolution(width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, width, h, w) to the same."""
        return F.relu(self.second(F.relu(self.first(x)))) + x


class Merge(nn.Module):
    """A 1 x 1 convolution with ReLU over maps that are put side by side."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.conv = convolution(inputs, width, 1)

    def forward(self, *maps: Tensor) -> Tensor:
        """Map several (B, ., h, w) to (B, width, h, w)."""
        return F.relu(self.conv(torch.cat(maps, dim=1)))


class Classify(nn.Module):
    """Background and foreground: 3 x 3 convolution, ReLU, channel dropout, 1 x 1 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = convolution(width, width, 3)
        self.drop = nn.Dropout2d(0.1)
        self.out = nn.Conv2d(width, 2, 1)
        nn.init.normal_(self.out.weight, std=UNDECIDED)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, width, h, w) to (B, 2, h, w)."""
        logits: Tensor = self.out(self.drop(F.relu(self.conv(x))))
        return logits


class Pyramid(nn.Module):
    """Atrous spatial pyramid pooling: the whole map, single pixels, and three widths around them.

    References
    ----------
    L.-C. Chen et al., Rethinking Atrous Convolution for Semantic Image Segmentation, 2017
    (arXiv 1706.05587); rates 6, 12 and 18 as CANet and BAM have them.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.whole = nn.Conv2d(width, width, 1)
        self.pixel = nn.Conv2d(width, width, 1)
        self.around = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=rate, dilation=rate) for rate in (6, 12, 18)
        )
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
        self.reduce = Merge(5 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, width, h, w) to the same."""
        # oneDNN skips taps that fall outside of the map in this layout: up to 6 times faster.
        x = x.contiguous(memory_format=torch.channels_last)
        whole = F.relu(self.whole(x.mean((-2, -1), keepdim=True))).expand_as(x)
        wide = [F.relu(layer(x)) for layer in (self.pixel, *self.around)]
        reduced: Tensor = self.reduce(whole, *wide)
        return reduced
