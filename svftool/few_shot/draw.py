"""The episodes of one seed as the training loop takes them: batches, losses, scores, pictures."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from svftool.few_shot.backbones import (
    Features,
    adapt_backbone,
    default_names,
    parse_names,
)
from svftool.few_shot.base_learner import (
    BaseProbabilities,
    published_learner,
    train_base_learner,
)
from svftool.few_shot.encoder import Encoder, View
from svftool.few_shot.experiment import Experiment
from svftool.few_shot.hosts import BaseLearner, HostOutput, Nearest, make_host
from svftool.few_shot.masks import IGNORE
from svftool.few_shot.network import FewShotNet, by_query
from svftool.few_shot.overlays import Overlays, write_overlay
from svftool.few_shot.paper_networks import own_base_learner
from svftool.few_shot.pictures import COCO_RANGES, PAPER_RANGES
from svftool.few_shot.pool import Asked, draw_episode
from svftool.few_shot.scoring import Pooled, Prediction, Scorer, load_masks
from svftool.processes import ALONE, Processes
from svftool.progress import SILENT, Progress
from svftool.tasks.base import Part, Prepared


class FewShotDraw:
    """One fold's data with the episodes of one seed; see `svftool.tasks.base.Draw`."""

    def __init__(self, task: Experiment, seed: int) -> None:
        self._task = task
        self._seed = seed
        self._pool = task.data.train
        self._scorer = Scorer(task.pictures, task.options.alignment, task.data.split.base)
        self._encoder: Encoder | None = None
        self._untrained: list[Tensor] = []
        self._base: BaseProbabilities | None = None

    @property
    def size(self) -> int:
        """Training images; an epoch asks for each once."""
        return len(self._pool.pairs)

    @property
    def held_out(self) -> int:
        """Episodes that weights are chosen by."""
        return 0 if self._task.options.select_on == "last" else self._task.options.select_episodes

    def prepare(self, model: nn.Module, *, start: bool = True) -> Prepared:
        """Set the backbone's resolution and put a new host on it."""
        task, options = self._task, self._task.options
        task.meet(model)
        names = parse_names(options.features) if options.features else default_names(model)
        plan = adapt_backbone(model, names, options.output_stride)
        device = next(model.parameters()).device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            host = make_host(
                options.host,
                plan.middle_channels,
                width=options.width,
                shots=task.shots,
                start=options.start or "nearest",
            )
        net = FewShotNet(model, plan, host.to(device))
        task.outputs.learn(net)
        self._encoder = self._base = None
        self._untrained = [one.detach().clone() for one in host.parameters()]
        layers = tuple(f"*{stage}.*" for stage in plan.trained)
        prepared = Prepared(net, "host", new_head=True, layers=layers)
        if options.host != "bam":
            return prepared
        self._base, learner = self._base_probabilities(net)
        return replace(prepared, beside=(learner,))

    def subdivide(self, count: int, seed: int) -> list[FewShotDraw]:
        """Return one fold, measured on held-out images of the base classes, where there are any.

        Weights that novel classes choose would let the test set choose the settings too.
        """
        task = self._task
        if task.options.select_on == "novel" or not task.held_out(task.shots).pairs:
            return []
        return [_BaseClassDraw(task, self._seed)]

    def order(self, generator: torch.Generator) -> Tensor:
        """Shuffle the training images."""
        return torch.randperm(self.size, generator=generator)

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Any]:
        """Draw an episode for each query, and load what cannot be kept.

        Returns
        -------
        dict
            ``views``: B queries, then their B x K supports. ``target`` (B, N, N), ``masks``
            (B, K, N, N) and ``own`` (B,); ``images`` (B + B x K, 3, N, N) where they are distorted.
        """
        random = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        task, pool = self._task, self._pool
        episodes = [draw_episode(pool, i, task.shots, random) for i in indices.tolist()]
        chosen = [(e.query, e.label) for e in episodes]
        chosen += [(index, e.label) for e in episodes for index in e.support]
        flips = random.random(len(chosen)) < 0.5
        turned = flips if task.options.augment == "light" else np.zeros_like(flips)
        views = [
            View(pool.pairs[index], label, bool(flip))
            for (index, label), flip in zip(chosen, turned, strict=True)
        ]
        batch: dict[str, Any] = {"views": views}
        if task.options.augment == "strong":
            ranges = COCO_RANGES if task.data.dataset == "coco-20i" else PAPER_RANGES
            asked = [(view.pair, view.label) for view in views]
            batch["images"], masks = task.pictures.all_distorted(asked, random, ranges)
        else:
            masks = load_masks(task.pictures, views)
        batch["target"] = masks[: len(episodes)]
        batch["masks"] = by_query(masks[len(episodes) :], task.shots)
        batch["own"] = torch.tensor([self._scorer.place_of(e.label) for e in episodes])
        return batch

    def share(self, batch: dict[str, Any], rows: slice) -> dict[str, Any]:
        """Take some of a batch's episodes: their queries and all their supports."""
        shots, first = self._task.shots, len(batch["target"])
        supports = slice(first + rows.start * shots, first + rows.stop * shots)
        taken = {name: batch[name][rows] for name in ("target", "masks", "own")}
        taken["views"] = [*batch["views"][rows], *batch["views"][supports]]
        if "images" in batch:
            taken["images"] = torch.cat([batch["images"][rows], batch["images"][supports]])
        return taken

    def terms(self, batch: dict[str, Any]) -> int:
        """Count the pixels of the queries that are not ignored."""
        return int((batch["target"] != IGNORE).sum())

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Cross-entropy of the host's predictions of a batch of episodes."""
        net = _net_of(model)
        if self._encoder is None or self._encoder.net is not net:
            self._encoder = self._encode(net, training=True)
        return self._predict(net, self._encoder, batch).loss(batch["target"])

    def evaluate(
        self, model: nn.Module, part: Part = "query", *, progress: Progress = SILENT
    ) -> dict[str, float]:
        """Return mIoU and FB-IoU of the novel classes, and of held-out images of the base classes.

        A host that has not been trained yet says nothing; in its place stands `Nearest`, which
        tells what the backbone can do by itself.
        """
        return self.measure(model, part, processes=ALONE, progress=progress)

    def measure(
        self, model: nn.Module, part: Part, *, processes: Processes, progress: Progress = SILENT
    ) -> dict[str, float]:
        """Measure as `evaluate` does, in several processes that take a share of the episodes."""
        net, options, task = _net_of(model), self._task.options, self._task
        net.eval()
        encoder = self._encode(net, training=False)
        score = partial(self._score, encoder, processes=processes, progress=progress)
        if part == "held_out":
            return score(self._asked(part))
        metrics: dict[str, float] = {}
        for shots in dict.fromkeys((task.shots, *options.test_shots)):
            suffix = "" if shots == task.shots else f"_{shots}shot"
            parts = (("", task.data.test, 0), ("base_", task.held_out(shots), 2))
            for prefix, pool, purpose in parts:
                if pool.pairs:
                    asked = Asked(pool, options.test_episodes, shots, purpose)
                    found = score(asked)
                    metrics |= {f"{prefix}{name}{suffix}": v for name, v in found.items()}
        if options.swap_supports and len(task.data.test.classes) > 1:
            asked = Asked(task.data.test, options.test_episodes, task.shots, 0, swapped=True)
            metrics["swapped_miou"] = score(asked)["miou"]
        if metrics["miou"] == 0:
            progress.warn(
                "no pixel of any novel class was found. A new host says background everywhere for "
                "its first hundred steps or two: raise --steps"
            )
        return metrics

    def illustrate(self, model: nn.Module, name: str) -> None:
        """Write pictures of the first test episodes of a run, where they were asked for."""
        overlays, task = self._task.overlays, self._task
        if overlays is None:
            return
        predictions = self._predictions(model, Asked(task.data.test, overlays.count, task.shots, 0))
        overlays.write(name, predictions, task.data.test, task.pictures, task.data.split)

    def predictions(self, model: nn.Module, part: Part, folder: Path) -> Iterator[dict[str, Any]]:
        """Yield a row for each episode, with a picture of the first ones.

        Yields
        ------
        dict
            ``class``, ``query`` and ``supports`` (names of files), ``iou`` of the episode alone,
            and ``picture``, the name of a file in `folder` or None.
        """
        task = self._task
        asked, overlays = self._asked(part), task.overlays or Overlays(folder)
        for number, prediction in enumerate(self._predictions(model, asked)):
            episode, pairs = prediction.episode, asked.pool.pairs
            label, pooled, picture = task.data.split.name(episode.label), Pooled(), None
            pooled.add(prediction.predicted, prediction.truth, episode.label)
            if number < overlays.count:
                picture = write_overlay(
                    folder, number, prediction, asked.pool, task.pictures, label
                ).name
            yield {
                "class": label,
                "query": pairs[episode.query].image.name,
                "supports": [pairs[index].image.name for index in episode.support],
                "iou": pooled.scores().miou,
                "picture": picture,
            }

    def _predictions(self, model: nn.Module, asked: Asked) -> Iterator[Prediction]:
        net = _net_of(model)
        net.eval()
        encoder = self._encode(net, training=False)
        return self._scoring().predict(
            self._host(net), encoder, asked.pool, asked.episodes(self._seed)
        )

    def _asked(self, part: Part) -> Asked:
        """Say which episodes of the task's own shots a part of the data is."""
        task, options = self._task, self._task.options
        if part == "query":
            return Asked(task.data.test, options.test_episodes, task.shots, purpose=0)
        novel = options.select_on == "novel"
        pool = task.data.test if novel else task.held_out(task.shots)
        return Asked(pool, options.select_episodes, task.shots, purpose=1)

    def _scoring(self) -> Scorer:
        return replace(self._scorer, base_maps=self._base)

    def _score(
        self, encoder: Encoder, asked: Asked, *, processes: Processes, progress: Progress
    ) -> dict[str, float]:
        scores = self._scoring().score(
            self._host(encoder.net),
            encoder,
            asked.pool,
            asked.episodes(self._seed),
            processes=processes,
            progress=progress,
        )
        return {"miou": scores.miou, "fb_iou": scores.fb_iou}

    def _host(self, net: FewShotNet) -> nn.Module:
        # PEFT keeps the host as it was beside the one that is trained.
        parameters, before = list(net.host.parameters()), self._untrained
        now = [one for one in parameters if one.requires_grad] or parameters
        same = len(now) == len(before) and all(map(torch.equal, now, before))
        return Nearest() if same else net.host

    def _encode(self, net: FewShotNet, *, training: bool) -> Encoder:
        task = self._task
        return Encoder(
            net, task.pictures, task.preprocessing, training=training, shared=task.outputs
        )

    def _predict(self, net: FewShotNet, encoder: Encoder, batch: dict[str, Any]) -> HostOutput:
        views: list[View] = batch["views"]
        masks: Tensor = batch["masks"]
        count = len(masks)
        images = batch.get("images")
        features = encoder.features(views) if images is None else encoder.features_of(images)
        query, shown = features.split(count)
        output: HostOutput = net.host(
            net.episodes(
                query,
                shown,
                masks,
                high=self._shown(encoder, views[count:], shown, batch),
                base=self._base_maps(views[:count], images),
                own=batch["own"],
            )
        )
        return output

    def _shown(
        self, encoder: Encoder, supports: Sequence[View], shown: Features, batch: dict[str, Any]
    ) -> Tensor | None:
        if "images" in batch:
            return None
        return encoder.shown(supports, shown, batch["masks"].flatten(0, 1))

    def _base_maps(self, queries: Sequence[View], images: Tensor | None) -> Tensor | None:
        if self._base is None:
            return None
        return self._base(queries) if images is None else self._base.of(images[: len(queries)])

    def _base_probabilities(self, net: FewShotNet) -> tuple[BaseProbabilities, BaseLearner]:
        """Train the base learner once a seed, on a copy of the backbone that stays as it is."""
        task = self._task
        frozen = FewShotNet(copy.deepcopy(net.backbone), net.plan, nn.Identity())
        frozen.requires_grad_(False).eval()
        encoder = self._encode(frozen, training=False)
        own = own_base_learner(net.backbone)
        if own is not None:
            learner = published_learner(own, self._pool)
            return BaseProbabilities(encoder, learner), learner
        if self._seed not in task.learners:
            task.learners[self._seed] = train_base_learner(
                encoder,
                net.plan.channels[net.plan.names.high],
                self._pool,
                task.pictures,
                replace(task.base_training, seed=self._seed),
                progress=task.progress,
            )
        learner = task.learners[self._seed]
        return BaseProbabilities(encoder, learner), learner


class _BaseClassDraw(FewShotDraw):
    """The same training, measured on held-out images of the base classes alone."""

    def measure(
        self, model: nn.Module, part: Part, *, processes: Processes, progress: Progress = SILENT
    ) -> dict[str, float]:
        """Return mIoU and FB-IoU of the base classes, whatever part is asked for."""
        return super().measure(model, "held_out", processes=processes, progress=progress)


def _net_of(model: nn.Module) -> FewShotNet:
    """Find the network in whatever wraps it: several processes, or adapters."""
    return next(module for module in model.modules() if isinstance(module, FewShotNet))
