"""Hosts: what turns features of a query and its supports into a mask."""

from __future__ import annotations

from typing import Literal

from torch import nn

from svftool.few_shot.hosts.bam import BAM, BaseLearner
from svftool.few_shot.hosts.baseline import Baseline, Nearest, Start
from svftool.few_shot.hosts.parts import EpisodeFeatures, HostOutput
from svftool.few_shot.hosts.pfenet import PFENet

__all__ = [
    "BAM",
    "BaseLearner",
    "Baseline",
    "EpisodeFeatures",
    "HostName",
    "HostOutput",
    "Nearest",
    "PFENet",
    "Start",
    "make_host",
]

HostName = Literal["baseline", "pfenet", "bam"]


WIDTH = 256
NARROWEST = 32


def make_host(
    name: HostName,
    channels: int,
    *,
    width: int | None = None,
    shots: int = 1,
    start: Start = "nearest",
) -> nn.Module:
    """Make a host by its name.

    Parameters
    ----------
    name : {"baseline", "pfenet", "bam"}
    channels : int
        Of the backbone's middle features.
    width : int, optional
        Channels of the host. By default 256, as in the papers, but no more than a third of
        `channels`: 256 for VGG-16 (768) and ResNet-50 (1536), 128 for a ResNet-18 (384).
    shots : int
        Supports that it will be trained with.
    start : {"nearest", "blank"}
        Of the baseline; the others are as published.
    """
    width = width or min(WIDTH, max(channels // 3, NARROWEST))
    if name == "baseline":
        return Baseline(channels, width, start=start)
    if name == "pfenet":
        return PFENet(channels, width)
    return BAM(channels, width, shots=shots)
