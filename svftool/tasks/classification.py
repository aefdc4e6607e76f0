"""Image classification: a folder of class folders, or a CSV file of path,label."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from svftool.errors import DataError, MissingDependencyError, ModelError, shortlist
from svftool.models import DEFAULT_PREPROCESSING, Preprocessing, find_head
from svftool.progress import SILENT, Progress
from svftool.tasks.base import CHOOSE_SIZE, Part, Prepared, TaskMetric, device_of, forward_errors
from svftool.tasks.heads import (
    MOST_JUDGED,
    are_telling,
    head_inputs,
    head_rows,
    keep_rows,
    logits_of,
    new_head,
    pool,
    require_module,
    start_head,
    try_head,
)
from svftool.tasks.images import (
    check_labels,
    class_names,
    list_images,
    natural_order,
    order_warning,
    read_bytes,
    short_name,
)
from svftool.tasks.options import ClassificationOptions, StrPath
from svftool.tasks.splits import (
    balanced_order,
    draw_shots,
    left_out,
    nothing_left,
    others,
    require_query,
)
from svftool.tasks.views import ImageSet, ImageView, choose_view

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
    head_classes : sequence of str, optional
        What the outputs of the checkpoint's head are, where it says. They are held against the
        data's classes unless ``classes`` are given.
    whole_head : bool
        Measure a head with all of its classes where the data has a part of them; otherwise only
        the outputs of that part are kept.
    view : ImageView, optional
        What images went through when the weights were trained, in place of `preprocessing`.
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
        head_classes: Sequence[str] | None = None,
        whole_head: bool = False,
        view: ImageView | None = None,
        **options: Any,
    ) -> None:
        self.options = chosen = ClassificationOptions(**options)
        images = list_images(Path(data))
        queries = [] if chosen.query_data is None else list_images(chosen.query_data)
        self.shots = chosen.shots
        names = class_names(images, chosen.classes)
        self.of_head = _of_head(names, head_classes, chosen, whole=whole_head)
        self.classes = self.of_head.classes
        check_labels(images, self.classes, data)
        check_labels(queries, self.classes, chosen.query_data or data)
        require_query(chosen.shots, chosen.evaluation, "images")
        draw_shots([image.label for image in images], shots=chosen.shots)
        mean, std = chosen.mean or preprocessing.mean, chosen.std or preprocessing.std
        preprocessing = replace(preprocessing, mean=mean, std=std)
        every = [image.path for image in (*images, *queries)]
        self.view = choose_view(every, preprocessing, size=chosen.image_size, trained=view)
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
            **self.view.to_plain(),
            "mean": list(self.view.mean),
            "std": list(self.view.std),
            "augment": augment if isinstance(augment, str) else "custom",
            "hold_out": self.options.hold_out,
            "sampling": self.options.sampling,
            "head_type": self.options.head_type,
            "head_name": self.options.head_name,
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


@dataclass(frozen=True)
class OfHead:
    """What the checkpoint's head is to the data's classes, by their names.

    Attributes
    ----------
    classes : tuple of str
        The task's classes, in the order of the head's outputs where these are known.
    relation : {"unknown", "given", "same", "part", "other"}
        ``part`` keeps the outputs `rows`; ``other`` classes need a new head.
    rows : tuple of int
        The head's output for each class.
    outputs : int
        How many the head has by its names.
    """

    classes: tuple[str, ...]
    relation: Literal["unknown", "given", "same", "part", "other"] = "unknown"
    rows: tuple[int, ...] = ()
    outputs: int = 0


def _of_head(
    names: tuple[str, ...],
    head: Sequence[str] | None,
    options: ClassificationOptions,
    *,
    whole: bool,
) -> OfHead:
    if options.classes is not None:
        return OfHead(names, "given")
    if head is None or options.head == "new":
        return OfHead(names)
    rows = head_rows(names, head)
    if rows is None:
        if not (are_telling(names) and are_telling(head)):
            return OfHead(names)
        # Measured with the head as it is, they are refused as classes that it does not know.
        return OfHead(tuple(head) if whole else names, "other")
    known = dict(zip(rows, names, strict=True))
    if whole or len(rows) == len(head):
        whole_names = [known.get(row, name) for row, name in enumerate(head)]
        return OfHead(tuple(whole_names), "same", outputs=len(head))
    kept = sorted(rows)
    return OfHead(tuple(known[row] for row in kept), "part", tuple(kept), len(head))


class ClassifierSetting(Protocol):
    """What all draws of one task share."""

    @property
    def options(self) -> ClassificationOptions:
        """The task's options."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the head's outputs."""

    @property
    def view(self) -> ImageView:
        """The way from a file to the network."""

    @property
    def of_head(self) -> OfHead:
        """What the checkpoint's head is to the classes."""


class ClassificationDraw:
    """Support, held-out and query images of one seed.

    The checkpoint's head is judged by the images `judge`, by default the support set.
    """

    def __init__(
        self,
        task: ClassifierSetting,
        support: Examples,
        held_out: Examples,
        query: Examples,
        *,
        judge: Examples | None = None,
    ) -> None:
        self._task = task
        self._support = support
        self._judge = support if judge is None else judge
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
        for examples in support if part == "support" else (self._parts["query"],):
            for index in examples.indices:
                yield read_bytes(examples.images.paths[index])

    def prepare(self, model: nn.Module, *, start: bool = True) -> Prepared:
        """Keep the model's head, or make one from the class means of its features.

        With ``auto`` the names of the classes decide. Where the head's are not known, or say
        nothing, one of as many outputs is kept unless it is at chance on the support set. Without
        `start` the new head is left untrained, and no head is tried.

        Raises
        ------
        ModelError
            If the model does not take the images, or ``keep`` meets another number of classes.
        """
        task, head = self._task, _head_of(model, self._task.options.head_name)
        outputs = self._outputs(model)
        choice = self._choose(model, head, outputs, start=start)
        if choice.kept and head is not None:
            return Prepared(model, head, said=choice.said, facts={**choice.facts, "head": "keep"})
        if task.options.head == "keep":
            raise ModelError(
                f"the checkpoint's head has {outputs} outputs, the data {len(task.classes)} "
                "classes. Use --head new, or give the head's class names in order with --classes"
            )
        old = None if head is None else model.get_submodule(head)
        model, head = new_head(model, head, len(task.classes), outputs, kind=task.options.head_type)
        if start and not (choice.rows and keep_rows(model.get_submodule(head), old, choice.rows)):
            self._start_from_means(model, head)
        single = int(torch.bincount(self._support.labels).max()) == 1
        return Prepared(
            model,
            head,
            new_head=True,
            head_rate=SINGLE_EXAMPLE_RATE if single else 1.0,
            said=choice.said,
            facts={**choice.facts, "head": "new"},
        )

    def _choose(
        self, model: nn.Module, head: str | None, outputs: int, *, start: bool
    ) -> _HeadChoice:
        """Decide whether the checkpoint's head stays."""
        task = self._task
        relation, wanted = task.of_head.relation, task.options.head
        fits = head is not None and outputs == len(task.classes)
        if wanted != "auto" or head is None:
            return _HeadChoice(kept=fits and wanted != "new")
        if relation == "part" and outputs == task.of_head.outputs:
            note = f"the checkpoint's head knows these {len(task.classes)} classes and others: "
            return _HeadChoice(
                False,
                (note + f"{len(task.classes)} of its {outputs} outputs are kept",),
                rows=task.of_head.rows,
            )
        if not fits or relation in {"given", "same"} or not start:
            said = order_warning(task.classes) if fits and relation == "unknown" else None
            return _HeadChoice(fits, () if said is None else (said,))
        if relation == "other":
            note = f"the checkpoint's head is for other classes than {shortlist(task.classes, 4)}"
            return _HeadChoice(False, (f"{note}: a new head takes its place",))
        return self._tried(model)

    @torch.inference_mode()
    def _tried(self, model: nn.Module) -> _HeadChoice:
        """Keep a head of as many outputs unless it is at chance on the support set."""
        judge, classes = self._judge, self._task.classes
        judge = judge.at(range(0, len(judge), -(-len(judge) // MOST_JUDGED)))
        device = device_of(model)
        batches = judge.batches(device)
        found = torch.cat([pool(logits_of(model(images))).argmax(1) for images, _ in batches]).cpu()
        trial = try_head(found, judge.labels, len(classes))
        facts, order = {"head_trial": trial.plain()}, order_warning(classes)
        of = f"{trial.right} of {trial.images} support images"
        if not trial.decidable:
            note = (
                f"the checkpoint's head is kept for its {len(classes)} outputs: {of} are right, "
                "too few to tell whether it is for these classes. Decide with --head keep or new"
            )
            return _HeadChoice(True, (note, *([] if order is None else [order])), facts)
        if not trial.at_chance:
            return _HeadChoice(True, () if order is None else (order,), facts)
        note = (
            f"the checkpoint's head finds the class of {of} ({trial.right / trial.images:.1%}), "
            f"as chance does ({trial.chance:.1%}): a new head takes its place. Keep it with --head "
            "keep, or give the order of its classes with --classes"
        )
        return _HeadChoice(False, (note, *self._in_order(found, judge.labels, order)), facts)

    def _in_order(self, found: Tensor, labels: Tensor, order: str | None) -> list[str]:
        """Say where a head that is at chance is right in the order of the classes' numbers."""
        classes = self._task.classes
        if order is None:
            return []
        places = torch.tensor([natural_order(classes).index(name) for name in classes])
        trial = try_head(found, places[labels], len(classes))
        return [] if trial.at_chance else [order]

    def _outputs(self, model: nn.Module) -> int:
        batch = self._task.view.centre(self._support.take([0, self.size - 1]))
        height, width = self._task.view.size
        with forward_errors(f"images of {height} x {width}", CHOOSE_SIZE), torch.inference_mode():
            outputs = pool(logits_of(model.eval()(batch.to(device_of(model)))))
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
                self._task,
                support.at(others(fold, self.size)),
                held_out,
                support.at(fold),
                judge=self._judge,
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
            for logits, labels in self.logits(model, part):
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
        for logits, labels in self.logits(model, part):
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
    def logits(self, model: nn.Module, part: Part) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield logits and labels, batch by batch."""
        model.eval()
        for images, labels in self._parts[part].batches(device_of(model)):
            yield logits_of(model(images)), labels


@dataclass(frozen=True)
class _HeadChoice:
    """Whether the checkpoint's head stays, which of its outputs do, and what is said of it."""

    kept: bool
    said: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[int, ...] = ()


def _head_of(model: nn.Module, name: str | None) -> str | None:
    if name is None:
        return find_head(model)
    require_module(model, name)
    return name
