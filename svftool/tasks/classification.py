"""Image classification: a folder of class folders, or a CSV file of path,label."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from svftool.errors import DataError, MissingDependencyError, ModelError, shortlist
from svftool.models import DEFAULT_PREPROCESSING, Preprocessing, find_head
from svftool.progress import SILENT, Progress
from svftool.tasks.base import Part, Prepared, TaskMetric, device_of
from svftool.tasks.heads import (
    head_inputs,
    logits_of,
    new_head,
    pool,
    require_module,
    start_head,
)
from svftool.tasks.images import check_labels, class_names, list_images, short_name
from svftool.tasks.options import ClassificationOptions, StrPath
from svftool.tasks.splits import (
    balanced_order,
    draw_shots,
    left_out,
    nothing_left,
    others,
    require_query,
)
from svftool.tasks.views import ImageSet, choose_view

# Metrics of classification, counted over batches.


class ClassificationCount:
    """Running confusion matrix and mean cross-entropy.

    Parameters
    ----------
    classes : int
        Number of classes.

    Examples
    --------
    >>> import torch
    >>> count = ClassificationCount(2)
    >>> count.add(torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 0, 1]))
    >>> result = count.result()
    >>> round(result["accuracy"], 3), result["class_accuracy"]
    (0.667, 0.5)
    """

    def __init__(self, classes: int) -> None:
        self._classes = classes
        self._confusion: Any = None
        self._loss = 0.0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count one batch.

        Parameters
        ----------
        logits : (N, C) Tensor
        labels : (N,) int64 Tensor
        """
        if self._confusion is None:
            self._confusion = _confusion_matrix(self._classes).to(labels.device)
        logits = logits.float()
        self._confusion.update(logits.argmax(1), labels)
        self._loss += float(cross_entropy(logits, labels, reduction="sum"))

    def result(self) -> dict[str, float]:
        """Accuracy, its mean over the classes that occur, and the mean loss in nats."""
        counts = self._confusion.compute().double()
        of_class, right = counts.sum(1), counts.diagonal()
        occurs = of_class > 0
        return {
            "accuracy": float(right.sum() / of_class.sum()),
            "class_accuracy": float((right[occurs] / of_class[occurs]).mean()),
            "loss": self._loss / float(of_class.sum()),
        }


def _confusion_matrix(classes: int) -> Any:
    try:
        from torchmetrics.classification import MulticlassConfusionMatrix
    except ImportError:
        purpose = "measuring accuracy"
        raise MissingDependencyError("torchmetrics", extra="vision", purpose=purpose) from None
    # One process measures while the others wait: torchmetrics would wait for them in turn.
    return MulticlassConfusionMatrix(classes, sync_on_compute=False)


SINGLE_EXAMPLE_RATE = 0.1
"""Share of the head's learning rate where each class has one example, which is its class mean."""

PIXELS_PER_BATCH = 64 * 224 * 224
LARGEST_BATCH = 256


@dataclass(frozen=True)
class Examples:
    """Labelled images: where they are kept, which of them, and their classes."""

    images: ImageSet
    indices: tuple[int, ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def at(self, positions: Sequence[int]) -> Examples:
        """Return the images at positions of `indices` as examples of their own."""
        indices = tuple(self.indices[position] for position in positions)
        return Examples(self.images, indices, self.labels[list(positions)])

    def take(self, positions: Sequence[int]) -> list[Tensor]:
        """Load the images at positions of `indices`."""
        return self.images.load([self.indices[position] for position in positions])

    def batches(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in order, centred and normalised, in batches that suit their size."""
        height, width = self.images.view.size
        size = max(1, min(LARGEST_BATCH, PIXELS_PER_BATCH // (height * width)))
        for start in range(0, len(self), size):
            positions = range(start, min(start + size, len(self)))
            batch = self.images.view.centre(self.take(positions))
            yield batch.to(device), self.labels[start : start + size].to(device)


class Classification:
    """The task ``classification``.

    Parameters
    ----------
    data : path-like
        Images to draw the support set from; see `svftool.tasks.images.list_images`.
    preprocessing : Preprocessing
        Normalisation and size that the checkpoint was trained with.
    options
        Fields of `svftool.tasks.options.ClassificationOptions`.

    Raises
    ------
    DataError
        If files, classes and shots do not fit together.
    """

    name = "classification"
    primary = TaskMetric("accuracy", higher_is_better=True)
    facts: Mapping[str, int] = MappingProxyType({})

    def __init__(
        self,
        data: StrPath,
        *,
        preprocessing: Preprocessing = DEFAULT_PREPROCESSING,
        **options: Any,
    ) -> None:
        self.options = chosen = ClassificationOptions(**options)
        images = list_images(Path(data))
        queries = [] if chosen.query_data is None else list_images(chosen.query_data)
        self.shots = chosen.shots
        self.classes = class_names(images, chosen.classes)
        check_labels(images, self.classes, data)
        check_labels(queries, self.classes, chosen.query_data or data)
        require_query(chosen.shots, chosen.evaluation, "images")
        draw_shots([image.label for image in images], shots=chosen.shots)
        mean, std = chosen.mean or preprocessing.mean, chosen.std or preprocessing.std
        preprocessing = replace(preprocessing, mean=mean, std=std)
        every = [image.path for image in (*images, *queries)]
        self.view = choose_view(every, preprocessing, size=chosen.image_size)
        self._names = [image.label for image in images]
        self._images = ImageSet([image.path for image in images], self.view)
        self._queries = self._examples(
            ImageSet([image.path for image in queries], self.view),
            range(len(queries)),
            [image.label for image in queries],
        )

    def describe(self) -> dict[str, Any]:
        """Shots, image size, normalisation and augmentation."""
        augment = self.options.augment
        return {
            "shots": self.shots,
            "image_size": list(self.view.size),
            "mean": list(self.view.mean),
            "std": list(self.view.std),
            "augment": augment if isinstance(augment, str) else "custom",
            "hold_out": self.options.hold_out,
            "sampling": self.options.sampling,
            "head_type": self.options.head_type,
        }

    def draw(self, seed: int) -> ClassificationDraw:
        """Draw the support set of a seed.

        Raises
        ------
        DataError
            If nothing is left to evaluate on.
        """
        split = draw_shots(self._names, shots=self.shots, hold_out=self.options.hold_out, seed=seed)
        query = self._queries
        if not len(query) and self.options.measured:
            query = self._examples(self._images, split.rest, self._names)
            if not len(query):
                raise nothing_left(self.shots, "images")
        support = self._examples(self._images, split.support, self._names)
        held_out = self._examples(self._images, split.held_out, self._names)
        return ClassificationDraw(self, support, held_out, query)

    def _examples(self, images: ImageSet, indices: Sequence[int], names: list[str]) -> Examples:
        order = {name: position for position, name in enumerate(self.classes)}
        labels = torch.tensor([order[names[index]] for index in indices], dtype=torch.int64)
        return Examples(images, tuple(indices), labels)


class ClassificationDraw:
    """Support, held-out and query images of one seed."""

    def __init__(
        self, task: Classification, support: Examples, held_out: Examples, query: Examples
    ) -> None:
        self._task = task
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

    def prepare(self, model: nn.Module, *, start: bool = True) -> Prepared:
        """Keep the model's head, or make one from the class means of its features.

        Without `start` the new head is left untrained.

        Raises
        ------
        ModelError
            If the model does not take the images, or ``keep`` meets another number of classes.
        """
        task, head = self._task, _head_of(model, self._task.options.head_name)
        outputs = self._outputs(model)
        if head is not None and outputs == len(task.classes) and task.options.head != "new":
            return Prepared(model, head)
        if task.options.head == "keep":
            raise ModelError(
                f"the checkpoint's head has {outputs} outputs, the data {len(task.classes)} "
                "classes. Use --head new, or give the head's class names in order with --classes"
            )
        model, head = new_head(model, head, len(task.classes), outputs, kind=task.options.head_type)
        if start:
            self._start_from_means(model, head)
        single = int(torch.bincount(self._support.labels).max()) == 1
        rate = SINGLE_EXAMPLE_RATE if single else 1.0
        return Prepared(model, head, new_head=True, head_rate=rate)

    def _outputs(self, model: nn.Module) -> int:
        batch = self._task.view.centre(self._support.take([0, self.size - 1]))
        try:
            with torch.inference_mode():
                outputs = pool(logits_of(model.eval()(batch.to(device_of(model)))))
        except (RuntimeError, ValueError, AssertionError) as error:
            height, width = self._task.view.size
            raise ModelError(
                f"the model does not take images of {height} x {width}: {_first_line(error)}. "
                "Choose the size with --image-size"
            ) from error
        return outputs.shape[1]

    def _start_from_means(self, model: nn.Module, head: str) -> None:
        classes, labels = self._task.classes, self._support.labels
        empty = [name for i, name in enumerate(classes) if not bool((labels == i).any())]
        if empty:
            raise DataError(
                f"no images of class {shortlist(empty)}, expected some of each for a new head"
            )
        device = device_of(model)
        with torch.inference_mode():
            inputs = head_inputs(model, head, (batch for batch, _ in self._support.batches(device)))
        start_head(model.get_submodule(head), inputs.clone(), labels.to(device), len(classes))

    def subdivide(self, count: int, seed: int) -> list[ClassificationDraw]:
        """Split the support set, every class alike; see `svftool.tasks.base.Subdivides`."""
        support, held_out = self._support, self._parts["held_out"]
        return [
            ClassificationDraw(
                self._task, support.at(others(fold, self.size)), held_out, support.at(fold)
            )
            for fold in left_out(support.labels.tolist(), count, seed=seed)
        ]

    def order(self, generator: torch.Generator) -> Tensor:
        """Shuffle the support set; with balanced sampling draw as many of each class."""
        if self._task.options.sampling == "balanced":
            return balanced_order(self._support.labels, generator)
        return torch.randperm(self.size, generator=generator)

    def terms(self, batch: tuple[Tensor, Tensor]) -> int:
        """Images that a batch's loss is the mean over."""
        return len(batch[1])

    @property
    def steady(self) -> bool:
        """Whether images look the same in every epoch."""
        return self._task.options.augment == "none"

    def batch(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Load and augment: (N, 3, height, width) float32 images and (N,) labels."""
        images = self._support.take(indices.tolist())
        augmented = self._task.view.augmented(images, self._task.options.augment, generator)
        return augmented, self._support.labels[indices]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean cross-entropy of a batch."""
        images, labels = batch
        return cross_entropy(logits_of(model(images)).float(), labels)

    @torch.inference_mode()
    def evaluate(
        self, model: nn.Module, part: Part = "query", *, progress: Progress = SILENT
    ) -> dict[str, float]:
        """Accuracy, its mean over classes, and mean cross-entropy; nothing of no images."""
        if not len(self._parts[part]):
            return {}
        examples, count = self._parts[part], ClassificationCount(len(self._task.classes))
        with progress.task("evaluate", total=len(examples), unit="images") as bar:
            for logits, labels in self._logits(model, part):
                count.add(logits, labels)
                bar.advance(len(labels))
        return count.result()

    @torch.inference_mode()
    def predictions(
        self, model: nn.Module, part: Part = "query", folder: Path | None = None
    ) -> Iterator[dict[str, Any]]:
        """Yield each image's class, the one that the model finds, and how sure it is of it."""
        names, examples = self._task.classes, self._parts[part]
        position = 0
        for logits, labels in self._logits(model, part):
            sure, found = logits.float().softmax(1).max(1)
            for label, other, probability in zip(
                labels.tolist(), found.tolist(), sure.tolist(), strict=True
            ):
                yield {
                    "file": short_name(examples.images.paths[examples.indices[position]]),
                    "label": names[label],
                    "prediction": names[other],
                    "probability": probability,
                }
                position += 1

    @torch.inference_mode()
    def _logits(self, model: nn.Module, part: Part) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits and labels, batch by batch."""
        model.eval()
        for images, labels in self._parts[part].batches(device_of(model)):
            yield logits_of(model(images)), labels


def _head_of(model: nn.Module, name: str | None) -> str | None:
    if name is None:
        return find_head(model)
    require_module(model, name)
    return name


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
