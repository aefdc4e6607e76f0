"""The task ``few-shot-segmentation``: one fold, one number of shots, one host."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from svftool.few_shot.base_learner import BaseTraining
from svftool.few_shot.draw import FewShotDraw
from svftool.few_shot.encoder import SharedOutputs
from svftool.few_shot.experiment import DEFAULT_SIZE, Experiment
from svftool.few_shot.masks import canvas_side
from svftool.few_shot.overlays import Overlays
from svftool.few_shot.pictures import Pictures
from svftool.few_shot.sources import open_source
from svftool.models import DEFAULT_PREPROCESSING, Preprocessing
from svftool.progress import SILENT, Progress
from svftool.tasks.base import TaskMetric
from svftool.tasks.options import FewShotOptions

SIZES = {"coco-20i": 641}


class FewShotSegmentation(Experiment):
    """The task ``few-shot-segmentation``; its parameters are those of `Experiment`."""

    name = "few-shot-segmentation"
    primary = TaskMetric("miou", higher_is_better=True)
    classes = None

    @property
    def facts(self) -> dict[str, int]:
        """The fold."""
        return {"fold": self.data.split.fold}

    def describe(self) -> dict[str, Any]:
        """Say what was trained on, and by which options."""
        data, options = self.data, self.options
        return {
            "dataset": data.dataset,
            "fold": data.split.fold,
            "inner_fold": data.split.inner,
            "shots": self.shots,
            "host": options.host,
            "start": (options.start or "nearest") if options.host == "baseline" else None,
            "backbone": self.backbone,
            "base_network_fold": self.base_network_fold,
            "base_steps": self.base_training.steps if options.host == "bam" else None,
            "width": options.width,
            "features": options.features,
            "output_stride": options.output_stride,
            "image_size": self.pictures.canvas,
            "mean": list(self.preprocessing.mean),
            "std": list(self.preprocessing.std),
            "augment": options.augment,
            "novel_classes": [data.split.name(label) for label in data.split.novel],
            "base_classes": [data.split.name(label) for label in data.split.base],
            "training_images": len(data.train.pairs),
            "images_with_novel_classes": data.novel_images,
            "removed_images_with_novel_classes": data.removed,
            "select_on": options.select_on,
            "test_episodes": options.test_episodes,
            "alignment": options.alignment,
        }

    def draw(self, seed: int) -> FewShotDraw:
        """Return the fold's data with the episodes of a seed."""
        return FewShotDraw(self, seed)


def few_shot_tasks(
    data: Path,
    *,
    preprocessing: Preprocessing = DEFAULT_PREPROCESSING,
    base_learner: BaseTraining | None = None,
    progress: Progress = SILENT,
    **given: Any,
) -> list[FewShotSegmentation]:
    """Make the tasks of a comparison over folds and shots.

    Parameters
    ----------
    data : Path
        Folder of the data set; see `svftool.few_shot.sources.open_source`.
    preprocessing : Preprocessing
        Mean and deviation that the backbone was trained with.
    base_learner : BaseTraining, optional
        First stage of BAM; by default as ``base_steps`` says.
    progress : Progress
        Told of the masks that are read, and of the base learner's training.
    given
        Fields of `svftool.tasks.options.FewShotOptions`.

    Returns
    -------
    list of FewShotSegmentation
        By shots, then folds.

    Raises
    ------
    DataError
        If the data cannot be read, a fold does not exist or a class is too small.
    UsageError
        If there are no folds or shots, or one is named twice; if an option belongs to another
        host.
    """
    options = FewShotOptions(**given)
    source = open_source(data, lists=options.lists)
    size = options.image_size or SIZES.get(source.dataset, DEFAULT_SIZE)
    options = replace(options, image_size=size)
    parts = {
        (count, fold): source.fold(
            fold,
            inner=options.inner,
            shots=count,
            remove_novel=options.remove_novel,
            progress=progress,
        )
        for count in options.shots
        for fold in options.folds
    }
    pictures, outputs = Pictures(canvas_side(size)), SharedOutputs()
    mean, std = options.mean or preprocessing.mean, options.std or preprocessing.std
    return [
        FewShotSegmentation(
            fold_data,
            shots=count,
            options=options,
            base_training=base_learner,
            preprocessing=replace(preprocessing, mean=mean, std=std),
            pictures=pictures,
            outputs=outputs,
            overlays=_overlays(options),
            folds=tuple(options.folds),
            progress=progress,
        )
        for (count, _), fold_data in parts.items()
    ]


def _overlays(options: FewShotOptions) -> Overlays | None:
    if options.overlays is None:
        return None
    if options.overlay_count is None:
        return Overlays(options.overlays)
    return Overlays(options.overlays, options.overlay_count)
