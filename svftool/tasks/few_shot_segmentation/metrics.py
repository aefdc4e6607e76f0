"""Pooled intersections and unions: mIoU over classes and FB-IoU."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from svftool.tasks.few_shot_segmentation.masks import IGNORE, Mask


@dataclass(frozen=True)
class Scores:
    """How well masks were predicted.

    Attributes
    ----------
    miou : float
        Mean over classes of pooled intersection over pooled union of the foreground.
    fb_iou : float
        Mean of the foreground's and the background's pooled ratios, all episodes in one pool.
    classes : dict
        The ratio of each class.
    episodes : int
        How many predictions were counted.
    """

    miou: float
    fb_iou: float
    classes: dict[int, float]
    episodes: int


class Pooled:
    """Running sums of intersections and unions, in pixels.

    Episodes are pooled before any ratio is formed, so that a large object weighs more than a small
    one, as in all published numbers.
    """

    def __init__(self) -> None:
        self._classes: dict[int, npt.NDArray[np.int64]] = {}
        self._background = np.zeros(2, dtype=np.int64)
        self._episodes = 0

    def add(
        self, prediction: npt.NDArray[np.bool_] | npt.NDArray[np.uint8], truth: Mask, label: int
    ) -> None:
        """Count one prediction.

        Parameters
        ----------
        prediction : (height, width) array
            Non-zero where the class is predicted.
        truth : (height, width) uint8 array
            1 for the class, 0 for the rest, 255 for pixels that count neither way.
        label : int
            The class.
        """
        counted = truth != IGNORE
        found, wanted = (prediction != 0) & counted, truth == 1
        self._classes[label] = self._classes.get(label, 0) + _overlap(found, wanted)
        self._background += _overlap(~found & counted, ~wanted & counted)
        self._episodes += 1

    def include(self, other: Pooled) -> None:
        """Count what another has counted; sums of whole pixels do not depend on the order."""
        for label, sums in other._classes.items():
            self._classes[label] = self._classes.get(label, 0) + sums
        self._background += other._background
        self._episodes += other._episodes

    def scores(self) -> Scores:
        """Give the scores of everything counted; NaN where nothing was."""
        ratios = {label: _ratio(sums) for label, sums in sorted(self._classes.items())}
        present = [ratio for ratio in ratios.values() if not np.isnan(ratio)]
        foreground = sum(self._classes.values(), np.zeros(2, dtype=np.int64))
        return Scores(
            miou=float(np.mean(present)) if present else float("nan"),
            fb_iou=(_ratio(foreground) + _ratio(self._background)) / 2,
            classes=ratios,
            episodes=self._episodes,
        )


def _overlap(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    return np.array([np.count_nonzero(a & b), np.count_nonzero(a | b)], dtype=np.int64)


def _ratio(sums: npt.NDArray[np.int64]) -> float:
    return float(sums[0] / sums[1]) if sums[1] else float("nan")
