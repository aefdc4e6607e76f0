"""The rules of one experiment: host, resolution, episodes, and what models are chosen by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from svftool.errors import UsageError
from svftool.tasks.few_shot_segmentation.base_learner import BaseTraining
from svftool.tasks.few_shot_segmentation.canvas import Alignment
from svftool.tasks.few_shot_segmentation.hosts import HostName, Start
from svftool.tasks.few_shot_segmentation.pictures import Augment

SelectOn = Literal["base", "novel", "last"]


@dataclass(frozen=True)
class Rules:
    """How episodes are made, and models chosen and scored.

    Attributes
    ----------
    host : {"baseline", "pfenet", "bam"}
        What turns features into masks.
    start : {"nearest", "blank"}
        How the baseline starts; the other hosts are as published.
    image_size : int
        Side of the canvases, rounded to ``8 k + 1``; 473 and 641 in the papers.
    features : str or None
        ``--features``; None for the backbone's family.
    output_stride : int or None
        Pixels a feature; None for 8 (VGG-16: 16).
    width : int or None
        Channels of the host; None as in `make_host`.
    augment : {"none", "light", "strong"}
        Of training pictures. ``light`` mirrors half of them; ``strong`` scales, rotates, blurs,
        mirrors and crops them as the papers do, so that nothing can be kept between epochs.
    test_episodes : int
        Episodes of the test on novel classes, and again on base classes.
    test_shots : tuple of int
        Further numbers of shots to test with; what is trained with one shot, say, with five.
    swap_supports : bool
        Test once more with supports that show another class: ``swapped_miou``.
    select_episodes : int
        Episodes that weights are chosen by.
    select_on : {"base", "novel", "last"}
        Choose by held-out images of base classes; by novel classes, as the papers' code does; or
        take the last weights.
    alignment : {"content", "canvas"}
        See `svftool.tasks.few_shot_segmentation.canvas.predict_at`.
    base_learner : BaseTraining
        First stage of BAM.
    """

    host: HostName = "baseline"
    start: Start = "nearest"
    image_size: int = 473
    features: str | None = None
    output_stride: int | None = None
    width: int | None = None
    augment: Augment = "light"
    test_episodes: int = 1000
    test_shots: tuple[int, ...] = ()
    swap_supports: bool = False
    select_episodes: int = 100
    select_on: SelectOn = "base"
    alignment: Alignment = "content"
    base_learner: BaseTraining = field(default_factory=BaseTraining)

    def __post_init__(self) -> None:
        if any(shots < 1 for shots in self.test_shots):
            raise UsageError(f"--test-shots is {min(self.test_shots)}, expected at least 1")
        stride = self.output_stride
        if stride is not None and (stride < 1 or stride & (stride - 1)):
            raise UsageError(
                f"--output-stride is {stride}, expected a power of two such as 8, 16 or 32"
            )
        for name in ("test_episodes", "select_episodes", "width", "image_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {value}, expected at least 1")


DEFAULT_RULES = Rules()
