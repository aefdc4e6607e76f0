"""Test episodes through a backbone and a host to pooled scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from svftool.processes import ALONE, Processes
from svftool.progress import SILENT, Progress
from svftool.tasks.few_shot_segmentation.canvas import Alignment, predict_at
from svftool.tasks.few_shot_segmentation.encoding import Encoder
from svftool.tasks.few_shot_segmentation.episodes import Episode
from svftool.tasks.few_shot_segmentation.kept import View
from svftool.tasks.few_shot_segmentation.masks import Mask
from svftool.tasks.few_shot_segmentation.metrics import Pooled, Scores
from svftool.tasks.few_shot_segmentation.network import by_query
from svftool.tasks.few_shot_segmentation.pictures import Pictures
from svftool.tasks.few_shot_segmentation.pool import Pool

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
        pool: Pool,
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
        pool : Pool
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
        pool: Pool,
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
        self, host: nn.Module, encoder: Encoder, pool: Pool, episodes: Sequence[Episode]
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
        self, host: nn.Module, encoder: Encoder, pool: Pool, episodes: Sequence[Episode]
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
        """Give the place of a class among the base classes, -1 for a novel one."""
        return self.base_classes.index(label) if label in self.base_classes else -1


def load_masks(pictures: Pictures, views: Sequence[View]) -> Tensor:
    """Load the masks of the views' classes: (N, canvas, canvas) uint8."""
    return torch.stack(
        [pictures.mask(view.pair, view.label, flipped=view.flipped) for view in views]
    )
