"""From options to tasks: one for every fold and number of shots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from svftool.errors import UsageError
from svftool.few_shot.base_learner import BaseTraining
from svftool.few_shot.encoder import SharedOutputs
from svftool.few_shot.masks import canvas_side
from svftool.few_shot.overlays import Overlays
from svftool.few_shot.pictures import Pictures
from svftool.few_shot.sources import open_source
from svftool.few_shot.task import DEFAULT_RULES, FewShotSegmentation, Rules
from svftool.models import DEFAULT_PREPROCESSING, Preprocessing
from svftool.progress import SILENT, Progress

SIZES = {"coco-20i": 641}
DEFAULT_SIZE = 473


def few_shot_tasks(
    data: Path,
    *,
    preprocessing: Preprocessing = DEFAULT_PREPROCESSING,
    folds: Sequence[int] = (0,),
    shots: Sequence[int] = (1,),
    test_shots: Sequence[int] = (),
    inner: int | None = None,
    lists: Path | None = None,
    remove_novel: bool = False,
    image_size: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    overlays: Path | None = None,
    overlay_count: int | None = None,
    base_steps: int | None = None,
    progress: Progress = SILENT,
    **rules: Any,
) -> list[FewShotSegmentation]:
    """Make the tasks of a comparison over folds and shots.

    Parameters
    ----------
    data : Path
        Folder of the data set; see `svftool.few_shot.sources.open_source`.
    preprocessing : Preprocessing
        Mean and deviation that the backbone was trained with.
    folds : sequence of int
        Folds, from 0.
    shots, test_shots : sequence of int
        Supports of an episode; further numbers to test with.
    inner : int, optional
        A fold whose classes stand in for the novel ones, which take no part: for making choices
        without a look at them.
    lists : Path, optional
        Folder of list files.
    remove_novel : bool
        Leave out training images that hold novel classes, as BAM and SVF do.
    image_size : int, optional
        Side of the canvases; 473, on COCO-20i 641.
    mean, std : tuple of float, optional
        Of the channels, in place of those in `preprocessing`.
    overlays : Path, optional
        Folder for pictures of predictions: supports, truth and prediction side by side.
    overlay_count : int, optional
        How many of each run; 12.
    base_steps : int, optional
        Steps in which BAM's base learner is trained; 400.
    progress : Progress
        Told of the masks that are read, and of the base learner's training.
    rules
        Fields of `Rules`.

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
    for name, values in (("fold", folds), ("shots", shots)):
        if not values or len(set(values)) < len(values):
            raise UsageError(f"--{name} {','.join(map(str, values))}: expected each number once")
    if min(shots) < 1:
        raise UsageError(f"--shots {min(shots)}: expected at least 1")
    _require_host(rules, "start", rules.get("start"), "baseline")
    _require_host(rules, "base-steps", base_steps, "bam")
    if base_steps is not None:
        rules["base_learner"] = BaseTraining(steps=base_steps)
    source = open_source(data, lists=lists)
    size = image_size or SIZES.get(source.dataset, DEFAULT_SIZE)
    parts = {
        (count, fold): source.fold(
            fold, inner=inner, shots=count, remove_novel=remove_novel, progress=progress
        )
        for count in shots
        for fold in folds
    }
    chosen = Rules(image_size=size, test_shots=tuple(test_shots), **rules)
    pictures, outputs = Pictures(canvas_side(size)), SharedOutputs()
    drawn = _overlays(overlays, overlay_count)
    seen_as = replace(preprocessing, mean=mean or preprocessing.mean, std=std or preprocessing.std)
    return [
        FewShotSegmentation(
            data_of_fold,
            shots=count,
            rules=chosen,
            preprocessing=seen_as,
            pictures=pictures,
            outputs=outputs,
            overlays=drawn,
            folds=tuple(folds),
            progress=progress,
        )
        for (count, _), data_of_fold in parts.items()
    ]


def _require_host(rules: Mapping[str, Any], option: str, value: object, owner: str) -> None:
    host = rules.get("host", DEFAULT_RULES.host)
    if value is not None and host != owner:
        raise UsageError(f"--{option} has no meaning for --host {host}, only for {owner}")


def _overlays(folder: Path | None, count: int | None) -> Overlays | None:
    if folder is None:
        if count is not None:
            raise UsageError("--overlay-count has no meaning without --overlays")
        return None
    return Overlays(folder) if count is None else Overlays(folder, count)
