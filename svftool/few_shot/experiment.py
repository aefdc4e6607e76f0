"""One fold of an experiment: what every draw of its episodes works with."""

from __future__ import annotations

from torch import nn

from svftool.few_shot.base_learner import BaseTraining
from svftool.few_shot.encoder import SharedOutputs
from svftool.few_shot.hosts import BaseLearner
from svftool.few_shot.masks import canvas_side
from svftool.few_shot.overlays import Overlays
from svftool.few_shot.paper_networks import backbone_name, own_base_learner, require_one_fold
from svftool.few_shot.pictures import Pictures
from svftool.few_shot.pool import FoldData, ImagePool, require_held_out, require_shots
from svftool.models import DEFAULT_PREPROCESSING, Preprocessing
from svftool.progress import SILENT, Progress
from svftool.tasks.options import FewShotOptions

DEFAULTS = FewShotOptions()
DEFAULT_SIZE = 473
"""Side of the canvases; rounded to ``8 k + 1``."""


class Experiment:
    """One fold with one number of shots: its data, its options, and what its draws share.

    Parameters
    ----------
    data : FoldData
        The fold.
    shots : int
        Supports of an episode, in training and testing.
    options : FewShotOptions
        Everything else.
    base_training : BaseTraining, optional
        First stage of BAM; by default as `options` says.
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

    def __init__(
        self,
        data: FoldData,
        *,
        shots: int = 1,
        options: FewShotOptions = DEFAULTS,
        base_training: BaseTraining | None = None,
        preprocessing: Preprocessing = DEFAULT_PREPROCESSING,
        pictures: Pictures | None = None,
        outputs: SharedOutputs | None = None,
        overlays: Overlays | None = None,
        folds: tuple[int, ...] = (),
        progress: Progress = SILENT,
    ) -> None:
        require_shots(data, "training", shots)
        require_shots(data, "test", max(shots, *options.test_shots, 1))
        if options.select_on == "base":
            require_held_out(data, shots)
        self.data = data
        self.shots = shots
        self.options = options
        self.base_training = base_training or _base_training(options)
        self.preprocessing = preprocessing
        self.pictures = pictures or Pictures(canvas_side(options.image_size or DEFAULT_SIZE))
        self.outputs = outputs or SharedOutputs()
        self.overlays = overlays
        self.folds = folds or (data.split.fold,)
        self.progress = progress
        self.learners: dict[int, BaseLearner] = {}
        self.backbone: str | None = None
        self.base_network_fold: int | None = None

    def held_out(self, shots: int) -> ImagePool:
        """Return the held-out images of the base classes that have enough for so many shots."""
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


def _base_training(options: FewShotOptions) -> BaseTraining:
    return BaseTraining() if options.base_steps is None else BaseTraining(steps=options.base_steps)
