"""Few-shot segmentation: the experiment that singular-value fine-tuning was made for."""

from svftool.tasks.few_shot_segmentation.build import few_shot_tasks
from svftool.tasks.few_shot_segmentation.rules import Rules
from svftool.tasks.few_shot_segmentation.task import FewShotSegmentation

__all__ = ["FewShotSegmentation", "Rules", "few_shot_tasks"]
