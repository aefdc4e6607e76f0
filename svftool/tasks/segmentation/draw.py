"""What one seed trains on and is measured with in segmentation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from svftool.errors import MissingDependencyError, ModelError
from svftool.progress import SILENT, Progress
from svftool.tasks.base import CHOOSE_SIZE, Part, Prepared, device_of, forward_errors
from svftool.tasks.heads import require_module
from svftool.tasks.images import read_bytes
from svftool.tasks.layout import in_suited_layout
from svftool.tasks.options import SegmentationOptions
from svftool.tasks.segmentation.heads import (
    WithDenseHead,
    common_module,
    dense_heads,
    dense_logits,
    enlarge,
    find_features,
    last_layer,
    make_head,
    replace_heads,
    start_from_means,
)
from svftool.tasks.segmentation.pairs import Chosen
from svftool.tasks.segmentation.views import DenseView
from svftool.tasks.splits import left_out, others


@dataclass(frozen=True)
class Setting:
    """What all draws of one task share."""

    options: SegmentationOptions
    classes: tuple[str, ...]
    view: DenseView

    @property
    def ignore(self) -> int:
        """Label of pixels without a class."""
        return self.options.ignore_index


class SegmentationDraw:
    """Support, held-out and query pairs of one seed."""

    def __init__(
        self, setting: Setting, support: Chosen, held_out: Chosen, query: Chosen, *, seed: int
    ) -> None:
        self._setting = setting
        self._seed = seed
        self._support = support
        self._parts = {"held_out": held_out, "query": query}

    @property
    def size(self) -> int:
        """Images to train on."""
        return len(self._support)

    @property
    def held_out(self) -> int:
        """Images held out of the support set."""
        return len(self._parts["held_out"])

    @property
    def measured(self) -> int:
        """Images to measure with."""
        return len(self._parts["query"])

    def contents(self, part: Literal["support", "query"]) -> Iterator[bytes]:
        """Read the image files; see `svftool.tasks.base.HasContents`."""
        support = (self._support, self._parts["held_out"])
        for chosen in support if part == "support" else (self._parts["query"],):
            for index in chosen.indices:
                yield read_bytes(chosen.source.pairs[index].image)

    def prepare(self, model: nn.Module, *, start: bool = True) -> Prepared:
        """Keep the model's head, replace its last layer, or put a new head on a backbone.

        A new last layer starts from the mean directions of the classes' pixels, unless told not
        to with `start`.

        Raises
        ------
        ModelError
            If the model does not take the images, or ``keep`` meets another number of classes.
        """
        setting, classes = self._setting, len(self._setting.classes)
        images = next(self._views(model))[0]
        outputs, heads = self._heads(model.eval(), images)
        if heads and outputs == classes and setting.options.head != "new":
            return Prepared(model, common_module(heads))
        if setting.options.head == "keep":
            raise ModelError(
                f"the checkpoint's head has {outputs or 'no'} outputs for pixels, the data "
                f"{classes} classes. Use --head new, or give the head's classes with --classes"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            if heads:
                replace_heads(model, heads, classes)
                name = common_module(heads)
            else:
                model, name = self._with_head(model, images), "head"
        model.eval()
        if start and len(heads) < 2:
            layer = last_layer(model.get_submodule(name))
            start_from_means(model, layer, self._views(model), ignore=setting.ignore)
        return Prepared(model, name, new_head=True)

    def _views(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Every support image as training without augmentation sees it."""
        for position in range(self.size):
            images, maps = self._support.take([position])
            batch, labels = self._setting.view.training(images, maps, "none", torch.Generator())
            yield batch.to(device_of(model)), labels.to(device_of(model))

    def _heads(self, model: nn.Module, images: Tensor) -> tuple[int | None, list[str]]:
        """Channels of the model's logits and the modules that give them; none for a backbone."""
        setting = self._setting
        height, width = images.shape[-2:]
        with forward_errors(f"images of {height} x {width}", CHOOSE_SIZE), torch.inference_mode():
            output = in_suited_layout(model, partial(model, images))
        try:
            outputs = dense_logits(output).shape[1]
        except ModelError:
            return None, []
        if setting.options.head_name is not None:
            require_module(model, setting.options.head_name)
            return outputs, [setting.options.head_name]
        return outputs, dense_heads(model, outputs)

    def _with_head(self, model: nn.Module, images: Tensor) -> nn.Module:
        setting = self._setting
        if setting.options.features is not None:
            require_module(model, setting.options.features, option="--features")
        with torch.inference_mode():
            name, channels = find_features(model, images, only=setting.options.features)
        like = next(model.parameters())
        head = make_head(setting.options.head_type, channels, len(setting.classes), like)
        return WithDenseHead(model, name, head)

    def subdivide(self, count: int, seed: int) -> list[SegmentationDraw]:
        """Split the support set by images; see `svftool.tasks.base.Subdivides`."""
        support, held_out = self._support, self._parts["held_out"]
        return [
            SegmentationDraw(
                self._setting,
                support.at(others(fold, self.size)),
                held_out,
                support.at(fold),
                seed=self._seed,
            )
            for fold in left_out([0] * self.size, count, seed=seed)
        ]

    def order(self, generator: torch.Generator) -> Tensor:
        """Shuffle the support set."""
        return torch.randperm(self.size, generator=generator)

    @property
    def steady(self) -> bool:
        """Whether images look the same in every epoch."""
        return self._setting.options.augment == "none"

    def batch(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Load and augment: (N, 3, h, w) float32 images and (N, h, w) int64 labels."""
        images, maps = self._support.take(indices.tolist())
        return self._setting.view.training(images, maps, self._setting.options.augment, generator)

    def terms(self, batch: tuple[Tensor, Tensor]) -> int:
        """Pixels that a batch's loss is the mean over."""
        return int((batch[1] != self._setting.ignore).sum())

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean cross-entropy of the pixels that are not ignored; 0 if there are none."""
        return self.smoothed_loss(model, batch, 0.0)

    def smoothed_loss(
        self, model: nn.Module, batch: tuple[Tensor, Tensor], smoothing: float
    ) -> Tensor:
        """Mean cross-entropy of the pixels that are not ignored, to smoothed labels."""
        images, labels = batch
        logits = enlarge(dense_logits(model(images)), (labels.shape[1], labels.shape[2]))
        total = cross_entropy(
            logits,
            labels,
            ignore_index=self._setting.ignore,
            reduction="sum",
            label_smoothing=smoothing,
        )
        return total / (labels != self._setting.ignore).sum().clamp(min=1)

    @torch.inference_mode()
    def evaluate(
        self, model: nn.Module, part: Part = "query", *, progress: Progress = SILENT
    ) -> dict[str, float]:
        """Mean IoU and accuracy of pixels at the maps' own size, and mean loss.

        Classes that are neither in the maps nor predicted do not count. Nothing of no images.
        """
        chosen, ignore = self._parts[part], self._setting.ignore
        if not len(chosen):
            return {}
        metrics = _metrics(len(self._setting.classes), ignore).to(device_of(model))
        loss, pixels = 0.0, 0
        with progress.task("evaluate", total=len(chosen), unit="images") as bar:
            for positions, logits, labels in self.logits(model, part):
                sums = cross_entropy(logits, labels, ignore_index=ignore, reduction="sum")
                loss, pixels = loss + float(sums), pixels + int((labels != ignore).sum())
                metrics.update(logits.argmax(1), labels)
                bar.advance(len(positions))
        found = {name: float(value) for name, value in metrics.compute().items()}
        return {**found, "loss": loss / pixels}

    @torch.inference_mode()
    def predictions(
        self, model: nn.Module, part: Part = "query", folder: Path | None = None
    ) -> Iterator[dict[str, Any]]:
        """Yield each image's name, its share of right pixels, and its map as a picture."""
        chosen, ignore = self._parts[part], self._setting.ignore
        for positions, logits, labels in self.logits(model, part):
            for position, found, wanted in zip(positions, logits.argmax(1), labels, strict=True):
                pair = chosen.source.pairs[chosen.indices[position]]
                right = (found == wanted)[wanted != ignore].float().mean()
                yield {
                    "file": f"{pair.name}{pair.image.suffix}",
                    "map": None if folder is None else write_map(folder, pair.name, found),
                    "pixel_accuracy": float(right),
                }

    @torch.inference_mode()
    def logits(self, model: nn.Module, part: Part) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Yield positions, logits at the maps' own size, and labels, batch by batch."""
        model.eval()
        device = device_of(model)
        classes = len(self._setting.classes)
        for positions, images, maps in self._parts[part].batches(classes, device):
            batch = self._setting.view.normalised(images).to(device)
            labels = torch.stack(maps).to(device, torch.int64)
            logits = enlarge(dense_logits(model(batch)), (labels.shape[1], labels.shape[2]))
            yield positions, logits, labels


def _metrics(classes: int, ignore: int) -> Any:
    try:
        from torchmetrics import MetricCollection
        from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
    except ImportError:
        purpose = "task segmentation"
        raise MissingDependencyError("torchmetrics", extra="vision", purpose=purpose) from None
    # One process measures while the others wait: torchmetrics would wait for them in turn.
    options: dict[str, Any] = {
        "num_classes": classes,
        "ignore_index": ignore,
        "sync_on_compute": False,
    }
    return MetricCollection(
        {
            "miou": MulticlassJaccardIndex(**options, average="macro"),
            "pixel_accuracy": MulticlassAccuracy(**options, average="micro"),
        }
    )


def write_map(folder: Path, name: str, labels: Tensor) -> str:
    """Write a map of class numbers as PNG; return its path in the folder."""
    from PIL import Image

    file = folder / f"{name}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels.to("cpu", torch.uint8).numpy()).save(file)
    return f"{name}.png"
