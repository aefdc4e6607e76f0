"""Image classification: a folder of class folders, or a CSV file of path,label."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from svftool.errors import ModelError
from svftool.models import DEFAULT_PREPROCESSING, Preprocessing
from svftool.tasks.at_once import images_at_once
from svftool.tasks.base import CHOOSE_SIZE, Part, Prepared, TaskMetric, device_of, forward_errors
from svftool.tasks.class_names import check_labels, class_names, readable
from svftool.tasks.heads import CosineHead, logits_of, pool
from svftool.tasks.images import LabelledImage, left_out, list_images, read_bytes, short_name
from svftool.tasks.labelled import ClassifierDraw, ClassifierSetting, of_head
from svftool.tasks.layout import in_suited_layout
from svftool.tasks.options import ClassificationOptions, StrPath
from svftool.tasks.splits import draw_shots, nothing_left, require_held_out, require_query
from svftool.tasks.tokens import load_tokenizer
from svftool.tasks.two_classes import images_of_two_classes
from svftool.tasks.two_sided import (
    ImageTextClassifier,
    has_text_side,
    image_embeddings,
    start_from_texts,
    text_embeddings,
)
from svftool.tasks.views import ImageSet, ImageView, choose_view, with_normalisation

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
        size = min(LARGEST_BATCH, images_at_once(height * width, device))
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
    folder : Path, optional
        Where the tokenizer of a model with a text side lies.
    trust_remote_code : bool
        Whether code that lies beside the tokenizer may run.
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
        folder: Path | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> None:
        self.options = chosen = ClassificationOptions(**options)
        self.text_side = TextSide(folder, trust_remote_code)
        images = list_images(Path(data))
        queries = [] if chosen.query_data is None else list_images(chosen.query_data)
        self.said = self._remarks(images, queries, data)
        self.shots = chosen.shots
        names = class_names(images, chosen.classes, data)
        self.of_head = of_head(names, head_classes, chosen, whole=whole_head)
        self.classes = self.of_head.classes
        check_labels(images, self.classes, data)
        check_labels(queries, self.classes, chosen.query_data or data)
        require_query(chosen.shots, chosen.evaluation, "images")
        labels, hold_out = [image.label for image in images], chosen.hold_out
        require_held_out(
            draw_shots(labels, shots=chosen.shots, hold_out=hold_out), hold_out, "images"
        )
        preprocessing = with_normalisation(
            preprocessing, chosen.mean, chosen.std, augment=chosen.augment
        )
        every = [image.path for image in (*images, *queries)]
        self.view = choose_view(every, preprocessing, size=chosen.image_size, trained=view)
        self._names = labels
        self._images = ImageSet([image.path for image in images], self.view)
        self._queries = self._examples(
            ImageSet([image.path for image in queries], self.view),
            range(len(queries)),
            [image.label for image in queries],
        )

    def _remarks(
        self, images: list[LabelledImage], queries: list[LabelledImage], data: StrPath
    ) -> tuple[str, ...]:
        said = [*left_out(Path(data)), *images_of_two_classes(images)]
        query = self.options.query_data
        if query is not None and query != Path(data):
            said += [*left_out(query), *images_of_two_classes(queries)]
        return tuple(said)

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
            "head_init": self.options.head_init,
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
        return ClassificationDraw(self, support, held_out, query, seed=seed)

    def _examples(self, images: ImageSet, indices: Sequence[int], names: list[str]) -> Examples:
        order = {name: position for position, name in enumerate(self.classes)}
        labels = torch.tensor([order[names[index]] for index in indices], dtype=torch.int64)
        return Examples(images, tuple(indices), labels)


@dataclass(frozen=True)
class TextSide:
    """Where the tokenizer of a model's side for texts lies, and whether its code may run."""

    folder: Path | None
    trust_remote_code: bool

    def tokenizer(self, given: StrPath | None) -> Any:
        """Load the tokenizer: the one given, or the checkpoint's."""
        place = self.folder if given is None else given
        trusted = self.trust_remote_code
        return load_tokenizer(place, trust_remote_code=trusted, task="classification")


class ImageSetting(ClassifierSetting, Protocol):
    """What all draws of one task share."""

    @property
    def options(self) -> ClassificationOptions:
        """The task's options."""

    @property
    def view(self) -> ImageView:
        """The way from a file to the network."""

    @property
    def text_side(self) -> TextSide:
        """Where the tokenizer of the model's side for texts lies."""


class ClassificationDraw(ClassifierDraw[Examples, ImageSetting]):
    """Support, held-out and query images of one seed; see `ClassifierDraw`."""

    unit = "images"

    def contents(self, part: Literal["support", "query"]) -> Iterator[bytes]:
        """Read the image files; see `svftool.tasks.base.HasContents`."""
        support = (self._support, self._parts["held_out"])
        for examples in support if part == "support" else (self._parts["query"],):
            for index in examples.indices:
                yield read_bytes(examples.images.paths[index])

    def prepare(self, model: nn.Module, *, start: bool = True) -> Prepared:
        """Keep the model's head, or make one; see `ClassifierDraw.prepare`.

        Raises
        ------
        ModelError
            If names are to make a head and the model has no side for texts.
        """
        options = self._task.options
        if options.head_init == "names" and not has_text_side(model):
            raise ModelError(
                f"--head-init names: {type(model).__name__} has no text side, expected a model of "
                "images and texts such as CLIP or SigLIP. Use --head-init means"
            )
        if options.head_init == "names" and options.head_name is not None:
            raise ModelError(
                f"--head-init names: makes a head of its own in place of {options.head_name!r}, "
                "expected no --head-name"
            )
        return super().prepare(model, start=start)

    def _outputs(self, model: nn.Module) -> int:
        batch = self._task.view.centre(self._support.take([0, self.size - 1]))
        batch = batch.to(device_of(model.eval()))
        height, width = self._task.view.size
        with forward_errors(f"images of {height} x {width}", CHOOSE_SIZE), torch.inference_mode():
            return in_suited_layout(model, partial(self._width_of_output, model, batch))

    def _width_of_output(self, model: nn.Module, batch: Tensor) -> int:
        if self._head_of(model) is None and has_text_side(model):
            return image_embeddings(model, batch).shape[1]
        return pool(logits_of(model(batch))).shape[1]

    def _head_of(self, model: nn.Module) -> str | None:
        # What the two sides end in is no head: it leads to the space of both.
        if self._task.options.head_name is None and has_text_side(model):
            return None
        return super()._head_of(model)

    def _new_head(self, model: nn.Module, head: str | None, features: int) -> tuple[nn.Module, str]:
        if head is not None or not has_text_side(model):
            return super()._new_head(model, head, features)
        layer = CosineHead if self._task.options.head_type == "cosine" else nn.Linear
        return ImageTextClassifier(model, layer(features, len(self._task.classes))), "head"

    def _start_from_names(self, model: nn.Module, head: str) -> None:
        side, two = self._task.text_side, model.get_submodule("backbone")
        tokenizer = side.tokenizer(self._task.options.tokenizer)
        names = [readable(name) for name in self._task.classes]
        texts = text_embeddings(two.eval(), names, tokenizer)
        start_from_texts(model.get_submodule(head), two, texts)

    @property
    def steady(self) -> bool:
        """Whether images look the same in every epoch."""
        return self._task.options.augment == "none"

    def batch(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Load and augment: (N, 3, height, width) float32 images and (N,) labels."""
        images = self._support.take(indices.tolist())
        augmented = self._task.view.augmented(images, self._task.options.augment, generator)
        return augmented, self._support.labels[indices]

    def predictions(
        self, model: nn.Module, part: Part = "query", folder: Path | None = None
    ) -> Iterator[dict[str, Any]]:
        """Yield each image's class, the one that the model finds, and how sure it is of it."""
        examples = self._parts[part]
        files = (short_name(examples.images.paths[index]) for index in examples.indices)
        for file, found in zip(files, self.found(self.logits(model, part)), strict=True):
            yield {"file": file, **found}
