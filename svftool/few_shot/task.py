"""The task ``few-shot-segmentation``: one fold, one number of shots, one host."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from svftool.errors import UsageError
from svftool.few_shot.base_learner import BaseTraining
from svftool.few_shot.draw import FewShotDraw
from svftool.few_shot.encoder import SharedOutputs
from svftool.few_shot.hosts import BaseLearner, HostName, Start
from svftool.few_shot.masks import Alignment, canvas_side
from svftool.few_shot.overlays import Overlays
from svftool.few_shot.paper_networks import (
    backbone_name,
    own_base_learner,
    require_one_fold,
)
from svftool.few_shot.pictures import Augment, Pictures
from svftool.few_shot.pool import (
    FoldData,
    Pool,
    require_held_out,
    require_shots,
)
from svftool.models import DEFAULT_PREPROCESSING, Preprocessing
from svftool.progress import SILENT, Progress
from svftool.tasks.base import Metric

# The rules of one experiment: host, resolution, episodes, and what models are chosen by.


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
        See `svftool.few_shot.masks.predict_at`.
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


class FewShotSegmentation:
    """The task ``few-shot-segmentation``.

    Parameters
    ----------
    data : FoldData
        The fold.
    shots : int
        Supports of an episode, in training and testing.
    rules : Rules
        Everything else.
    preprocessing : Preprocessing
        Mean and deviation that the backbone was trained with.
    pictures : Pictures, optional
        Images and masks that other tasks use too.
    outputs : SharedOutputs, optional
        Outputs of the base's stages that other tasks use too.
    overlays : Overlays, optional
        Where pictures of predictions go.
    folds : tuple of int
        The folds that the same weights are used for, where they are more than this one.
    progress : Progress
        Told of what is done before training: a base learner's.

    Raises
    ------
    DataError
        If a class has too few images for the shots, or no class has enough held-out ones to choose
        weights by.
    """

    name = "few-shot-segmentation"
    primary = Metric("miou", higher_is_better=True)
    classes = None

    def __init__(
        self,
        data: FoldData,
        *,
        shots: int = 1,
        rules: Rules = DEFAULT_RULES,
        preprocessing: Preprocessing = DEFAULT_PREPROCESSING,
        pictures: Pictures | None = None,
        outputs: SharedOutputs | None = None,
        overlays: Overlays | None = None,
        folds: tuple[int, ...] = (),
        progress: Progress = SILENT,
    ) -> None:
        require_shots(data, "training", shots)
        require_shots(data, "test", max(shots, *rules.test_shots, 1))
        if rules.select_on == "base":
            require_held_out(data, shots)
        self.data = data
        self.shots = shots
        self.rules = rules
        self.preprocessing = preprocessing
        self.pictures = pictures or Pictures(canvas_side(rules.image_size))
        self.outputs = outputs or SharedOutputs()
        self.overlays = overlays
        self.folds = folds or (data.split.fold,)
        self.progress = progress
        self.learners: dict[int, BaseLearner] = {}
        self.backbone: str | None = None
        self.base_network_fold: int | None = None

    @property
    def facts(self) -> dict[str, int]:
        """The fold."""
        return {"fold": self.data.split.fold}

    def held_out(self, shots: int) -> Pool:
        """Give the held-out images of the base classes that have enough for so many shots."""
        pool = self.data.held_out
        return pool.only(set(pool.classes) - set(pool.too_small(shots)))

    def meet(self, model: nn.Module) -> None:
        """Note which backbone the weights belong to.

        Raises
        ------
        UsageError
            If it is a base network, which belongs to one fold, and there are several.
        """
        self.backbone = backbone_name(model)
        self.base_network_fold = None
        if own_base_learner(model) is not None:
            require_one_fold(self.folds, self.data.split.inner)
            self.base_network_fold = self.data.split.fold

    def describe(self) -> dict[str, Any]:
        """Say what was trained on, and by which rules."""
        data, rules = self.data, self.rules
        return {
            "dataset": data.dataset,
            "fold": data.split.fold,
            "inner_fold": data.split.inner,
            "shots": self.shots,
            "host": rules.host,
            "start": rules.start if rules.host == "baseline" else None,
            "backbone": self.backbone,
            "base_network_fold": self.base_network_fold,
            "base_steps": rules.base_learner.steps if rules.host == "bam" else None,
            "width": rules.width,
            "features": rules.features,
            "output_stride": rules.output_stride,
            "image_size": self.pictures.canvas,
            "mean": list(self.preprocessing.mean),
            "std": list(self.preprocessing.std),
            "augment": rules.augment,
            "novel_classes": [data.split.name(label) for label in data.split.novel],
            "base_classes": [data.split.name(label) for label in data.split.base],
            "training_images": len(data.train.pairs),
            "images_with_novel_classes": data.novel_images,
            "removed_images_with_novel_classes": data.removed,
            "select_on": rules.select_on,
            "test_episodes": rules.test_episodes,
            "alignment": rules.alignment,
        }

    def draw(self, seed: int) -> FewShotDraw:
        """Give the fold's data with the episodes of a seed."""
        return FewShotDraw(self, seed)
