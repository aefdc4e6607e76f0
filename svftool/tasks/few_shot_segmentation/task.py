"""The task ``few-shot-segmentation``: one fold, one number of shots, one host."""

from __future__ import annotations

from typing import Any

from torch import nn

from svftool.models import DEFAULT_PREPROCESSING, Preprocessing
from svftool.progress import SILENT, Progress
from svftool.tasks.base import Metric
from svftool.tasks.few_shot_segmentation.canvas import canvas_side
from svftool.tasks.few_shot_segmentation.draw import FewShotDraw
from svftool.tasks.few_shot_segmentation.hosts import BaseLearner
from svftool.tasks.few_shot_segmentation.kept import SharedOutputs
from svftool.tasks.few_shot_segmentation.networks import (
    backbone_name,
    own_base_learner,
    require_one_fold,
)
from svftool.tasks.few_shot_segmentation.overlays import Overlays
from svftool.tasks.few_shot_segmentation.pictures import Pictures
from svftool.tasks.few_shot_segmentation.pool import (
    FoldData,
    Pool,
    require_held_out,
    require_shots,
)
from svftool.tasks.few_shot_segmentation.rules import DEFAULT_RULES, Rules


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
