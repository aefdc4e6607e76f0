"""Hosts: what turns features of a query and its supports into a mask."""

from __future__ import annotations

from typing import Literal

from torch import nn

from svftool.tasks.few_shot_segmentation.hosts.bam import BAM, BaseLearner
from svftool.tasks.few_shot_segmentation.hosts.baseline import Baseline
from svftool.tasks.few_shot_segmentation.hosts.nearest import Nearest
from svftool.tasks.few_shot_segmentation.hosts.parts import EpisodeFeatures, HostOutput
from svftool.tasks.few_shot_segmentation.hosts.pfenet import PFENet

__all__ = [
    "BAM",
    "BaseLearner",
    "Baseline",
    "EpisodeFeatures",
    "HostName",
    "HostOutput",
    "Nearest",
    "PFENet",
    "make_host",
]

HostName = Literal["baseline", "pfenet", "bam"]


def make_host(name: HostName, channels: int, *, width: int = 256, shots: int = 1) -> nn.Module:
    """Make a host by its name.

    Parameters
    ----------
    name : {"baseline", "pfenet", "bam"}
    channels : int
        Of the backbone's middle features.
    width : int
        Channels of the host; 256 in the papers.
    shots : int
        Supports that it will be trained with.
    """
    if name == "baseline":
        return Baseline(channels, width)
    if name == "pfenet":
        return PFENet(channels, width)
    return BAM(channels, width, shots=shots)
