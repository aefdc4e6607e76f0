"""Test episodes through a backbone and a host to pooled scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from svftool.few_shot.encoder import Encoder, View
from svftool.few_shot.masks import IGNORE, Alignment, Mask, predict_at
from svftool.few_shot.network import by_query
from svftool.few_shot.pictures import Pictures
from svftool.few_shot.pool import Episode, ImagePool
from svftool.processes import ALONE, Processes
from svftool.progress import SILENT, Progress

# Pooled intersections and unions: mIoU over classes and FB-IoU.


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
        """Return the scores of everything counted; NaN where nothing was."""
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


EPISODES_AT_ONCE = 8

BaseMaps = Callable[[Sequence[View]], Tensor]
"""Gives the base learner's probabilities for pictures."""


@dataclass(frozen=True)
class Prediction:
    """What was predicted for the query of one episode, at the picture's own size."""

    episode: Episode
    predicted: npt.NDArray[np.bool_]
    truth: Mask


@dataclass(frozen=True)
class Scorer:
    """How predictions are made and scored.

    Attributes
    ----------
    pictures : Pictures
        The images and masks.
    alignment : {"content", "canvas"}
        How canvases become predictions at the picture's own size; see `predict_at`.
    base_classes : tuple of int
        The classes that the base learner knows, in its order.
    base_maps : callable or None
        Base probabilities, for a host that takes them.
    """

    pictures: Pictures
    alignment: Alignment = "content"
    base_classes: tuple[int, ...] = ()
    base_maps: BaseMaps | None = None

    def score(
        self,
        host: nn.Module,
        encoder: Encoder,
        pool: ImagePool,
        episodes: Sequence[Episode],
        *,
        processes: Processes = ALONE,
        progress: Progress = SILENT,
    ) -> Scores:
        """Predict all episodes and pool the scores.

        Intersections and unions are whole pixels, so processes that take a share each come to the
        scores of a single one, but for pixels whose two logits are equal up to rounding.

        Parameters
        ----------
        host : nn.Module
            In evaluation mode.
        encoder : Encoder
            Gives the features that it takes.
        pool : ImagePool
            What the episodes index.
        episodes : sequence of Episode
            All of the same number of shots.
        processes : Processes
            Those that share the episodes; all of them are here with equal weights.
        progress : Progress
            Told of each episode of this process.
        """
        part = episodes[processes.rank :: processes.count]
        pooled = processes.together(lambda: self._pooled(host, encoder, pool, part, progress))
        whole = Pooled()
        for share in processes.gather(pooled):
            whole.include(share)
        return whole.scores()

    def _pooled(
        self,
        host: nn.Module,
        encoder: Encoder,
        pool: ImagePool,
        episodes: Sequence[Episode],
        progress: Progress,
    ) -> Pooled:
        pooled = Pooled()
        with progress.task("test episodes", total=len(episodes), unit="episodes") as bar:
            for prediction in self.predict(host, encoder, pool, episodes):
                pooled.add(prediction.predicted, prediction.truth, prediction.episode.label)
                bar.advance()
        return pooled

    @torch.no_grad()
    def predict(
        self, host: nn.Module, encoder: Encoder, pool: ImagePool, episodes: Sequence[Episode]
    ) -> Iterator[Prediction]:
        """Predict the episodes one after the other."""
        for start in range(0, len(episodes), EPISODES_AT_ONCE):
            part = episodes[start : start + EPISODES_AT_ONCE]
            logits = self._logits(host, encoder, pool, part)
            for episode, of_query in zip(part, logits, strict=True):
                truth = self.pictures.truth(pool.pairs[episode.query], episode.label)
                size = (truth.shape[0], truth.shape[1])
                predicted = predict_at(
                    of_query, size, self.pictures.canvas, alignment=self.alignment
                )
                yield Prediction(episode, predicted, truth)

    def _logits(
        self, host: nn.Module, encoder: Encoder, pool: ImagePool, episodes: Sequence[Episode]
    ) -> Tensor:
        queries = [View(pool.pairs[e.query], e.label) for e in episodes]
        supports = [View(pool.pairs[i], e.shown) for e in episodes for i in e.support]
        masks = load_masks(self.pictures, supports).to(encoder.device)
        shown = encoder.features(supports)
        high = encoder.shown(supports, shown, masks)
        own = [self.place_of(e.label) for e in episodes]
        output = host(
            encoder.net.episodes(
                encoder.features(queries),
                shown,
                by_query(masks, len(supports) // len(queries)),
                high=high,
                base=None if self.base_maps is None else self.base_maps(queries),
                own=torch.tensor(own, device=encoder.device),
            )
        )
        logits: Tensor = output.logits
        return logits

    def place_of(self, label: int) -> int:
        """Return the place of a class among the base classes, -1 for a novel one."""
        return self.base_classes.index(label) if label in self.base_classes else -1


def load_masks(pictures: Pictures, views: Sequence[View]) -> Tensor:
    """Load the masks of the views' classes: (N, canvas, canvas) uint8."""
    return torch.stack(
        [pictures.mask(view.pair, view.label, flipped=view.flipped) for view in views]
    )
